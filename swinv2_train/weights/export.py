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
from swinv2_train.weights.card_facts import read_facts
from swinv2_train.weights.hub import check_repo, pinned
from swinv2_train.weights.hub_push import push
from swinv2_train.weights.huggingface import Preprocessing
from swinv2_train.weights.matching import match_weights
from swinv2_train.weights.model_card import Exported, check_license, model_card
from swinv2_train.weights.segmenter import check_segmenter_format
from swinv2_train.weights.timm_directory import write_timm_directory

_DIRECTORIES = "choose format=huggingface, or format=timm with out=DIR, a name without an ending"


@dataclass(frozen=True)
class WrittenRequest:
    """What is written, and of which weights: the keys that every format has."""

    format: str
    """Its name."""
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


@dataclass(frozen=True)
class ExportRequest(WrittenRequest):
    """What the command line asks for besides the configuration; format is one of WRITTEN_FORMATS."""

    license: str | None = None
    """The licence's identifier, for the model card; None = the card says that none is stated."""
    hub: str | None = None
    """USER/NAME of the Hugging Face hub's repository that gets what was written; None = none does."""
    hub_private: bool = False
    """The repository is private."""
    hub_revision: str | None = None
    """The branch that gets it; None = main."""

    @property
    def is_directory(self) -> bool:
        """Whether out is a directory with a model card, and not a file."""
        return self.format == "huggingface" or (self.format == "timm" and not self.out.suffix)


def export(config: Config, request: ExportRequest) -> list[Path]:
    """Write the weights that are asked for; returns the files.

    Raises ConfigError, with nothing written, when the weights are not the configured model's, when the format cannot
    hold it, and when out exists.
    """
    check_request(request)
    if request.out.exists():
        raise ConfigError(f"out ({request.out}) exists; name a new file or directory, or remove it")
    path = pinned(request.weights or request.checkpoint or config.run_dir)
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
    card = ""
    if request.is_directory:
        run = None if request.weights else Path(source.origin)
        facts = None if run is None else read_facts(run.parents[1], run, request.ema)
        name = request.hub or request.out.name
        card = model_card(
            Exported(config, module, request.format, source.origin, classes, facts, request.license, name)
        )
    if request.format == "timm" and request.is_directory and isinstance(module, SwinTransformerV2):
        files = write_timm_directory(request.out, module, weights, preprocessing, classes, card)
    else:
        files = save_weights(
            module, request.out, request.format, weights=weights, preprocessing=preprocessing, classes=classes,
            card=card or None,
        )  # fmt: skip
    if warning := report.not_finite_text():
        print(f"warning: {warning}", file=sys.stderr)
    line = {
        "weights": source.origin,
        "ema": request.ema,
        "format": request.format,
        "files": [str(path) for path in files],
    }
    if request.hub is not None:
        line |= push(request.out, request.hub, request.hub_private, request.hub_revision)
    print(json.dumps(line))
    return files


def check_request(request: ExportRequest) -> None:
    """ConfigError for what no weights are needed to refuse."""
    check_license(request.license)
    if request.license is not None and not request.is_directory:
        raise ConfigError(f"license ({request.license}) is for the model card of a directory; {_DIRECTORIES}")
    if request.hub is None:
        for key, value in (("hub_private", request.hub_private), ("hub_revision", request.hub_revision)):
            if value:
                raise ConfigError(f"{key} is of hub=USER/NAME, which is not given; add it, or leave it out")
        return
    if not request.is_directory:
        raise ConfigError(f"hub ({request.hub}) takes a directory; {_DIRECTORIES}")
    check_repo(request.hub, f"hub ({request.hub})")


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
