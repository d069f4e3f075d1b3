"""Which classes are taken for which: counted over all ranks, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from swinv2_train.evaluation.scoring import gather_rows
from swinv2_train.report.pictures import _DARK, _GAP_PX, _GREY, _TEXT


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for each: the pairs that occurred, sorted, each once.

    What is counted is images, or their pixels where unit says so.
    """

    num_classes: int
    true: np.ndarray
    """(pairs,) int64, the right class."""
    predicted: np.ndarray
    """(pairs,) int64, the class that was said."""
    count: np.ndarray
    """(pairs,) int64, images."""
    unit: str = "images"
    """images or pixels."""

    @classmethod
    def of_pixels(cls, matrix: torch.Tensor) -> Confusion:
        """matrix: int64 (classes, classes), pixels by right and predicted class."""
        counts = matrix.cpu().numpy()
        true, predicted = np.nonzero(counts)
        return cls(len(counts), true, predicted, counts[true, predicted], "pixels")

    def iou(self) -> np.ndarray:
        """Percent of what is of a class or was said to be that is both, (num_classes,) float64; nan without any."""
        right = self._per_class(np.where(self.true == self.predicted, self.count, 0))
        said = np.zeros(self.num_classes, np.int64)
        np.add.at(said, self.predicted, self.count)
        either = self.images() + said - right
        return np.divide(100.0 * right, either, out=np.full(self.num_classes, np.nan), where=either > 0)

    def images(self) -> np.ndarray:
        """Images of each class, (num_classes,) int64."""
        return self._per_class(self.count)

    def accuracy(self) -> np.ndarray:
        """Percent of each class's images that were said to be of it, (num_classes,) float64; nan without images."""
        right = self._per_class(np.where(self.true == self.predicted, self.count, 0))
        images = self.images()
        return np.divide(100.0 * right, images, out=np.full(self.num_classes, np.nan), where=images > 0)

    def _per_class(self, counts: np.ndarray) -> np.ndarray:
        totals = np.zeros(self.num_classes, np.int64)
        np.add.at(totals, self.true, counts)
        return totals


class ConfusionCounter:
    """Counts pairs of right and predicted class; memory and traffic grow with the images, not with classes squared."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._codes: list[torch.Tensor] = []  # true x num_classes + predicted, -1 for a row that does not count

    def add(self, true: torch.Tensor, predicted: torch.Tensor, weight: torch.Tensor) -> None:
        """All (B,), true and predicted int64, on any devices.  Rows of weight 0 do not count."""
        codes = true.to(predicted.device) * self.num_classes + predicted
        self._codes.append(codes.masked_fill(weight.to(predicted.device) == 0, -1))

    def read(self) -> Confusion:
        """The counts over all ranks, the same on each.  Two collectives."""
        mine = np.concatenate([np.zeros(0, np.int64), *(codes.cpu().numpy() for codes in self._codes)])
        pairs, counts = np.unique(mine[mine >= 0], return_counts=True)
        pairs, counts = gather_rows(torch.from_numpy(np.stack([pairs, counts], axis=1))).numpy().T
        merged, where = np.unique(pairs, return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, where, counts)
        return Confusion(self.num_classes, merged // self.num_classes, merged % self.num_classes, total)


_NUMBERED_CLASSES = 25


_NAME_CHARACTERS = 7


_MAP_PX = 1000


_MARGIN_PX = 44


def confusion_map(confusion: Confusion, names: Sequence[str] | None = None) -> np.ndarray:
    """A confusion matrix to look at: a row per right class, a column per predicted one, in percent of the row's images.

    The shade goes with the square root of the share, so that an error of 1 % is seen; a class without images is grey.
    Up to 25 classes each cell has its number, and each class, where it has one, the beginning of its name (names); up
    to 1000 each class has its row; beyond, each row and column is a range of classes, so that no picture or array grows
    with their square.  Returns uint8 (H, W, 3).
    """
    from PIL import Image, ImageDraw

    classes = confusion.num_classes
    shares = _row_shares(confusion, min(classes, _MAP_PX))
    bins = len(shares)
    cell = _MARGIN_PX if classes <= _NUMBERED_CLASSES else _MAP_PX // bins
    shade = np.sqrt(np.nan_to_num(shares))[..., None]
    colours = (255 * (1 - shade) + np.array(_DARK) * shade).round().astype(np.uint8)
    colours[np.isnan(shares)] = _GREY
    side = bins * cell
    canvas = Image.new("RGB", (max(side + _MARGIN_PX + _GAP_PX, 420), side + 3 * _MARGIN_PX), (255, 255, 255))
    canvas.paste(Image.fromarray(colours.repeat(cell, axis=0).repeat(cell, axis=1)), (_MARGIN_PX, _MARGIN_PX))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((_MARGIN_PX - 1, _MARGIN_PX - 1, _MARGIN_PX + side, _MARGIN_PX + side), outline=_GREY)

    def centred(x: float, y: float, text: str, colour: tuple[int, int, int] = _TEXT) -> None:
        left, top, right, bottom = draw.textbbox((0, 0), text)
        draw.text((x - (left + right) / 2, y - (top + bottom) / 2), text, fill=colour)

    images = int(confusion.count.sum())
    right = int(confusion.count[confusion.true == confusion.predicted].sum())
    draw.text(
        (2, 2),
        f"rows: right class, columns: predicted; % of the row.  {images} {confusion.unit}, {right} right",
        fill=_TEXT,
    )
    for label in _ticks(classes):
        place = _MARGIN_PX + cell * (label * bins // classes + 0.5)
        centred(place, _MARGIN_PX - 12, str(label))
        centred(_MARGIN_PX / 2, place, str(label))
        if names is not None and classes <= _NUMBERED_CLASSES:
            name = names[label][:_NAME_CHARACTERS].encode("ascii", "replace").decode()  # what every font has
            centred(place, _MARGIN_PX - 26, name)
            centred(_MARGIN_PX / 2, place + 13, name)
    if classes <= _NUMBERED_CLASSES:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                x, y = (_MARGIN_PX + cell * (place + 0.5) for place in (column, row))
                centred(x, y, f"{100 * share:.1f}", (255, 255, 255) if share > 0.25 else _TEXT)
    for number, percent in enumerate((0, 1, 5, 25, 50, 100)):
        x, y = _MARGIN_PX + 50 * number, side + _MARGIN_PX + 16
        weight = (percent / 100) ** 0.5
        colour = tuple(round(255 * (1 - weight) + dark * weight) for dark in _DARK)
        draw.rectangle((x, y, x + 49, y + 20), fill=colour, outline=_GREY)
        centred(x + 25, y + 32, f"{percent} %")
    return np.asarray(canvas)


def _row_shares(confusion: Confusion, bins: int) -> np.ndarray:
    """(bins, bins): how the images of a range of classes were spread over the ranges, 0..1; nan without images."""
    row, column = (which * bins // confusion.num_classes for which in (confusion.true, confusion.predicted))
    counts = np.zeros((bins, bins))
    np.add.at(counts, (row, column), confusion.count)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def _ticks(classes: int) -> range:
    """Which classes are written on the axes: all of a few, else at most 11 round ones."""
    if classes <= _NUMBERED_CLASSES:
        return range(classes)
    scale = 10 ** (len(str(classes)) - 2)
    return range(0, classes, next(step * scale for step in (1, 2, 5, 10) if classes <= 10 * step * scale))
