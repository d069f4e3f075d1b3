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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.arguments import check_once, prepared
from swinv2_train.config.command_line import compose_overrides, load_run_config
from swinv2_train.config.load import home_expanded
from swinv2_train.data.loading.rows import tensors_of
from swinv2_train.data.sample import Targets
from swinv2_train.data.sources.matched import check_pixel_classes
from swinv2_train.inference.clips import row_of_clip
from swinv2_train.inference.implied import arguments, implied
from swinv2_train.inference.pixels import pixels
from swinv2_train.inference.vectors import Vectors
from swinv2_train.tasks import build_task
from swinv2_train.tasks.answers import Answer, Ask
from swinv2_train.weights import Head, load_weights, read_weights, weights_classes
from swinv2_train.weights.hub import HubAddress, fetched, pinned

if TYPE_CHECKING:
    from swinv2_train.inference.pixels import Picture


_DEFAULTS = ("data=labelled", "task.rand_augment=null")
"""Of weights without a run; the second does nothing here and would be refused for images other than photographs."""


class LoadedModel:
    """A model in evaluation mode, which answers for images as it was evaluated.

    config: of its run, or what the weights imply.  weights: where they come from; of a hub the commit too.  classes:
    names of the classes, by their numbers; None where nothing says them.
    """

    def __init__(
        self, config: Config, weights: str | Path, device: torch.device, averaged: bool, format: str | None
    ) -> None:
        self.config, self.weights, self.device = config, weights, device
        self.task = build_task(config, device)
        headless = self.task.predictions is not None and "head.weight" not in read_weights(weights, format)
        head: Head = "fresh" if headless else "load"
        self.report = load_weights(self.task.module, weights, format=format, head=head, averaged=averaged)
        self.module = self.task.module.to(device).eval()
        self.classes = _names(config, weights)
        self.headless = headless
        self.transform: Any = dataclasses.replace(self.task.eval_transform, needs=())
        """From an image to a row of a batch that answers() takes."""

    def predict(self, images: Picture | Sequence[Picture], top_k: int = 5, batch_size: int = 32) -> Any:
        """The answer for one image, or for a list of images a list of them in the same order.

        Of a classifier a Prediction, with top_k classes at most; of a segmentation a ClassMap; of a detector
        DetectedObjects.  batch_size: images at a time.  Raises ConfigError for a model that names nothing, and for an
        image that cannot be read.
        """
        ask = self.ask(top_k)
        found: list[Any] = []
        for batch in self._batches(images, batch_size, self.transform):
            found += self.answers(batch, ask)
        return found if isinstance(images, list | tuple) else found[0]

    def features(self, images: Picture | Sequence[Picture], batch_size: int = 32) -> Tensor:
        """The encoder's pooled features: (8C,) of one image, (N, 8C) of a list of N (four stages), float32 on the CPU.

        Raises ConfigError for an image that cannot be read.
        """
        vectors = Vectors.build("pooled", self.config)
        found = [self.vectors(batch, vectors)["pooled"] for batch in self._batches(images, batch_size, vectors)]
        width = self.task.encoder.num_features
        rows = torch.cat(found) if found else torch.empty(0, width)
        return rows if isinstance(images, list | tuple) else rows[0]

    def ask(self, top_k: int) -> Ask:
        """What answers() is asked.  Raises ConfigError where it is not at least one class, or nothing is named."""
        if top_k < 1:
            raise ConfigError(f"top_k ({top_k}) must be at least 1")
        if self.headless or self.task.answer_columns(self.config.task, top_k) is None:
            raise ConfigError("these weights have no head that names classes; ask for features(), or load a classifier")
        return Ask(top_k, self.name)

    @torch.no_grad()
    def answers(self, batch: dict[str, Any], ask: Ask) -> Sequence[Answer | None]:
        """Of a batch of transform's rows; None, perhaps, where its "weight" is 0."""
        return self.task.answers(self._forward, batch, ask)

    @torch.no_grad()
    def vectors(self, batch: dict[str, Any], vectors: Vectors) -> dict[str, Tensor]:
        """Features of a batch of the rows of vectors, by their names: float32 (B, ...) on the CPU."""
        return {name: each.float().cpu() for name, each in vectors.of(self.task, self._forward, batch).items()}

    @torch.no_grad()
    def picture(self, batch: dict[str, Any]) -> np.ndarray | None:
        """The task's picture of a batch of transform's rows, uint8 (H, W, 3); None where it would need targets."""
        if self.task.picture is None or self.task.eval_transform.needs:
            return None
        return self.task.picture(self._forward, batch, self.classes)

    def _forward(self, **inputs: Any) -> Any:
        return self.module(**{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()})

    def _batches(
        self, images: Picture | Sequence[Picture], size: int, transform: Any
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        if size < 1:
            raise ConfigError(f"batch_size ({size}) must be at least 1")
        given: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        for start in range(0, len(given), size):
            rows = [row_of(image, transform) for image in given[start : start + size]]
            stacked = tensors_of(rows[0])
            yield {
                **{name: [row[name] for row in rows] for name in rows[0]},
                **{name: torch.stack([row[name] for row in rows]) for name in stacked},
                "weight": torch.ones(len(rows)),
            }

    def name(self, number: int) -> str:
        """What a class is called."""
        return self.classes[number] if self.classes is not None and number < len(self.classes) else str(number)


def _names(config: Config, weights: str | Path) -> tuple[str, ...] | None:
    """What the classes are called: by the weights, or else, of pixels and objects, by the configuration."""
    task = config.task
    if task.label_classes is None and task.pixel_classes is None:
        return None
    theirs = weights_classes(weights)
    if theirs is not None and len(theirs) > (task.label_classes or task.pixel_classes or 0):
        theirs = None
    if task.pixel_classes is None:
        return theirs
    check_pixel_classes(theirs, task.pixel_class_names, str(weights), "task.class_names")
    return task.pixel_class_names or theirs


def row_of(image: Any, transform: Any) -> dict[str, Any]:
    """What a transform of an evaluation makes of an image or a clip.  Raises ConfigError for what cannot be read."""
    unused = np.random.default_rng(0)  # evaluation draws nothing
    if transform.clips is not None:
        return row_of_clip(lambda clip: transform(clip, Targets(), unused), image)
    row: dict[str, Any] = transform(pixels(image, transform.bands), Targets(), unused)
    return row


def load(
    path: str | PathLike[str],
    *overrides: str,
    ema: bool = False,
    device: str | torch.device | None = None,
    format: str | None = None,
) -> LoadedModel:
    """The model of a run, of a checkpoint in it, of a file or directory of weights of any known format, or of a
    repository of the Hugging Face hub (hf://USER/NAME[@REVISION][/FILE]).

    overrides: KEY=VALUE, as on the command line.  A run says how it was trained.  Of other weights shapes, file names
    and the files beside them say the size, window, image size, crop and normalisation; model.window_size and
    model.img_size must be given where nothing says them.  ema: the averages of a run's weights.  device: None = a CUDA
    device where there is one.  format: of the weights; None = by their names.

    Raises ConfigError, which names path or key and the remedy, for weights that cannot be read or do not fit.
    """
    check_once(overrides)
    config, weights = resolved(home_expanded("path", str(path)), prepared(overrides), format)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedModel(config, weights, torch.device(device), ema, format)


def resolved(given: str, overrides: Sequence[str], format: str | None = None) -> tuple[Config, str]:
    """The configuration of a model, and its weights.  given: as load takes it; raises as it does."""
    weights = pinned(given)
    path = fetched(weights)
    run = next((folder for folder in (path, path.parent.parent) if (folder / "config.yaml").is_file()), None)
    if run is not None and HubAddress.of(weights) is None:  # beside what a hub has sent lies nothing of ours
        return load_run_config(run, overrides), str(find_checkpoint(path))
    keys = {override.partition("=")[0] for override in overrides}
    found = implied(read_weights(weights, format), path)
    of_clips = ("model.frames", "model.window_frames") if "model.patch_frames" in found else ()
    for key in ("model.window_size", "model.img_size", *of_clips):
        if key not in {*found, *keys}:
            raise ConfigError(f"{weights} does not say its {key}, which shapes do not show; give it: '{key}=NUMBER'")
    words = arguments({key: value for key, value in found.items() if key not in keys})
    defaults = [word for word in _DEFAULTS if word.partition("=")[0] not in keys]
    if any(word.startswith("task=") and word != "task=classify" for word in overrides):
        defaults, words = defaults[:1], [word for word in words if not word.startswith("task.num_classes=")]
    return compose_overrides([*defaults, *words, *overrides], ("run_dir", "data.shards")), weights
