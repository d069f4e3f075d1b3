"""From pixels to what a model takes, and back."""

from __future__ import annotations

import torch
from torch import Tensor


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
