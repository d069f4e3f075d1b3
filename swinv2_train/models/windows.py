"""How a map of any size is cut into windows: clamping, shift, padding, masks and relative positions.

A map has the axes (height, width), that of a clip (time, height, width); windows, shifts and offsets have the same.

Legend: B batch, ... the map's axes, C channels, nW windows per map, N tokens per window.
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
END_OF_CLIP = 4  # regions from here on are of frames that the shift has brought from a clip's other end
Axes = tuple[int, ...]  # a number for every axis of a map


class WindowGrid(NamedTuple):
    """The windows over one map; every entry is (rows, cols) in tokens, of a clip (frames, rows, cols).

    size: the map.  window: the window really used, not larger than the map.  shift: 0 where windows stay in place.
    """

    size: Axes
    window: Axes
    shift: Axes

    @property
    def padded(self) -> Axes:
        """The map after padding at the end of every axis to whole windows."""
        return tuple(math.ceil(n / w) * w for n, w in zip(self.size, self.window, strict=True))

    @property
    def shifted(self) -> bool:
        return any(self.shift)

    @property
    def needs_mask(self) -> bool:
        return self.shifted or self.padded != self.size


def window_grid(size: Axes, window_size: Axes, shifted: bool, clamp_to_shorter_side: bool = False) -> WindowGrid:
    """The windows that a block with this window_size lays over a map of this size.

    Per axis: a window larger than the map is clamped to it, and the shift of half a window is dropped where the map is
    not larger than the window.  clamp_to_shorter_side: the official code's rule, which looks at the shorter side alone
    (on square maps that is the same): where that side is not larger than the window, the windows of both sides are
    clamped to it and neither is shifted; time keeps to itself.
    """
    side = min(size[-2:])
    limit = (*size[:-2], side, side) if clamp_to_shorter_side else size
    window = tuple(min(w, n) for w, n in zip(window_size, limit, strict=True))
    shift = tuple(w // 2 if shifted and n > w else 0 for w, n in zip(window, limit, strict=True))
    return WindowGrid(size, window, shift)


def partition_windows(x: Tensor, window: Axes) -> Tensor:
    """(B, ..., C) -> (B*nW, N, C); every axis is a multiple of the window's."""
    cut = [length for n, w in zip(x.shape[1:-1], window, strict=True) for length in (n // w, w)]
    return _windows_first(x.view(x.shape[0], *cut, x.shape[-1])).reshape(-1, math.prod(window), x.shape[-1])


def merge_windows(windows: Tensor, window: Axes, size: Axes) -> Tensor:
    """(B*nW, N, C) -> (B, ..., C): the inverse of :func:`partition_windows`."""
    counts, axes = [n // w for n, w in zip(size, window, strict=True)], len(size)
    x = windows.view(-1, *counts, *window, windows.shape[-1])
    interleaved = [1 + axis + part for axis in range(axes) for part in (0, axes)]
    return x.permute(0, *interleaved, x.ndim - 1).reshape(-1, *size, x.shape[-1])


def _windows_first(x: Tensor) -> Tensor:
    """(B, windows of axis 1, its tokens, windows of axis 2, ..., C) -> (B, all windows, all tokens, C) as a view."""
    return x.permute(0, *range(1, x.ndim - 1, 2), *range(2, x.ndim - 1, 2), x.ndim - 1)


def cut_windows(x: Tensor, grid: WindowGrid) -> Tensor:
    """Pad, shift, partition: (B, ..., C) -> (B*nW, N, C).  Padding comes before the shift, as the mask expects."""
    if grid.padded != grid.size:
        missing = [p - n for p, n in zip(reversed(grid.padded), reversed(grid.size), strict=True)]
        x = F.pad(x, (0, 0, *(length for end in missing for length in (0, end))))
    if grid.shifted:
        x = torch.roll(x, shifts=tuple(-shift for shift in grid.shift), dims=_axes_of(grid))
    return partition_windows(x, grid.window)


def join_windows(windows: Tensor, grid: WindowGrid) -> Tensor:
    """(B*nW, N, C) -> (B, ..., C): the inverse of :func:`cut_windows`."""
    x = merge_windows(windows, grid.window, grid.padded)
    if grid.shifted:
        x = torch.roll(x, shifts=grid.shift, dims=_axes_of(grid))
    return x if grid.padded == grid.size else x[(slice(None), *map(slice, grid.size))]


def _axes_of(grid: WindowGrid) -> Axes:
    return tuple(range(1, len(grid.size) + 1))


@cached_table
def window_tokens(grid: WindowGrid, device: torch.device) -> Tensor:
    """Row in the flattened map of every token of the windows that :func:`cut_windows` gives: (nW, N) int64, -1 for
    padding."""
    places = torch.arange(1, math.prod(grid.size) + 1, device=device).view(1, *grid.size, 1)
    return cut_windows(places, grid)[..., 0] - 1


@cached_table
def window_regions(grid: WindowGrid, device: torch.device) -> Tensor:
    """Which tokens of a window belong together: (nW, N) int8, one number for each of the up to four regions, of a clip
    eight, that the cyclic shift brought together, PADDING for padding."""
    regions = torch.zeros((), dtype=torch.int8, device=device)
    real = torch.ones((), dtype=torch.bool, device=device)
    for length, padded, shift in zip(grid.size, grid.padded, grid.shift, strict=True):  # of the shifted map
        place = torch.arange(padded, device=device)
        regions = regions[..., None] * 2 + (place >= padded - shift).to(torch.int8)  # cuts the last window alone in two
        real = real[..., None] & (place < length).roll(-shift)
    regions = regions.masked_fill(~real, PADDING)
    return partition_windows(regions[None, ..., None], grid.window)[..., 0]


def region_mask(regions: Tensor, axes: int) -> Tensor:
    """Additive mask (n, N queries, N keys) float32 of n windows whose tokens are in these regions (n, N).

    axes: of the map.  -100 between regions (official), -inf for padded keys, so that padding gets no weight at all, and
    -inf between the two ends of a clip: what leaks through -100 would be there once a frame, and a clip of one repeated
    frame no longer exactly that image.  No row is -inf
    throughout, because every window holds a token of the map: less than a window is padded, so a window in place begins
    inside the map, and so does a shifted one, except the last of an axis, which ends with the first tokens of that
    axis.
    """
    apart = regions[:, None, :] != regions[:, :, None]  # (n, N, N)
    mask = torch.zeros(apart.shape, dtype=torch.float32, device=regions.device).masked_fill_(apart, MASKED_LOGIT)
    mask.masked_fill_((regions == PADDING)[:, None, :], -math.inf)
    if axes > 2:
        end = regions >= END_OF_CLIP
        mask.masked_fill_((end[:, None, :] != end[:, :, None]) & (regions != PADDING)[:, :, None], -math.inf)
    return mask


@cached_table
def attention_mask(grid: WindowGrid, device: torch.device) -> Tensor:
    """The additive mask (nW, N, N) of all windows that :func:`cut_windows` gives; see :func:`region_mask`."""
    return region_mask(window_regions(grid, device), len(grid.size))


def num_offsets(window: Axes) -> int:
    """Rows of the bias table of a window: how many offsets its tokens have from each other."""
    return math.prod(2 * length - 1 for length in window)


@cached_table
def relative_position_index(window: Axes, device: torch.device) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (N, N) int64; the last axis varies fastest."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    place = torch.arange(math.prod(window), device=device)
    for axis, length in enumerate(window):
        at = place // math.prod(window[axis + 1 :]) % length  # (N,)
        index = index * (2 * length - 1) + at[:, None] - at[None, :] + length - 1  # offsets from 0
    return index


@cached_table
def log_spaced_coordinates(window: Axes, pretrained: Axes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Relative coordinates of the bias table of a window (h, w): ((2h-1)(2w-1), 2); of a clip's (t, h, w):
    ((2t-1)(2h-1)(2w-1), 3), the columns being height, width and time, so that the first two mean what an image's do.

    Offsets are divided by the largest offset of the window at which the bias was trained, times 8, then
    sign(x) log2(1+|x|) / log2(8): the official form of arXiv:2111.09883 equation 4.
    """
    axes = []
    for size, trained in zip(window, pretrained, strict=True):
        largest = max(trained - 1, 1)  # a window of one token has the offset 0 alone
        offsets = torch.arange(1 - size, size, dtype=dtype, device=device) / largest * 8
        axes.append(torch.sign(offsets) * torch.log2(offsets.abs() + 1) / math.log2(8))
    mesh = torch.meshgrid(*axes, indexing="ij")
    return torch.stack((*mesh[-2:], *mesh[:-2]), dim=-1).reshape(-1, len(axes))
