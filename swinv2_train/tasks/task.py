"""The protocol of a task: the module that is trained, and what a batch of its samples means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from swinv2_train.config import Config
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.models import SwinTransformerV2
from swinv2_train.tasks.answers import Answer, Ask, Columns, Evidence
from swinv2_train.tasks.inputs import ImageTransform, Normalise
from swinv2_train.tasks.metrics import Metric

Batch = dict[str, Any]
"""What the loaders make of the transform's rows: tensors (B, ...), and "weight" (B,), 0 for an image that stands in."""
Forward = Callable[..., Any]
"""An engine's forward or evaluate: keyword tensors in, the module's outputs out."""
Picture = Callable[[Forward, Batch, Sequence[str] | None], np.ndarray]
"""Something to look at, uint8 (H, W, 3), from a few images of a batch and the names of the model's classes (None where
these have numbers alone).
"""

EvidenceOf = Callable[[Any, int | None, Callable[[int], str]], list[Evidence]]
"""What to explain of one image: from the module's outputs (of one image alone), the number of a class or of a value
(None = what the model itself says, the first first) and what classes are called.  ConfigError for scores that are no
numbers.
"""


class Predictions(NamedTuple):
    """For a task that names one class for each image, whose right class may come from a file too."""

    num_classes: int
    score: Callable[[Forward, Batch], tuple[Mapping[str, Metric], Tensor]]
    """The scores, and the class that is named for each image, (B,) int64.

    batch["labels"]: (B,), or (B, L) where an image has up to L right classes, filled up with -1.
    """
    probabilities: Callable[[Forward, Batch], Tensor]
    """Of each class, (B, num_classes) float32; labels are not needed."""


class Task(Protocol):
    """The module that is trained, and what a batch of its samples means.

    What is asked before there is a module is asked of the class.  `task` is the section of the task's own class.
    """

    def __init__(self, config: Config, task: Any, device: torch.device) -> None: ...

    @staticmethod
    def preflight(task: Any) -> None:
        """Raises ConfigError for what the task needs on this machine and does not find."""

    @staticmethod
    def check_source(task: Any, source: Source, key: str) -> None:
        """Raises ConfigError for images, named by this key, whose targets are not the task's.

        Labels are those of the model's classes already (data/sources/matched.py).
        """

    @staticmethod
    def answer_columns(task: Any, top_k: int) -> Columns | None:
        """What the rows of answers hold; None of a task that answers nothing.

        top_k: of a classifier, classes at most.
        """

    @property
    def module(self) -> nn.Module: ...

    @property
    def encoder(self) -> SwinTransformerV2:
        """The module itself, or its child of this name beside what the task adds, which is named head or decoder.

        By these names parameter groups know the layers, and weights of other tasks are told from the task's own.
        """

    @property
    def normalise(self) -> Normalise:
        """From the pixels of a batch to what the encoder takes."""

    @property
    def block_types(self) -> tuple[type[nn.Module], ...]:
        """The blocks of which the module is mostly made: what is recomputed, compiled and gathered as one."""

    @property
    def train_transform(self) -> ImageTransform: ...

    @property
    def eval_transform(self) -> ImageTransform: ...

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one image's forward pass."""

    @property
    def predictions(self) -> Predictions | None: ...

    @property
    def picture(self) -> Picture | None:
        """Of eval_transform's batches; where that needs no targets, the picture is of the images alone."""

    @property
    def evidence(self) -> EvidenceOf | str:
        """What Grad-CAM explains; or why there is nothing, in one line."""

    def meta_batch(self, size: int) -> dict[str, Tensor]:
        """A training batch of `size` images without contents, on the meta device."""

    def begin(self, source: Source | Stream, names: tuple[str, ...] | None) -> None:
        """Take from the training images, and the names of their classes, what the loss depends on.

        Called once on every rank before training.  Raises ConfigError.
        """

    def notes(self, source: Source | Stream) -> Iterable[str]:
        """What a user should know of the training images at the start."""

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The loss of a training batch, () float32: the mean over its images, weighted by batch["weight"].

        Of several sources batch["sources"] holds the number of each image's, (B,) int64; then batch["image_losses"] is
        to become (each image's own loss, what it counts), both (B,) and without gradients: so each source's is logged.
        """

    def count(self, batch: Batch) -> float:
        """What the loss of a training batch is the mean over: its images or hidden pixels, weighted by batch["weight"].

        A batch that counts 0 has a loss of 0.
        """

    def scores(self, forward: Forward, batch: Batch) -> Mapping[str, Metric]:
        """Metrics of an evaluation batch, by name (val/loss, ...); the same names in every batch."""

    def answers(self, forward: Forward, batch: Batch, ask: Ask) -> Sequence[Answer | None]:
        """Of the images of a batch of eval_transform's rows, which need no targets (needs=()), each alone.

        None, perhaps, where batch["weight"] is 0.  Ranks need not see equally many.  Raises ConfigError where scores
        are no numbers.
        """

    def overlay(self, batch: Batch, number: int, answer: Any, names: Sequence[str] | None) -> np.ndarray | None:
        """An answer over its image, uint8 (H, W, 3), by the number of it in a batch; None where there is no such thing.

        names: of the classes; None = their numbers.
        """

    def features(self, forward: Forward, batch: Batch) -> Tensor:
        """The encoder's mean-pooled, normed last map of a batch's whole images, (B, 8C) with four stages, float32."""
