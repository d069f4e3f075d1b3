"""The features of boxes: RoIAlign (arXiv:1703.06870, section 3) on the map that fits a box's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FINEST = 14
"""A box of this many strides of the first map is read from it; twice as large, from the second (56 px at stride 4)."""


def levels_of(boxes: Tensor, stride: int, count: int) -> Tensor:
    """Which of `count` maps each box is read from (arXiv:1612.03144, equation 1): (..., 4) -> (...) float32.

    stride: of the first map.  The same as equation 1 with 224 px at the third map, as mmdetection writes it.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1).sqrt()
    return torch.floor(torch.log2(sides / (FINEST * stride) + 1e-6)).clamp(0, count - 1)


def pooled(maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, side: int) -> Tensor:
    """maps (B, C, h_i, w_i), boxes (B, N, 4) in pixels: (B * N, C, side, side) float32.

    Sampling points as the size of a bin asks for, half-pixel centres.  On each map the boxes of the others have no
    area, which costs no sampling and gives 0: so shapes are constant and no device is waited for.
    """
    levels = levels_of(boxes, strides[0], len(maps))
    image = torch.arange(len(boxes), device=boxes.device).unsqueeze(1).expand(-1, boxes.shape[1])
    total: Tensor | None = None
    for level, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        own = torch.where((levels == level).unsqueeze(-1), boxes, 0.0)
        each = aligned(features, own.flatten(0, 1), image.flatten(), 1 / stride, side)
        total = each if total is None else total + each
    assert total is not None, "there is a map"
    return total


def aligned(features: Tensor, boxes: Tensor, image: Tensor, scale: float, side: int) -> Tensor:
    """Of one map alone: features (B, C, h, w), boxes (R, 4) of image (R,) each -> (R, C, side, side), boxes' dtype.

    scale: of the map, in its pixels by those of the boxes.
    """
    from torchvision.ops import roi_align  # here, because it imports torch's compiler

    rois = torch.cat([image.unsqueeze(1).to(boxes.dtype), boxes], dim=1)
    return roi_align(features.to(boxes.dtype), rois, (side, side), scale, sampling_ratio=0, aligned=True)
