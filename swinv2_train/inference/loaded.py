"""A trained model with what belongs to it: classes, crop, normalisation.

import swinv2_train as s2

model = s2.load("runs/finetune")
print(model.predict("cat.jpg").label)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.arguments import check_once, prepared
from swinv2_train.config.command_line import compose_overrides, load_run_config
from swinv2_train.config.load import home_expanded
from swinv2_train.data.sample import Targets
from swinv2_train.inference.clips import row_of_clip
from swinv2_train.inference.implied import arguments, implied
from swinv2_train.inference.pixels import pixels
from swinv2_train.tasks import build_task
from swinv2_train.weights import Head, load_weights, read_weights, weights_classes

if TYPE_CHECKING:
    from swinv2_train.inference.pixels import Picture


_DEFAULTS = ("data=labelled", "task.rand_augment=null")
"""Of weights without a run; the second does nothing here and would be refused for images other than photographs."""


class Prediction(NamedTuple):
    """The most probable classes of an image, the best first."""

    classes: tuple[int, ...]
    """Their numbers."""
    labels: tuple[str, ...]
    """Their names; their numbers where the weights name no classes."""
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        """The name of the most probable one."""
        return self.labels[0]


class LoadedModel:
    """A model in evaluation mode, which answers for images as it was evaluated.

    config: of its run, or what the weights imply.  classes: names of the head's rows; None where nothing says them.
    """

    def __init__(self, config: Config, weights: Path, device: torch.device, averaged: bool, format: str | None) -> None:
        self.config, self.device = config, device
        self.task = build_task(config, device)
        self.has_classes = self.task.predictions is not None and "head.weight" in read_weights(weights, format)
        headless = self.task.predictions is not None and not self.has_classes
        head: Head = "fresh" if headless else "load"
        self.report = load_weights(self.task.module, weights, format=format, head=head, averaged=averaged)
        self.module = self.task.module.to(device).eval()
        names = weights_classes(weights) if config.task.label_classes is not None else None
        self.classes = names if names is None or len(names) <= (config.task.label_classes or 0) else None
        self._transform: Any = dataclasses.replace(self.task.eval_transform, needs=())

    def predict(self, images: Picture | Sequence[Picture], top_k: int = 5, batch_size: int = 32) -> Any:
        """The classes of one image, a Prediction, or of a list of images, a list of them in the same order.

        top_k: how many classes at most.  Raises ConfigError for a model that names no class, and for an image that
        cannot be read.
        """
        predictions = self.task.predictions
        if predictions is None or not self.has_classes:
            raise ConfigError("these weights have no head that names classes; ask for features(), or load a classifier")
        if top_k < 1:
            raise ConfigError(f"top_k ({top_k}) must be at least 1")
        found: list[Prediction] = []
        for batch in self._batches(images, batch_size):
            with torch.no_grad():
                probabilities = predictions.probabilities(self._forward, batch).cpu()
            best = probabilities.topk(min(top_k, predictions.num_classes), dim=1)
            for classes, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                found.append(Prediction(tuple(classes), tuple(map(self._name, classes)), tuple(shares)))
        return found if isinstance(images, list | tuple) else found[0]

    def features(self, images: Picture | Sequence[Picture], batch_size: int = 32) -> Tensor:
        """The encoder's pooled features: (8C,) of one image, (N, 8C) of a list of N (four stages), float32 on the CPU.

        Raises ConfigError for an image that cannot be read.
        """
        found = []
        for batch in self._batches(images, batch_size):
            with torch.no_grad():
                found.append(self.task.features(self._forward, batch).float().cpu())
        width = self.task.encoder.num_features
        rows = torch.cat(found) if found else torch.empty(0, width)
        return rows if isinstance(images, list | tuple) else rows[0]

    def _forward(self, **inputs: Any) -> Any:
        return self.module(**{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()})

    def _batches(self, images: Picture | Sequence[Picture], size: int) -> Iterator[dict[str, Any]]:
        if size < 1:
            raise ConfigError(f"batch_size ({size}) must be at least 1")
        given: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        for start in range(0, len(given), size):
            cut = [self._row(image)["images"] for image in given[start : start + size]]
            yield {"images": torch.stack(cut), "weight": torch.ones(len(cut))}

    def _row(self, image: Any) -> dict[str, Any]:
        """What the transform makes of an image or a clip."""
        transform, unused = self._transform, np.random.default_rng(0)  # evaluation draws nothing
        if transform.clips is not None:
            return row_of_clip(lambda clip: transform(clip, Targets(), unused), image)
        return transform(pixels(image, transform.bands), Targets(), unused)

    def _name(self, number: int) -> str:
        return self.classes[number] if self.classes is not None and number < len(self.classes) else str(number)


def load(
    path: str | PathLike[str],
    *overrides: str,
    ema: bool = False,
    device: str | torch.device | None = None,
    format: str | None = None,
) -> LoadedModel:
    """The model of a run, of a checkpoint in it, or of a file or directory of weights of any known format.

    overrides: KEY=VALUE, as on the command line.  A run says how it was trained.  Of other weights shapes, file names
    and the files beside them say the size, window, image size, crop and normalisation; model.window_size and
    model.img_size must be given where nothing says them.  ema: the averages of a run's weights.  device: None = a CUDA
    device where there is one.  format: of the weights; None = by their names.

    Raises ConfigError, which names path or key and the remedy, for weights that cannot be read or do not fit.
    """
    check_once(overrides)
    overrides = tuple(prepared(overrides))
    path = Path(home_expanded("path", str(path)))
    run = next((folder for folder in (path, path.parent.parent) if (folder / "config.yaml").is_file()), None)
    if run is not None:
        config = load_run_config(run, overrides)
        path = find_checkpoint(path)
    else:
        found = implied(read_weights(path, format), path)
        keys = {override.partition("=")[0] for override in overrides}
        of_clips = ("model.frames", "model.window_frames") if "model.patch_frames" in found else ()
        for key in ("model.window_size", "model.img_size", *of_clips):
            if key not in {*found, *keys}:
                raise ConfigError(f"{path} does not say its {key}, which shapes do not show; give it: '{key}=NUMBER'")
        words = arguments({key: value for key, value in found.items() if key not in keys})
        defaults = [word for word in _DEFAULTS if word.partition("=")[0] not in keys]
        config = compose_overrides([*defaults, *words, *overrides], ("run_dir", "data.shards"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedModel(config, path, torch.device(device), ema, format)
