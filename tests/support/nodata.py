"""SimMIM's loss of images with no data, worked out value by value."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def simmim_loss_by_hand(module: nn.Module, images: Tensor, mask: Tensor, weight: Tensor) -> float:
    """The mean error over hidden values that were measured, of images that count.

    images: (B, C, H, W), normalised, NaN where nothing was measured; mask: (B, H/4, W/4) bool; weight: (B,), 0 or 1.
    """
    measured = ~images.isnan()
    filled = torch.where(measured, images, 0.0)
    prediction = module(filled, mask)["reconstruction"]
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    counts = hidden & measured & (weight > 0).view(-1, 1, 1, 1)
    return float((prediction - filled).abs()[counts].double().mean())
