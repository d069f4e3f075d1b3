"""Maps of another size, by products of matrices: bilinear resizing and averages over a grid.

torch's own kernels add up gradients atomically on CUDA, in another order each time; a product of matrices repeats
itself bit for bit.

Legend: B batch, C channels, H W pixels or tokens per side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swinv2_train.models.cache import cached_table


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinearly, as F.interpolate(x, size, mode="bilinear", align_corners=False): (B, C, h, w) -> (B, C, *size)."""
    return _both_sides(x, *(_bilinear(*sides, x.dtype, x.device) for sides in zip(x.shape[2:], size, strict=True)))


def grid_means(x: Tensor, side: int) -> Tensor:
    """Means over the cells of a grid, as F.adaptive_avg_pool2d(x, side): (B, C, H, W) -> (B, C, side, side)."""
    return _both_sides(x, *(_cells(length, side, x.dtype, x.device) for length in x.shape[2:]))


def _both_sides(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows: (H', H), columns: (W', W); (B, C, H, W) -> (B, C, H', W')."""
    if columns.shape[0] != columns.shape[1]:
        x = torch.matmul(x, columns.t())
    return torch.matmul(rows, x) if rows.shape[0] != rows.shape[1] else x


@cached_table
def _bilinear(length: int, wanted: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each of `wanted` places takes of `length` ones: (wanted, length); the identity where they are as many."""
    at = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * (length / wanted) - 0.5).clamp(min=0)
    first = at.floor().long().clamp(max=length - 1)
    second, share = (first + 1).clamp(max=length - 1), at - first
    weights = torch.zeros(wanted, length, dtype=torch.float64)
    weights.scatter_add_(1, first.unsqueeze(1), (1 - share).unsqueeze(1))
    weights.scatter_add_(1, second.unsqueeze(1), share.unsqueeze(1))
    return weights.to(device, dtype)


@cached_table
def _cells(length: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(cells, length): cell i is the mean from floor(i length / cells) to ceil((i + 1) length / cells)."""
    weights = torch.zeros(cells, length, dtype=torch.float64)
    for cell in range(cells):
        first, end = cell * length // cells, -(-(cell + 1) * length // cells)
        weights[cell, first:end] = 1 / (end - first)
    return weights.to(device, dtype)
