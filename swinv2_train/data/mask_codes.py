"""Masks of objects as COCO writes them: polygons, and run lengths (RLE) as lists of counts or as short texts.

The counts run down the columns, from the left, and begin with what is not of the object.  A text holds them in groups
of five bits, from the third count on as differences to the last but one (pycocotools' rleToString).  What comes from a
file is checked here before any compiled code sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.data.sample import SampleError

Rle = dict[str, Any]
"""{"size": [height, width], "counts": list of int, str or bytes}"""
NEEDED = (
    "masks and average precision of objects need faster-coco-eval, which is not installed: pip install "
    "'faster-coco-eval>=1.8,<2' (in the checkout pip install -e '.[detection]')"
)
MAX_POLYGON_POINTS = 100_000
"""Of one object; COCO's most are some thousands."""
_MAX_OUTLINE_PX = 8_000_000
"""Length of one object's outline in the mask: the compiled code keeps 5 points for each pixel of it."""


def rle_counts(rle: Rle, size: tuple[int, int]) -> np.ndarray:
    """int64 counts of a mask of `size` (height, width).

    Raises SampleError where they are of another size, negative, or more or fewer than its pixels.
    """
    given, counts = rle.get("size"), rle.get("counts")
    if not isinstance(given, list | tuple) or list(given) != list(size):
        raise SampleError(f"a mask (RLE) of size {str(given)[:40]}, but the image has {size[0]} x {size[1]} pixels")
    if isinstance(counts, str | bytes):
        found = _counts_of_text(counts.encode("latin-1", "replace") if isinstance(counts, str) else counts)
    else:
        try:
            found = np.asarray(counts, dtype=np.int64)
        except (TypeError, ValueError, OverflowError):
            raise SampleError("a mask (RLE) whose counts are no whole numbers") from None
    if found.ndim != 1 or len(found) > size[0] * size[1] + 1 or (found < 0).any():
        raise SampleError("a mask (RLE) whose counts are no list of lengths")
    if found.max(initial=0) > size[0] * size[1] or found.sum() != size[0] * size[1]:
        raise SampleError(f"a mask (RLE) whose counts do not add up to {size[0]} x {size[1]} pixels")
    return found


def _counts_of_text(text: bytes) -> np.ndarray:
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any() or not len(codes) or codes[-1] & 32:
        raise SampleError("a mask (RLE) whose text is none")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise SampleError("a mask (RLE) whose text is none")
    within = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * within), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):  # each is a difference to the last but one, from the fourth count on
        values[first::2] = np.cumsum(values[first::2])
    return values


def decode_rle(rle: Rle, size: tuple[int, int]) -> np.ndarray:
    """bool (height, width).  Raises SampleError as rle_counts does."""
    counts = rle_counts(rle, size)
    ones = np.arange(len(counts)) % 2 == 1
    return np.repeat(ones, counts).reshape(size[1], size[0]).T


def encode_mask(mask: np.ndarray) -> Rle:
    """bool (H, W) -> RLE with its counts as bytes, as COCO's results have it."""
    found: Rle = coco_codes().encode(np.asfortranarray(mask, dtype=np.uint8))
    return found


def polygons_mask(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Polygons (points, 2) of x, y in pixels, which may reach beyond the mask -> bool (height, width), by COCO's rule.

    Raises SampleError for outlines that would fill the memory.
    """
    found: np.ndarray = coco_codes().decode(polygons_rle(polygons, size))
    return found.view(bool)


def polygons_rle(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> Rle:
    """As polygons_mask, as RLE with its counts as bytes."""
    check_outlines(polygons)
    codes = coco_codes()
    found: Rle = codes.merge(codes.frPyObjects([each.ravel().tolist() for each in polygons], *size))
    return found


def coco_codes() -> Any:
    """The compiled codes of masks, faster_coco_eval's.  Raises ConfigError where it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ConfigError(f"{NEEDED} ({error})") from error
    return mask


def check_outlines(polygons: Sequence[np.ndarray]) -> None:
    """Raises SampleError for polygons that are none, or whose outlines would fill the memory."""
    outline = 0.0
    for each in polygons:
        if each.ndim != 2 or each.shape[1:] != (2,) or len(each) < 3 or not np.isfinite(each).all():
            raise SampleError("a polygon with fewer than 3 points, or with points that are no numbers")
        outline += float(np.abs(each - np.roll(each, 1, axis=0)).max(axis=1).sum())
    if outline > _MAX_OUTLINE_PX or sum(map(len, polygons)) > MAX_POLYGON_POINTS:
        raise SampleError(f"polygons whose outlines are {outline:.3g} pixels long; it is no outline of an object")
