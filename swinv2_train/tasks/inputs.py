"""From pixels to what a model takes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import DataConfig
from swinv2_train.data.sample import Targets
from swinv2_train.data.transforms.crop import eval_crop, random_flip, random_resized_crop


@dataclass(frozen=True)
class ImageTransform:
    """A crop of the image, random for training: {"images": uint8 (3, H, W)}.  A task's own adds its targets.

    An evaluation may replace data (another crop) and needs (() where a file has the targets).
    """

    data: DataConfig
    img_size: tuple[int, int]
    train: bool
    needs: tuple[str, ...] = ()
    """Names of the targets without which a sample is damaged (data/sample.py)."""

    def __call__(self, image: Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        data = self.data
        if not self.train:
            return {"images": eval_crop(image, self.img_size, data)}
        image = random_resized_crop(image, self.img_size, data.crop_scale, data.crop_ratio, data.interpolation, rng)
        return {"images": random_flip(image, data.hflip, rng)}


def meta_images(size: int, img_size: tuple[int, int]) -> dict[str, Tensor]:
    """What every batch holds of `size` images, without contents, on the meta device."""
    return {
        "images": torch.empty(size, 3, *img_size, dtype=torch.uint8, device="meta"),
        "weight": torch.empty(size, device="meta"),
    }


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
