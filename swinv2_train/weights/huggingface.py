"""What a Hugging Face directory holds beside the weights, and what transformers' SwinV2 cannot express.

Source: transformers 5, Swinv2Config and modeling_swinv2; its image processors' keys.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, SwinTransformerV2, encoder_of
from swinv2_train.models.upernet import POOLED_SIDES, UPerNet
from swinv2_train.storage.atomic import replacing_output
from swinv2_train.storage.json_files import LARGEST, anything, mapping, read_json
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.storage.safetensors_files import fill_safetensors
from swinv2_train.weights.files import HUGGINGFACE_FILES, names_of

CONFIG_DEFAULTS = {
    "image_size": 224, "patch_size": 4, "window_size": 7, "depths": (2, 2, 6, 2), "pretrained_window_sizes": (0,) * 4,
}  # fmt: skip
"""What config.json need not say."""

CONFIG_BYTES = 2**25
_MOST_STAGES = 16
_UNNAMED = "LABEL_"
"""Begins what transformers calls a class that has no name."""

PIL_RESAMPLING = {"bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class Preprocessing:
    """How images are resized, cropped and normalised for evaluation."""

    mean: tuple[float, float, float]
    """Per channel, pixels in 0..1."""
    std: tuple[float, float, float]
    """Per channel, pixels in 0..1."""
    img_size: tuple[int, int]
    """Height and width of the crop in pixels."""
    crop_pct: float
    """The crop as a share of the resized image."""
    squash: bool
    """Resize both sides to img_size / crop_pct, whatever the image's shape; otherwise the shape is kept."""
    interpolation: str
    """bilinear or bicubic."""


def check_huggingface(module: SwinTransformerV2 | SimMIM, preprocessing: Preprocessing | None) -> None:
    """ConfigError when transformers would compute something else, or could not build the model at all."""
    model = encoder_of(module)
    if model.window_size[0] != model.window_size[1]:
        raise _refusal(f"window_size {model.window_size} (its windows are square)")
    if isinstance(module, SimMIM) and model.img_size[0] != model.img_size[1]:
        raise _refusal(f"a SimMIM model of img_size {model.img_size} (it takes the last map for square)")
    window, coarsest = model.window_size[0], model.patch_size * 2 ** (len(model.depths) - 1)
    if any(side % coarsest for side in model.img_size):
        raise _refusal(f"img_size {model.img_size} with maps of odd size (it clamps their windows otherwise)")
    for i in range(len(model.depths)):
        sides = [side // (model.patch_size * 2**i) for side in model.img_size]
        if min(sides) < max(sides) and min(sides) <= window:
            raise _refusal(
                f"the {sides[0]}x{sides[1]} map of stage {i + 1} with window {window} (it clamps both sides)"
            )
        if any(side % min(side, window) for side in sides):
            raise _refusal(
                f"window {window} on the {sides[0]}x{sides[1]} map of stage {i + 1} (its padding is attended)"
            )
    for trained, grid in zip(model.pretrained_window_sizes, model.grids, strict=True):
        if trained[0] != trained[1] or (trained == (1, 1) and grid.window != (1, 1)):
            raise _refusal(f"pretrained_window_sizes {model.pretrained_window_sizes} (one number a stage, not 1)")
    if preprocessing is not None and len(set(preprocessing.img_size)) > 1 and not preprocessing.squash:
        raise _refusal(
            f"a crop to {preprocessing.img_size} that keeps the image's shape (data.eval_crop=squash it can)"
        )


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"format=huggingface cannot hold {what}; export format=microsoft, or another img_size or window")


def write_huggingface(
    directory: Path,
    entries: Mapping[str, LazyTensor],
    module: SwinTransformerV2 | SimMIM | UPerNet,
    preprocessing: Preprocessing | None,
    classes: Sequence[str] | None = None,
    card: str | None = None,
) -> list[Path]:
    """Write model.safetensors (entries by transformers' names), config.json and, from preprocessing, the third file;
    README.md of a card's text.

    All are built before any takes its name, the weights last: a directory with weights is whole, and what stood there
    before stays until then.
    """
    weights = directory / "model.safetensors"
    if isinstance(module, UPerNet):
        texts = {"config.json": _json(upernet_config(module, entries, classes))}
    else:
        texts = {"config.json": _json(huggingface_config(module, entries, classes))}
    if preprocessing is not None:
        texts["preprocessor_config.json"] = _json(preprocessor_config(preprocessing))
    if card is not None:
        texts["README.md"] = card
    with contextlib.ExitStack() as stack:  # which ends in reverse: the weights take their name last
        fill_safetensors(stack.enter_context(replacing_output(weights)), entries)
        for name, text in texts.items():
            stack.enter_context(replacing_output(directory / name)).write(text.encode())
        for outdated in (weights, directory / "preprocessor_config.json"):
            outdated.unlink(missing_ok=True)
    return [weights, *(directory / name for name in texts)]


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def huggingface_config(
    module: SwinTransformerV2 | SimMIM, entries: Mapping[str, LazyTensor], classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """config.json of a model whose weights, by transformers' names, are entries.

    classes: what the head's first rows are called; transformers' own names stand for the others.
    """
    model = encoder_of(module)
    height, width = model.img_size
    if isinstance(module, SimMIM):
        architecture = "Swinv2ForMaskedImageModeling"
    else:
        architecture = "Swinv2ForImageClassification" if model.num_classes else "Swinv2Model"
    config = {
        "architectures": [architecture],
        "model_type": "swinv2",
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "embed_dim": model.embed_dim,
        "depths": list(model.depths),
        "num_heads": list(model.num_heads),
        "window_size": model.window_size[0],
        # 0 is "the window used" there, and 1 a division by zero
        "pretrained_window_sizes": [0 if side == 1 else side for side, _ in model.pretrained_window_sizes],
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.qkv_bias,
        "drop_path_rate": model.drop_path_rate,
        "hidden_act": "gelu",
        "layer_norm_eps": model.patch_embed.norm.eps,
        "use_absolute_embeddings": False,
        "encoder_stride": model.patch_size * 2 ** (len(model.depths) - 1),
        "dtype": str(next(iter(entries.values())).dtype).removeprefix("torch."),
    }
    return config | _labels(model.num_classes, classes)


def upernet_config(
    module: UPerNet, entries: Mapping[str, LazyTensor], classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """As huggingface_config, of a segmentation model."""
    encoder, heads = module.encoder, module.decoder
    backbone = huggingface_config(encoder, entries)
    stages = [f"stage{number + 1}" for number in range(len(encoder.depths))]
    auxiliary = heads.auxiliary_head
    return {
        "architectures": ["UperNetForSemanticSegmentation"],
        "model_type": "upernet",
        "backbone_config": backbone | {"architectures": ["Swinv2Backbone"], "out_features": stages},
        "hidden_size": heads.decode_head.conv_seg.in_channels,
        "pool_scales": list(POOLED_SIDES),
        "use_auxiliary_head": auxiliary is not None,
        "auxiliary_channels": 256 if auxiliary is None else auxiliary.conv_seg.in_channels,
        "auxiliary_in_channels": encoder.embed_dim * 2 ** max(0, len(stages) - 2),
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "dtype": backbone["dtype"],
    } | _labels(module.num_classes, classes)


def _labels(num_classes: int, classes: Sequence[str] | None) -> dict[str, Any]:
    if not num_classes:
        return {}
    named = classes or ()
    labels = [named[index] if index < len(named) else f"{_UNNAMED}{index}" for index in range(num_classes)]
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def huggingface_classes(path: str | Path) -> tuple[str, ...] | None:
    """What the rows of a Hugging Face model's head are called: id2label of its config.json, or timm's label_names.

    path: its directory, or its weight file or index in there.  None for everything else, and where the names are those
    that transformers gives of itself.
    """
    path = Path(path)
    try:
        directory = path.parent if path.name in HUGGINGFACE_FILES and path.is_file() else path
        config = _read_config(directory)
        labels = config.get("id2label")
        if not labels:
            return names_of(config.get("label_names"))
        names = [labels[str(index)] for index in range(len(labels))]
        while names and names[-1] == f"{_UNNAMED}{len(names) - 1}":
            names.pop()
        return names_of(names)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(directory / "config.json", CONFIG_BYTES, mapping(anything()))
    return config


def trained_windows(path: str | Path) -> tuple[tuple[int, int], ...] | None:
    """Per stage, the window in tokens at which the position bias of a Hugging Face model is normalised.

    path: its directory, or its weight file or index in there.  As the model attribute pretrained_window_sizes tells it:
    the entry of that name in config.json or, where it is 0, the window that transformers uses at image_size.  None for
    everything else: another model_type, no config.json, or one that cannot be read.
    """
    path = Path(path)
    try:
        directory = path.parent if path.name in HUGGINGFACE_FILES and path.is_file() else path
        config = _read_config(directory)
        if config["model_type"] == "upernet":
            config = config["backbone_config"]
        config = {**CONFIG_DEFAULTS, **config}
        if config["model_type"] != "swinv2":
            return None
        patch, window = _pair(config["patch_size"], 1), _pair(config["window_size"], 1)
        maps = [side // size for side, size in zip(_pair(config["image_size"], 1), patch, strict=True)]
        windows = []
        if len(config["depths"]) > _MOST_STAGES:
            return None
        for stage, (_, entry) in enumerate(zip(config["depths"], config["pretrained_window_sizes"], strict=True)):
            used = [min(side // 2**stage, w) for side, w in zip(maps, window, strict=True)]
            rows, cols = (given or u for given, u in zip(_pair(entry, 0), used, strict=True))
            windows.append(_pair((rows, cols), 1))
        return tuple(windows)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _pair(value: Any, least: int) -> tuple[int, int]:
    """An int, or two, as (height, width); ValueError or TypeError for what is none or below least."""
    rows, cols = (value, value) if isinstance(value, int) else value
    if any(not isinstance(side, int) or isinstance(side, bool) or side < least for side in (rows, cols)):
        raise ValueError("not a size")
    if max(rows, cols) > LARGEST:
        raise ValueError("not a size")
    return rows, cols


def preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json: resize, cut out the centre, normalise."""
    height, width = preprocessing.img_size
    resized = {
        "height": math.floor(height / preprocessing.crop_pct),
        "width": math.floor(width / preprocessing.crop_pct),
    }
    return {
        "image_processor_type": "BitImageProcessor",  # ViT's, in older transformers, cannot crop the centre
        "do_convert_rgb": True,
        "do_resize": True,
        "size": resized if preprocessing.squash else {"shortest_edge": resized["height"]},
        "resample": PIL_RESAMPLING[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
