"""What a model is trained to do: a batch in, a loss, scores and pictures out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import ClassifyConfig, Config, ConfigError, ModelConfig, SimMIMConfig, pair
from swinv2_train.data.loader import Transform
from swinv2_train.models import SimMIM, SwinTransformerV2, swin_v2

Forward = Callable[..., Any]
"""An engine's forward or evaluate: keyword tensors in, the module's outputs out."""


class Task(Protocol):
    """The module that is trained, and what a batch of its samples means."""

    @property
    def module(self) -> SwinTransformerV2 | SimMIM: ...

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


def build_task(config: Config, device: torch.device) -> Task:
    """The task that config.task names, its module freshly initialised on the CPU in float32.

    device: where batches are normalised.  Raises ConfigError when the sizes do not fit together.
    """
    from swinv2_train.tasks.classify import ClassifyTask
    from swinv2_train.tasks.simmim import SimMIMTask

    if isinstance(config.task, SimMIMConfig):
        return SimMIMTask(config, config.task, device)
    assert isinstance(config.task, ClassifyConfig), config.task
    return ClassifyTask(config, config.task, device)


def build_model(config: ModelConfig, num_classes: int) -> SwinTransformerV2:
    """The SwinV2 of the model section; a size that does not fit together is a ConfigError."""
    own = {key: getattr(config, key) for key in ("embed_dim", "depths", "num_heads", "extra_norm_period")}
    try:
        return swin_v2(
            config.name,
            img_size=pair("model.img_size", config.img_size),
            patch_size=config.patch_size,
            num_classes=num_classes,
            window_size=pair("model.window_size", config.window_size),
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path_rate,
            pretrained_window_sizes=config.pretrained_window_sizes,
            clamp_to_shorter_side=config.clamp_to_shorter_side,
            fused_attention=config.attention == "fused",
            sequential_stages=config.sequential_stages,
            attention_chunk_windows=config.attention_chunk_windows,
            attention_chunk_mib=config.attention_chunk_mib,
            **{key: value for key, value in own.items() if value is not None},
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


class Normalise:
    """uint8 pixels (B, 3, H, W) on any device to normalised float32 pixels on this one, and back for pictures."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.device, non_blocking=True).float() - self.mean) / self.std

    def pixels(self, normalised: Tensor) -> Tensor:
        """Normalised float32 (B, 3, H, W) back to uint8."""
        return (normalised * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)
