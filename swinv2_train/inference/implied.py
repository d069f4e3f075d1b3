"""What weights without a run say of the model and its images: by shapes, file names and the files beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.models.sizes import SIZES
from swinv2_train.storage.json_files import anything, mapping, read_json
from swinv2_train.weights import ConvertedWeights, trained_windows
from swinv2_train.weights.files import HUGGINGFACE_FILES
from swinv2_train.weights.huggingface import CONFIG_BYTES, CONFIG_DEFAULTS, PIL_RESAMPLING

_BLOCK = re.compile(r"(?:encoder\.)?layers\.(\d+)\.blocks\.(\d+)\.attn\.logit_scale")
_PUBLISHED = re.compile(r"swinv2_\w*?window(\d+)(?:to(\d+))?_(?:\d+to)?(\d+)")
"""Microsoft's and timm's names: swinv2_base_patch4_window12to16_192to256_22kto1k_ft, swinv2_tiny_window8_256."""
_RESAMPLING = {number: name for name, number in PIL_RESAMPLING.items()}

Implied = dict[str, Any]
"""Values by configuration key."""


def implied(weights: ConvertedWeights, path: Path) -> Implied:
    """Values of the keys that the weights at path and what lies beside them determine; what the user says comes first.

    Raises ConfigError for weights that are no encoder.
    """
    found: Implied = {**_of_shapes(weights), **_of_name(path.name)}
    directory = path.parent if path.name in HUGGINGFACE_FILES else path
    config = _read(directory / "config.json")
    if config.get("model_type") == "swinv2":
        found |= _of_transformers(config, path) | _of_preprocessor(_read(directory / "preprocessor_config.json"))
    elif isinstance(config.get("pretrained_cfg"), dict):
        given = config.get("model_args")
        found |= _of_name(str(config.get("architecture"))) | _of_timm(config["pretrained_cfg"])
        found |= _of_timm_arguments(given if isinstance(given, dict) else {})
    return found


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Values as a command line's words."""
    return [f"{key}={_word(value)}" for key, value in values.items()]


def _of_shapes(weights: ConvertedWeights) -> Implied:
    shapes = {name: entry.shape for name, entry in weights.entries.items()}
    depths: dict[int, int] = {}
    heads: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.fullmatch, shapes)):
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
        heads[stage] = shapes[match[0]][0]
    embedding = next((shapes[name] for name in shapes if name.endswith("patch_embed.proj.weight")), None)
    if embedding is None or not depths:
        raise ConfigError(f"{weights.origin} holds no Swin V2 encoder; name weights of one")
    sizes = tuple(depths.get(stage, 0) for stage in range(max(depths) + 1))
    names = [name for name, size in SIZES.items() if (size["embed_dim"], size["depths"]) == (embedding[0], sizes)]
    found: Implied = {"model": names[0] if names else "tiny", "task": "classify", "model.in_chans": embedding[1]}
    if not names:  # a size of somebody's own
        found |= {"model.embed_dim": embedding[0], "model.depths": list(sizes)}
        found["model.num_heads"] = [heads.get(stage, 1) for stage in range(len(sizes))]
    if len(embedding) == 5:  # of clips, whose frames are neither erased nor pasted
        found |= {"model.patch_frames": embedding[2], "task.cutmix_alpha": 0, "task.erasing_prob": 0}
    if "head.weight" in shapes:
        found["task.num_classes"] = shapes["head.weight"][0]
    return found


def _of_name(name: str) -> Implied:
    match = _PUBLISHED.match(name)
    if match is None:
        return {}
    window, image = int(match[2] or match[1]), int(match[3])
    found: Implied = {"model.window_size": window, "model.img_size": image}
    if match[2]:  # fine-tuned at larger windows: the position bias is that of the pre-training's, of 192 pixels
        trained = int(match[1])
        found["model.pretrained_window_sizes"] = [trained, trained, trained, trained // 2]
    return found


def _of_transformers(config: Mapping[str, Any], path: Path) -> Implied:
    windows = trained_windows(path)
    if windows is None:
        return {}
    config = {**CONFIG_DEFAULTS, **config}
    found: Implied = {"model.window_size": config["window_size"], "model.img_size": config["image_size"]}
    if any(config["pretrained_window_sizes"]):
        found["model.pretrained_window_sizes"] = [rows for rows, _ in windows]
    return found


def _of_preprocessor(config: Mapping[str, Any]) -> Implied:
    """An image processor's keys of transformers: the side to which images are resized, and the crop of it."""
    found: Implied = dict(_colours(config.get("image_mean"), config.get("image_std")))
    size, crop = config.get("size"), config.get("crop_size")
    side = _side(size)
    if side and config.get("do_center_crop") and (cut := _side(crop)):
        found["data.eval_crop_pct"] = min(1.0, cut / side)
    elif side:
        found["data.eval_crop_pct"] = 1.0
    if isinstance(size, dict) and "height" in size:
        found["data.eval_crop"] = "squash"
    resample = config.get("resample")
    if isinstance(resample, int) and resample in _RESAMPLING:
        found["data.interpolation"] = _RESAMPLING[resample]
    return found


def _of_timm(config: Mapping[str, Any]) -> Implied:
    found: Implied = dict(_colours(config.get("mean"), config.get("std")))
    share, interpolation, mode = config.get("crop_pct"), config.get("interpolation"), config.get("crop_mode")
    if isinstance(share, int | float):
        found["data.eval_crop_pct"] = share
    if interpolation in _RESAMPLING.values():
        found["data.interpolation"] = interpolation
    if mode == "squash":
        found["data.eval_crop"] = mode
    return found


def _of_timm_arguments(given: Mapping[str, Any]) -> Implied:
    """What a model was built with, where it was not by its architecture's name alone."""
    found: Implied = {}
    for name in ("window_size", "img_size"):
        if _is_size(given.get(name)):
            found[f"model.{name}"] = given[name]
    windows = given.get("pretrained_window_sizes")
    if isinstance(windows, list) and all(map(_is_size, windows)):
        found["model.pretrained_window_sizes"] = windows
    return found


def _is_size(value: Any) -> bool:
    """Whether it is one number, or a list of two."""
    sides = value if isinstance(value, list) else [value]
    return len(sides) <= 2 and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)


def _colours(mean: Any, std: Any) -> Iterator[tuple[str, list[float]]]:
    for key, values in (("data.mean", mean), ("data.std", std)):
        if isinstance(values, list) and values and all(isinstance(value, int | float) for value in values):
            yield key, values


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else None


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    content: Mapping[str, Any] = read_json(path, CONFIG_BYTES, mapping(anything()))
    return content


def _word(value: Any) -> str:
    return "[" + ",".join(map(_word, value)) + "]" if isinstance(value, list) else str(value)
