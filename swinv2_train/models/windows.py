"""How a map of any size is cut into windows: clamping, shift, padding, masks and relative positions.

Legend: B batch, H W tokens per side, C channels, nW windows per image, N tokens per window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.cache import cached_table

MASKED_LOGIT = -100.0  # the official additive mask between regions that the cyclic shift brought together
PADDING = -1  # the region of padded tokens


class WindowGrid(NamedTuple):
    """The windows over one map; every entry is (rows, cols) in tokens.

    size: the map.  window: the window really used, not larger than the map.  shift: 0 where windows stay in place.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """The map after padding at the bottom and the right to whole windows."""
        rows, cols = (math.ceil(n / w) * w for n, w in zip(self.size, self.window, strict=True))
        return rows, cols

    @property
    def needs_mask(self) -> bool:
        return self.shift != (0, 0) or self.padded != self.size


def window_grid(
    size: tuple[int, int], window_size: tuple[int, int], shifted: bool, clamp_to_shorter_side: bool = False
) -> WindowGrid:
    """The windows that a block with this window_size lays over a map of this size.

    Per axis: a window larger than the map is clamped to it, and the shift of half a window is dropped where the map is
    not larger than the window.  clamp_to_shorter_side: the official code's rule, which looks at the shorter side alone
    (on square maps that is the same): where that side is not larger than the window, the windows of both axes are
    clamped to it and neither is shifted.
    """
    limit = (min(size), min(size)) if clamp_to_shorter_side else size
    rows, cols = (min(w, n) for w, n in zip(window_size, limit, strict=True))
    shift = (rows // 2 if shifted and limit[0] > rows else 0, cols // 2 if shifted and limit[1] > cols else 0)
    return WindowGrid(size, (rows, cols), shift)


def partition_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B*nW, N, C); H and W are multiples of the window."""
    batch, height, width, channels = x.shape
    rows, cols = window
    x = x.view(batch, height // rows, rows, width // cols, cols, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * cols, channels)


def merge_windows(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(B*nW, N, C) -> (B, H, W, C): the inverse of :func:`partition_windows`."""
    rows, cols = window
    height, width = size
    channels = windows.shape[-1]
    x = windows.view(-1, height // rows, width // cols, rows, cols, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def cut_windows(x: Tensor, grid: WindowGrid) -> Tensor:
    """Pad, shift, partition: (B, H, W, C) -> (B*nW, N, C).  Padding comes before the shift, as the mask expects."""
    if grid.padded != grid.size:
        x = F.pad(x, (0, 0, 0, grid.padded[1] - grid.size[1], 0, grid.padded[0] - grid.size[0]))
    if grid.shift != (0, 0):
        x = torch.roll(x, shifts=(-grid.shift[0], -grid.shift[1]), dims=(1, 2))
    return partition_windows(x, grid.window)


def join_windows(windows: Tensor, grid: WindowGrid) -> Tensor:
    """(B*nW, N, C) -> (B, H, W, C): the inverse of :func:`cut_windows`."""
    x = merge_windows(windows, grid.window, grid.padded)
    if grid.shift != (0, 0):
        x = torch.roll(x, shifts=grid.shift, dims=(1, 2))
    return x if grid.padded == grid.size else x[:, : grid.size[0], : grid.size[1]]


@cached_table
def window_tokens(grid: WindowGrid, device: torch.device) -> Tensor:
    """Row in the flattened map of every token of the windows that :func:`cut_windows` gives: (nW, N) int64, -1 for
    padding."""
    height, width = grid.size
    places = torch.arange(1, height * width + 1, device=device).view(1, height, width, 1)
    return cut_windows(places, grid)[..., 0] - 1


@cached_table
def window_regions(grid: WindowGrid, device: torch.device) -> Tensor:
    """Which tokens of a window belong together: (nW, N) int8, one number for each of the up to four regions that the
    cyclic shift brought together, PADDING for padding."""
    wrapped, real = [], []  # per axis, of the shifted map
    for length, padded, shift in zip(grid.size, grid.padded, grid.shift, strict=True):
        place = torch.arange(padded, device=device)
        wrapped.append((place >= padded - shift).to(torch.int8))  # cuts the last window alone in two
        real.append((place < length).roll(-shift))
    regions = wrapped[0][:, None] * 2 + wrapped[1][None, :]  # (H, W)
    regions = regions.masked_fill(~(real[0][:, None] & real[1][None, :]), PADDING)
    return partition_windows(regions[None, :, :, None], grid.window)[..., 0]


def region_mask(regions: Tensor) -> Tensor:
    """Additive mask (n, N queries, N keys) float32 of n windows whose tokens are in these regions (n, N).

    -100 between regions (official), -inf for padded keys, so that padding gets no weight at all.  No row is -inf
    throughout, because every window holds a token of the map: less than a window is padded, so a window in place begins
    inside the map, and so does a shifted one, except the last of an axis, which ends with the first rows (columns) of
    the map.
    """
    apart = regions[:, None, :] != regions[:, :, None]  # (n, N, N)
    mask = torch.zeros(apart.shape, dtype=torch.float32, device=regions.device).masked_fill_(apart, MASKED_LOGIT)
    return mask.masked_fill_((regions == PADDING)[:, None, :], -math.inf)


@cached_table
def attention_mask(grid: WindowGrid, device: torch.device) -> Tensor:
    """The additive mask (nW, N, N) of all windows that :func:`cut_windows` gives; see :func:`region_mask`."""
    return region_mask(window_regions(grid, device))


@cached_table
def relative_position_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (N, N) int64."""
    rows, cols = window
    row = torch.arange(rows, device=device).repeat_interleave(cols)  # (N,)
    col = torch.arange(cols, device=device).repeat(rows)
    d_row = row[:, None] - row[None, :] + rows - 1  # (N, N), from 0
    d_col = col[:, None] - col[None, :] + cols - 1
    return d_row * (2 * cols - 1) + d_col


@cached_table
def log_spaced_coordinates(
    window: tuple[int, int], pretrained: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Relative coordinates of the bias table of a window (h, w): ((2h-1)(2w-1), 2).

    Offsets are divided by the largest offset of the window at which the bias was trained, times 8, then
    sign(x) log2(1+|x|) / log2(8): the official form of arXiv:2111.09883 equation 4.
    """
    axes = []
    for size, trained in zip(window, pretrained, strict=True):
        largest = max(trained - 1, 1)  # a window of one token has the offset 0 alone
        offsets = torch.arange(1 - size, size, dtype=dtype, device=device) / largest * 8
        axes.append(torch.sign(offsets) * torch.log2(offsets.abs() + 1) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)
