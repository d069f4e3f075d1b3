"""What the mask of a box should be: the object's pixels, eight of which are kept in a byte, at 28 x 28 places."""

from __future__ import annotations

import torch
from torch import Tensor

from swinv2_train.models.detection.pool import aligned

CHUNK = 8
"""Objects whose pixels are floats at a time: 1536 x 1536 px of 100 objects would be 940 MB."""


def unpacked(packed: Tensor, width: int) -> Tensor:
    """Packed rows (..., H, ceil(width / 8)) uint8, the leftmost pixel in the highest bit: (..., H, width), 0 or 1."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :width]


def mask_targets(packed: Tensor, width: int, boxes: Tensor, place: Tensor, side: int) -> Tensor:
    """The mask of the object at `place` within each box, 1 where at least half of a bin is the object's.

    packed (B, M, H, ceil(width / 8)), boxes (B, N, 4), place (B, N): (B, N, side, side) float32.
    """
    rows = []
    for each, mine, at in zip(packed, boxes, place, strict=True):
        total = boxes.new_zeros(len(mine), side, side)
        for first in range(0, len(each), CHUNK):
            pixels = unpacked(each[first : first + CHUNK], width).to(boxes.dtype)  # (CHUNK, H, W)
            within = (at - first).clamp(0, len(pixels) - 1)
            of_chunk = torch.where((at - first == within).unsqueeze(-1), mine, 0.0)  # others have no area and give 0
            total = total + aligned(pixels.unsqueeze(1), of_chunk, within, 1.0, side).squeeze(1)
        rows.append(total)
    return (torch.stack(rows) >= 0.5).to(boxes.dtype)
