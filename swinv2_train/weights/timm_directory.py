"""A model as timm keeps it on a hub: config.json beside model.safetensors, for ``timm.create_model("local-dir:DIR")``.

Source: timm 1.0, models/_hub.py (save_for_hf, load_model_config_from_path).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from swinv2_train.models import SwinTransformerV2
from swinv2_train.storage.atomic import replacing_output
from swinv2_train.weights import save_weights
from swinv2_train.weights.huggingface import Preprocessing

_BUILDER = "swinv2_tiny_window8_256"
"""The name under which timm builds a Swin V2; every size of it is an argument."""


def write_timm_directory(
    directory: Path,
    module: SwinTransformerV2,
    weights: Mapping[str, Tensor],
    preprocessing: Preprocessing | None,
    classes: Sequence[str] | None,
    card: str,
) -> list[Path]:
    """Write model.safetensors, config.json and README.md of a card's text; returns them in this order.

    Raises as save_weights does, with nothing written.
    """
    texts = {
        "config.json": json.dumps(timm_config(module, preprocessing, classes), indent=2) + "\n",
        "README.md": card,
    }
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(replacing_output(directory / name)).write(text.encode())
        files = save_weights(module, directory / "model.safetensors", "timm", weights=weights, classes=classes)
    return [*files, *(directory / name for name in texts)]


def timm_config(
    module: SwinTransformerV2, preprocessing: Preprocessing | None, classes: Sequence[str] | None
) -> dict[str, Any]:
    """config.json of a classifier or backbone.  classes: what all of the head's rows are called, or None."""
    arguments = {
        "img_size": list(module.img_size),
        "patch_size": module.patch_size,
        "window_size": _one_or_two(module.window_size),
        "embed_dim": module.embed_dim,
        "depths": list(module.depths),
        "num_heads": list(module.num_heads),
        "mlp_ratio": module.mlp_ratio,
        "qkv_bias": module.qkv_bias,
        "pretrained_window_sizes": [_one_or_two(window) for window in module.pretrained_window_sizes],
        "in_chans": module.in_chans,
    }
    how: dict[str, Any] = {
        "num_classes": module.num_classes,
        "input_size": [module.in_chans, *module.img_size],
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
    }
    if preprocessing is not None:
        how |= {
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "squash" if preprocessing.squash else "center",
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
        }
    named = {"label_names": list(classes)} if classes is not None and len(classes) == module.num_classes else {}
    return {
        "architecture": _BUILDER,
        "num_classes": module.num_classes,
        "num_features": module.num_features,
        "global_pool": "avg",
        **named,
        "model_args": arguments,
        "pretrained_cfg": how,
    }


def _one_or_two(sides: Sequence[int]) -> int | list[int]:
    return sides[0] if len(set(sides)) == 1 else list(sides)
