"""Boxes (x0, y0, x1, y1) in continuous pixels: their overlaps, and their differences as numbers to learn.

All in at least float32: bfloat16 would round a coordinate of 1,000 px to 4 px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_GROWTH = math.log(1000 / 16)
"""Of a box's logarithmic size by one decoding, in both directions (mmdetection; torchvision limits growth alone)."""
EPS = 1e-6
"""The least area or side that anything is divided by."""


def areas(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...)"""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersections(first: Tensor, second: Tensor) -> Tensor:
    """The areas that boxes share, of shapes (..., 4) that broadcast."""
    # number by number: operations on the last two axes of (N, M, 2) take several times as long
    x0, y0, x1, y1 = first.unbind(dim=-1)
    u0, v0, u1, v1 = second.unbind(dim=-1)
    width = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp(min=0)
    height = (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp(min=0)
    return width * height


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) that broadcast; 0 for boxes without area."""
    return over_union(intersections(first, second), first, second)


def over_union(shared: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """iou of boxes whose intersections are known."""
    return shared / (areas(first) + areas(second) - shared).clamp(min=EPS)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (arXiv:1902.09630, algorithm 1) of boxes (..., 4), pair by pair."""
    shared = intersections(first, second)
    union = (areas(first) + areas(second) - shared).clamp(min=EPS)
    low, high = torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])
    around = (high - low).prod(dim=-1).clamp(min=EPS)
    return shared / union - (around - union) / around


def clipped(boxes: Tensor, extent: Tensor) -> Tensor:
    """Boxes (B, N, 4), or (B, ..., 4), cut to images of extent (B, 2): rows and columns."""
    rows, columns = extent.to(boxes.dtype).view(-1, 2, *[1] * (boxes.ndim - 2)).unbind(dim=1)
    x0, y0, x1, y1 = boxes.unbind(dim=-1)

    def cut(values: Tensor, most: Tensor) -> Tensor:
        return torch.minimum(values.clamp(min=0), most)

    return torch.stack([cut(x0, columns), cut(y0, rows), cut(x1, columns), cut(y1, rows)], dim=-1)


def encode(boxes: Tensor, references: Tensor, stds: Sequence[float]) -> Tensor:
    """What moves each reference to its box (arXiv:1311.2524, equations 6 to 9), divided by stds: (..., 4)."""
    centres, sizes = _centres_and_sizes(boxes)
    from_centres, from_sizes = _centres_and_sizes(references)
    sizes, from_sizes = sizes.clamp(min=EPS), from_sizes.clamp(min=EPS)
    deltas = torch.cat([(centres - from_centres) / from_sizes, (sizes / from_sizes).log()], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode(deltas: Tensor, references: Tensor, stds: Sequence[float]) -> Tensor:
    """The boxes that deltas (..., 4), as encode makes them, make of references; not cut to any image."""
    centres, sizes = _centres_and_sizes(references)
    deltas = deltas * deltas.new_tensor(stds)
    centres = centres + deltas[..., :2] * sizes
    sizes = sizes * deltas[..., 2:].clamp(-MOST_GROWTH, MOST_GROWTH).exp()
    return torch.cat([centres - 0.5 * sizes, centres + 0.5 * sizes], dim=-1)


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return 0.5 * (low + high), high - low
