"""What a model is trained to do: a batch in, a loss, scores and pictures out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from swinv2_train.data.loading.loader import Transform
from swinv2_train.models import SimMIM, SwinTransformerV2

Forward = Callable[..., Any]
"""An engine's forward or evaluate: keyword tensors in, the module's outputs out."""


class Task(Protocol):
    """The module that is trained, and what a batch of its samples means."""

    @property
    def module(self) -> SwinTransformerV2 | SimMIM: ...

    @property
    def block_types(self) -> tuple[type[nn.Module], ...]:
        """The blocks of which the module is mostly made: what is recomputed, compiled and gathered as one."""
        ...

    @property
    def train_transform(self) -> Transform: ...

    @property
    def eval_transform(self) -> Transform: ...

    @property
    def multiply_adds(self) -> int:
        """Of one image's forward pass."""
        ...

    def loss(self, forward: Forward, batch: dict[str, Any]) -> Tensor:
        """The loss of a training batch, () float32: the mean over its images, weighted by batch["weight"]."""
        ...

    def count(self, batch: dict[str, Any]) -> float:
        """What the loss of a training batch is the mean over: its images or hidden pixels, weighted by batch["weight"].

        A batch that counts 0 has a loss of 0.
        """
        ...

    def scores(self, forward: Forward, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Weighted means over an evaluation batch, () each, by metric name (val/loss, ...)."""
        ...

    def features(self, forward: Forward, batch: dict[str, Any]) -> Tensor:
        """The encoder's mean-pooled, normed last map of a batch's whole images, (B, 8C) with four stages, float32."""
        ...

    @property
    def has_picture(self) -> bool: ...

    def picture(self, forward: Forward, batch: dict[str, Any]) -> np.ndarray:
        """Something to look at, uint8 (H, W, 3), from a few images of a batch; for tasks that have pictures."""
        ...
