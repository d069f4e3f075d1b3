"""Arrays ready to be written as PNG: rows of small images (the task's reconstructions), and a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def captioned(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> np.ndarray:
    """One picture with a row of small images per entry, below a line of text that says what they are.

    rows: text and images uint8 (H, W, 3), as of grid.  Returns uint8 (H', W', 3); raises ValueError as grid does.
    """
    if not rows:
        raise ValueError("a picture needs at least one row")
    columns = len(rows[0][1])
    parts = []
    for text, images in rows:
        if len(images) != columns:
            raise ValueError(f"{len(images)} images in a row of {columns}")
        row = grid([images])
        line = np.full((_LABEL_PX, row.shape[1], 3), 255, np.uint8)
        parts += [_write_labels(line, [text], row.shape[1]), row]
    return np.concatenate(parts)


def stretch_limits(image: np.ndarray, bands: Sequence[int]) -> np.ndarray:
    """The 2nd and 98th percentile of bands of an image (C, H, W), NaN where nothing was measured: (bands, 2)."""
    limits = np.zeros((len(bands), 2))
    for row, band in enumerate(bands):
        values = image[band][~np.isnan(image[band])]
        low, high = np.percentile(values, (2, 98)) if values.size else (0.0, 1.0)
        limits[row] = (low, high) if high > low else (low, low + 1)
    return limits


def stretched(image: np.ndarray, bands: Sequence[int], limits: np.ndarray) -> np.ndarray:
    """Three bands of an image (C, H, W) as red, green and blue, or one as grey, from black at the lower limit to white.

    limits: of stretch_limits.  What was not measured (NaN) is black.  Returns uint8 (H, W, 3).
    """
    low, high = (limits[:, side, None, None] for side in (0, 1))
    shares = np.clip((image[list(bands)] - low) / (high - low), 0, 1)
    shown = np.nan_to_num(255 * shares).round().astype(np.uint8).transpose(1, 2, 0)
    return shown if len(bands) == 3 else shown.repeat(3, axis=2)


def _write_labels(canvas: np.ndarray, labels: Sequence[str], column_px: int) -> np.ndarray:
    from PIL import Image, ImageDraw  # here: only a picture needs it, not the start of a run

    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for column, label in enumerate(labels):
        draw.text((column * column_px + 2, 2), label, fill=(60, 60, 60))
    return np.asarray(image)


_GREY, _DARK, _TEXT = (200, 200, 200), (16, 56, 128), (60, 60, 60)
