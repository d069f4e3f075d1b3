"""The class of every pixel of an image of any size, from scores of tiles, without all scores in memory at once.

A view of an image is it in one size, mirrored or not; a tile is a part of a view that the model sees in one forward
pass.  The model's scores, a fraction of the pixels, are kept; those of the pixels are made a band of rows at a time.

Legend: K classes, H W pixels of the image, h w pixels of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_BYTES = 64 * 2**20
"""What the scores of a band of rows may take, at four bytes each."""


@dataclass(frozen=True)
class Box:
    """A part of a view, in pixels: its first row and column, and those behind its last."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


def tiles(size: tuple[int, int], tile: tuple[int, int] | None, stride: tuple[int, int]) -> list[Box]:
    """The tiles of a view of this size, row by row; the last of each row and column lies inside of it.

    tile: their size; None = one tile is all.  Source: mmsegmentation's slide_inference.
    """
    if tile is None:
        return [Box(0, 0, *size)]
    sides: list[list[tuple[int, int]]] = []
    for length, part, step in zip(size, tile, stride, strict=True):
        count = max(length - part + step - 1, 0) // step + 1
        ends = [min(number * step + part, length) for number in range(count)]
        sides.append([(max(end - part, 0), end) for end in ends])
    return [Box(top, left, bottom, right) for top, bottom in sides[0] for left, right in sides[1]]


class View:
    """The scores of one view: those of its tiles, averaged where they overlap.

    mirrored: the model saw the view from the other side; its scores are turned back here.
    """

    def __init__(self, size: tuple[int, int], boxes: Sequence[Box], scores: Sequence[Tensor], mirrored: bool) -> None:
        """boxes: of the view as the model saw it; scores: (K, h', w') of each, resized to it bilinearly."""
        self.size = size
        self._tiles = list(zip(boxes, scores, strict=True))
        if mirrored:
            width = size[1]
            self._tiles = [
                (Box(box.top, width - box.right, box.bottom, width - box.left), scores.flip(2))
                for box, scores in self._tiles
            ]

    def rows(self, first: int, end: int) -> Tensor:
        """Scores of the view's pixels in these rows: (K, end - first, w)."""
        inside = [(box, scores) for box, scores in self._tiles if box.top < end and box.bottom > first]
        if len(inside) == 1 and inside[0][0].size[1] == self.size[1]:
            box, scores = inside[0]
            return _resized_rows(_rows_of(scores), _shape(scores), box.size, first - box.top, end - box.top)
        scores = inside[0][1]
        total = scores.new_zeros(scores.shape[0], end - first, self.size[1])
        times = scores.new_zeros(end - first, self.size[1])
        for box, scores in inside:
            top, bottom = max(first, box.top), min(end, box.bottom)
            part = _resized_rows(_rows_of(scores), _shape(scores), box.size, top - box.top, bottom - box.top)
            total[:, top - first : bottom - first, box.left : box.right] += part
            times[top - first : bottom - first, box.left : box.right] += 1
        return total / times


def bands(views: Sequence[View], size: tuple[int, int], band_bytes: int = BAND_BYTES) -> Iterator[tuple[int, Tensor]]:
    """The first row of each band of an image of this size, and its pixels' probabilities, (K, rows, W) float32.

    Of several views it is the mean of their probabilities.  Which rows are in a band changes no value.
    """
    height, width = size
    classes = views[0].rows(0, 1).shape[0]
    widest = max(width, *(view.size[1] for view in views))
    rows = max(1, band_bytes // (4 * classes * widest))
    for first in range(0, height, rows):
        end = min(first + rows, height)
        probabilities: Tensor | None = None
        for view in views:
            each = _resized_rows(view.rows, view.size, size, first, end).softmax(dim=0)
            probabilities = each if probabilities is None else probabilities.add_(each)
        assert probabilities is not None, "an image has a view"
        yield first, probabilities.div_(len(views)) if len(views) > 1 else probabilities


def _shape(scores: Tensor) -> tuple[int, int]:
    return scores.shape[1], scores.shape[2]


def _rows_of(scores: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, end: scores[:, first:end]


def _resized_rows(
    rows: Callable[[int, int], Tensor], old: tuple[int, int], new: tuple[int, int], first: int, end: int
) -> Tensor:
    """The rows from first to end - 1 of a map that is resized from old to new, bilinearly (align_corners False).

    rows: gives any rows of the map, (K, n, old width).  Returns (K, end - first, new width).
    """
    if old[0] == new[0]:
        found = rows(first, end)
    else:
        at = ((torch.arange(first, end, dtype=torch.float64) + 0.5) * (old[0] / new[0]) - 0.5).clamp(min=0)
        upper = at.floor().long().clamp(max=old[0] - 1)
        lower = (upper + 1).clamp(max=old[0] - 1)
        start = int(upper[0])
        needed = rows(start, int(lower[-1]) + 1)
        share = (at - upper).to(needed.device, needed.dtype).view(1, -1, 1)
        upper, lower = ((places - start).to(needed.device) for places in (upper, lower))
        found = torch.lerp(needed.index_select(1, upper), needed.index_select(1, lower), share)
    if old[1] == new[1]:
        return found
    return F.interpolate(found[None], (found.shape[1], new[1]), mode="bilinear", align_corners=False)[0]
