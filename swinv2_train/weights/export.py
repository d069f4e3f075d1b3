"""A run's weights, written for timm, transformers and the official code."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from swinv2_train.config import Config, ConfigError, pair
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.models.initial import on_meta
from swinv2_train.models.upernet import UPerNet
from swinv2_train.tasks import build_task
from swinv2_train.weights import read_weights, save_weights, weights_classes
from swinv2_train.weights.huggingface import Preprocessing
from swinv2_train.weights.matching import match_weights
from swinv2_train.weights.segmenter import check_segmenter_format


@dataclass(frozen=True)
class ExportRequest:
    """What the command line asks for besides the configuration."""

    format: str
    """One of WRITTEN_FORMATS."""
    out: Path
    """What is written; must not be there yet."""
    checkpoint: str | None = None
    """A checkpoint directory; None = the newest of the run."""
    weights: str | None = None
    """Weights of any known format in place of a checkpoint."""
    weights_format: str | None = None
    """The format of weights; None = by its names."""
    ema: bool = False
    """The averages of a run's weights in place of these."""


def export(config: Config, request: ExportRequest) -> list[Path]:
    """Write the weights that are asked for; returns the files.

    Raises ConfigError, with nothing written, when the weights are not the configured model's, when the format cannot
    hold it, and when out exists.
    """
    if request.out.exists():
        raise ConfigError(f"out ({request.out}) exists; name a new file or directory, or remove it")
    path = request.weights or request.checkpoint or config.run_dir
    source = read_weights(path, request.weights_format, averaged=request.ema)
    with on_meta():
        module = build_task(config, torch.device("cpu")).module
    if not isinstance(module, SwinTransformerV2 | SimMIM | UPerNet):
        raise ConfigError(
            f"task.name ({config.task.name}) has a model that no format holds, neither a classifier nor SimMIM; load "
            "its checkpoint with swinv2_train.weights.read_weights"
        )
    if isinstance(module, UPerNet):
        check_segmenter_format(request.format, module)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    weights, report = match_weights(source, shapes)
    count = config.task.label_classes or config.task.pixel_classes or 0
    classes = weights_classes(path) if count else None
    if classes is None or len(classes) > count:
        classes = config.task.pixel_class_names
    preprocessing = None if isinstance(module, UPerNet) else _preprocessing(config)
    if request.format == "huggingface" and preprocessing is None:
        why = "fits no image into task.resize_long_px x task.resize_short_px"
        if not isinstance(module, UPerNet):
            why = "reads photographs alone"
        print(f"note: no preprocessor_config.json, for transformers {why}", file=sys.stderr)
    files = save_weights(
        module, request.out, request.format, weights=weights, preprocessing=preprocessing, classes=classes
    )
    if warning := report.not_finite_text():
        print(f"warning: {warning}", file=sys.stderr)
    line = {
        "weights": source.origin,
        "ema": request.ema,
        "format": request.format,
        "files": [str(path) for path in files],
    }
    print(json.dumps(line))
    return files


def _preprocessing(config: Config) -> Preprocessing | None:
    """How photographs are prepared; None where images are read as values of bands (data/transforms/bands.py)."""
    if Bands.of(config) is not None:
        return None
    data = config.data
    return Preprocessing(
        mean=(data.mean[0], data.mean[1], data.mean[2]),
        std=(data.std[0], data.std[1], data.std[2]),
        img_size=pair("model.img_size", config.model.img_size),
        crop_pct=data.eval_crop_pct,
        squash=data.eval_crop == "squash",
        interpolation=data.interpolation,
    )
