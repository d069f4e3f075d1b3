"""Arrays ready to be written as PNG: rows of small images (the task's reconstructions), and a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swinv2_train.metrics import Confusion

_GAP_PX = 4
_LABEL_PX = 16
_MIN_SIDE_PX = 96


def grid(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = ()) -> np.ndarray:
    """One picture with a row per sequence, white gaps between the images and, optionally, a label over each column.

    rows: images uint8 (H, W, 3), all of one size, the same number in each row.  Images under 96 px are enlarged by a
    whole factor (nearest neighbour), so that a 32 px image can be looked at.  Returns uint8 (H', W', 3); raises
    ValueError for images or labels that do not form a grid.
    """
    if not rows or not rows[0]:
        raise ValueError("a picture needs at least one image")
    num_columns, shape = len(rows[0]), rows[0][0].shape
    for row in rows:
        if len(row) != num_columns or any(image.shape != shape or image.dtype != np.uint8 for image in row):
            raise ValueError(f"every row needs {num_columns} uint8 images of shape {shape}")
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"images have shape {shape}, expected (H, W, 3)")
    if labels and len(labels) != num_columns:
        raise ValueError(f"{len(labels)} labels for {num_columns} columns")

    factor = max(1, -(-_MIN_SIDE_PX // min(shape[0], shape[1])))
    height, width = shape[0] * factor, shape[1] * factor
    top = _LABEL_PX if labels else 0
    canvas = np.full(
        (top + len(rows) * (height + _GAP_PX) - _GAP_PX, num_columns * (width + _GAP_PX) - _GAP_PX, 3), 255, np.uint8
    )
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            y, x = top + r * (height + _GAP_PX), c * (width + _GAP_PX)
            canvas[y : y + height, x : x + width] = image.repeat(factor, axis=0).repeat(factor, axis=1)
    return _write_labels(canvas, labels, width + _GAP_PX) if labels else canvas


def _write_labels(canvas: np.ndarray, labels: Sequence[str], column_px: int) -> np.ndarray:
    from PIL import Image, ImageDraw  # here: only a picture needs it, not the start of a run

    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for column, label in enumerate(labels):
        draw.text((column * column_px + 2, 2), label, fill=(60, 60, 60))
    return np.asarray(image)


_NUMBERED_CLASSES = 25
_MAP_PX = 1000
_MARGIN_PX = 44
_GREY, _DARK, _TEXT = (200, 200, 200), (16, 56, 128), (60, 60, 60)


def confusion_map(confusion: Confusion) -> np.ndarray:
    """A confusion matrix to look at: a row per right class, a column per predicted one, in percent of the row's images.

    The shade goes with the square root of the share, so that an error of 1 % is seen; a class without images is grey.
    Up to 25 classes each cell has its number; up to 1000 each class has its row; beyond, each row and column is a range
    of classes, so that no picture or array grows with their square.  Returns uint8 (H, W, 3).
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
        (2, 2), f"rows: right class, columns: predicted; % of the row.  {images} images, {right} right", fill=_TEXT
    )
    for label in _ticks(classes):
        place = _MARGIN_PX + cell * (label * bins // classes + 0.5)
        centred(place, _MARGIN_PX - 12, str(label))
        centred(_MARGIN_PX / 2, place, str(label))
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
