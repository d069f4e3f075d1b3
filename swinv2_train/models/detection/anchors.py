"""Anchors: the boxes from which a region proposal network starts (arXiv:1506.01497, section 3.1.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCALE = 8
"""Side of a square anchor in strides of its map."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width."""


def anchors(sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> list[Tensor]:
    """Those of each map: (h * w * 3, 4) float32, the anchors of a place together, places row by row.

    sizes: (h, w) of each map.  Around the corner of each cell, not rounded (mmdetection; torchvision rounds the sides).
    """
    found = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        side = float(SCALE * stride)
        halves = [(side / math.sqrt(ratio) / 2, side * math.sqrt(ratio) / 2) for ratio in RATIOS]
        shapes = torch.tensor([(-w, -h, w, h) for w, h in halves], device=device)  # (3, 4)
        y, x = (stride * torch.arange(side, device=device).float() for side in (height, width))
        y, x = y.view(-1, 1).expand(-1, width), x.view(1, -1).expand(height, -1)
        corners = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
        found.append((corners + shapes).view(-1, 4))
    return found
