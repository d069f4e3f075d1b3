"""Images beside the right and the predicted classes of their pixels, and a legend of the colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from swinv2_train.report.pictures import grid

SIDE_PX = 256
COLUMNS = ("image", "right classes", "predicted classes")
_IGNORED = (255, 255, 255)
_TURN = 0.61803398875
"""Of the circle of hues from one class to the next: never near to the last ones (the golden ratio's)."""
_ROW_PX, _SWATCH_PX, _COLUMN_PX = 16, 12, 128
_MOST_NAMED = 48
_NAME_CHARACTERS = 17


def segment_picture(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    num_classes: int,
    ignore_index: int,
    names: Sequence[str] | None,
) -> np.ndarray:
    """rows: image uint8 (H, W, 3), right classes (h, w), predicted classes (h', w'), of any sizes but one shape.

    Each is shown within 256 x 256 pixels; ignored pixels are white.  names: of the classes; None = their numbers.
    Returns uint8 (H', W', 3).
    """
    colours = palette(num_classes)
    shown = []
    seen: set[int] = set()
    for image, right, said in rows:
        height, width = image.shape[:2]
        scale = SIDE_PX / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        maps = [_nearest(each.astype(np.int64), size) for each in (right, said)]
        seen.update(int(number) for each in maps for number in np.unique(each) if number != ignore_index)
        shown.append([_framed(each) for each in (_nearest(image, size), *(_coloured(m, colours) for m in maps))])
    picture = grid(shown, COLUMNS)
    return np.concatenate([picture, _legend(sorted(seen), colours, names, picture.shape[1])])


def overlay_picture(
    image: np.ndarray | None, labels: np.ndarray, ignore_index: int, names: Sequence[str] | None
) -> np.ndarray:
    """An image, the classes of its pixels, and these over it: for who is to see whether they fit.

    image: uint8 (H, W, 3); None where it cannot be shown.  labels: (h, w) classes, or ignore_index.  names: of the
    classes; None = their numbers.  Returns uint8 (H', W', 3).
    """
    seen = [int(number) for number in np.unique(labels) if number != ignore_index]
    count = max([-1, *seen]) + 1
    colours = palette(count)
    height, width = labels.shape if image is None else image.shape[:2]
    scale = SIDE_PX / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    shown = np.full((*size, 3), 255, np.uint8) if image is None else _nearest(image, size)
    coloured = _coloured(np.where(labels == ignore_index, count, labels), colours)
    coloured = _nearest(coloured, size)
    blended = ((shown.astype(np.uint16) + coloured) // 2).astype(np.uint8)
    picture = grid(
        [[_framed(each) for each in (shown, coloured, blended)]], ("image", "label image", "one over the other")
    )
    known = names if names is not None and len(names) >= count else None
    return np.concatenate([picture, _legend(seen, colours, known, picture.shape[1])])


def palette(num_classes: int) -> np.ndarray:
    """A colour of each class, uint8 (num_classes, 3), none of them white."""
    found = [
        colorsys.hsv_to_rgb(number * _TURN % 1, (0.9, 0.55)[number % 2], (0.95, 0.7, 0.45)[number % 3])
        for number in range(num_classes)
    ]
    return (255 * np.array(found)).round().astype(np.uint8).reshape(-1, 3)


def _coloured(classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    table = np.concatenate([colours, np.array([_IGNORED], np.uint8)])
    return table[np.minimum(classes, len(colours))]


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(values.shape[:2], size, strict=True)
    )
    return values[rows][:, columns]


def _framed(image: np.ndarray) -> np.ndarray:
    """At the top left of a white square."""
    square = np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)
    square[: image.shape[0], : image.shape[1]] = image
    return square


def _legend(classes: list[int], colours: np.ndarray, names: Sequence[str] | None, width: int) -> np.ndarray:
    """A swatch and a name for each of the classes."""
    from PIL import Image, ImageDraw

    columns = max(1, width // _COLUMN_PX)
    named = classes[:_MOST_NAMED]
    rows = -(-len(named) // columns) + (len(classes) > len(named))
    canvas = Image.new("RGB", (width, rows * _ROW_PX + 4), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for place, number in enumerate(named):
        x, y = place % columns * _COLUMN_PX, place // columns * _ROW_PX + 2
        colour = tuple(int(part) for part in colours[number])
        draw.rectangle((x + 2, y + 2, x + 2 + _SWATCH_PX, y + 2 + _SWATCH_PX), fill=colour)
        text = str(number) if names is None else names[number][:_NAME_CHARACTERS]
        draw.text((x + _SWATCH_PX + 8, y + 2), text, fill=(60, 60, 60))
    if len(classes) > len(named):
        draw.text((2, (rows - 1) * _ROW_PX + 4), f"and {len(classes) - len(named)} more classes", fill=(60, 60, 60))
    return np.asarray(canvas)
