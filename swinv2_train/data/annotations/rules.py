"""What becomes of boxes and masks that cannot be as they were drawn: one rule for each kind, counted and named.

not a number, of no class, background, no area, outside, twice     the object is left out
beyond the edge (by a pixel, or by more)                            its box is clipped to the image
polygons or run lengths that are none of the image                  the object keeps its box, and has no mask
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from swinv2_train.config.shown import shown
from swinv2_train.data.annotations.form import BACKGROUND, Drawn, DrawnImage
from swinv2_train.data.mask_codes import check_outlines, decode_rle, polygons_rle, rle_counts
from swinv2_train.data.objects import Mask, Objects
from swinv2_train.data.sample import SampleError, ShardError

NO_NUMBER = "a box that is no four numbers (left out)"
NO_CLASS = "a class that the set does not list (left out)"
IS_BACKGROUND = "the background as an object (left out)"
NO_AREA = "a box without an area (left out)"
OUTSIDE = "a box outside the image (left out)"
TWICE = "the same box of the same class twice (left out once)"
OFF_BY_ONE = "a box beyond the image by a pixel or less (clipped)"
BEYOND = "a box beyond the image (clipped)"
NO_POLYGON = "a polygon of fewer than 3 points, or of no numbers (left out)"
NO_MASK = "run lengths of another size, or broken (left out; the box is kept)"
_NAMED = 3
_LARGEST_PX = 1e7


@dataclass
class BadBoxes:
    """What was wrong with the objects of a set."""

    origin: str
    """What errors call them."""
    refuse: bool = False
    """Raise ShardError at the first."""
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The first few of each kind."""

    def note(self, image: str, number: int, kind: str, what: Any) -> None:
        """An object of an image, counted from 0, is of this kind.  what: the value that is."""
        text = f"{shown(image, 100)}, object {number}: {shown(what, 80)}"
        if self.refuse:
            raise ShardError(
                f"{self.origin}: {kind.partition(' (')[0]} ({text}); mend it, or leave out --on-bad-box=error to go on "
                "by the rules of docs/detection.md"
            )
        self.counts[kind] += 1
        if len(self.named[kind]) < _NAMED:
            self.named[kind].append(text)

    def text(self) -> str | None:
        """A line for each kind, the commonest first; None without any."""
        if not self.counts:
            return None
        lines = [f"warning: {self.origin}: {self.counts.total()} faults in boxes and masks"]
        for kind, count in self.counts.most_common():
            more = ", ..." if count > len(self.named[kind]) else ""
            lines.append(f"  {count:>7}  {kind}: {'; '.join(self.named[kind])}{more}")
        return "\n".join(lines)


def objects_of(
    image: DrawnImage, name: str, size: tuple[int, int], numbers: Mapping[str, int], bad: BadBoxes, image_id: int
) -> Objects:
    """The objects of an image that can be used, by the rules above.

    size: (height, width) of the image itself.  numbers: of the classes by name.  image_id: where the annotations have
    none.  Raises SampleError where the annotations say another size.
    """
    if image.size is not None and image.size != size:
        turned = ", turned by a quarter: the camera's rotation was applied to one of them alone"
        raise SampleError(
            f"its annotations are of an image of {image.size[0]} x {image.size[1]} pixels and it has {size[0]} x "
            f"{size[1]} (height x width{turned if image.size == size[::-1] else ''})"
        )
    rows: list[tuple[np.ndarray, int, bool, float, Mask | None]] = []
    seen: set[tuple[Any, ...]] = set()
    for number, drawn in enumerate(image.objects):
        found = _usable(drawn, size, image.relative, numbers, partial(bad.note, name, number))
        if found is None:
            continue
        key = (found[1], found[2], *np.round(found[0], 3).tolist())
        if key in seen:
            bad.note(name, number, TWICE, np.round(found[0], 1).tolist())
            continue
        seen.add(key)
        rows.append(found)
    return Objects(
        size=size,
        image_id=image_id if image.image_id is None else image.image_id,
        boxes=np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        classes=np.array([row[1] for row in rows], np.int64),
        crowd=np.array([row[2] for row in rows], bool),
        area=np.array([row[3] for row in rows], np.float64),
        masks=tuple(row[4] for row in rows),
    )


def _usable(
    drawn: Drawn, size: tuple[int, int], relative: bool, numbers: Mapping[str, int], note: Any
) -> tuple[np.ndarray, int, bool, float, Mask | None] | None:
    """Box, class, whether it is a crowd, area and mask; None where the object is left out.  note: told why."""
    if str(drawn.category).strip().lower() in BACKGROUND:
        return note(IS_BACKGROUND, drawn.category)
    label = numbers.get(drawn.category) if isinstance(drawn.category, str) else None
    if label is None:
        return note(NO_CLASS, drawn.category)
    scale = np.array([size[1], size[0]] * 2, np.float64) if relative else np.ones(4)
    polygons = _polygons(drawn.polygons, scale[:2], note)
    box = _numbers(drawn.box) if drawn.box is not None else _around(polygons)
    if box is None or len(box) != 4:
        return note(NO_NUMBER, drawn.box)
    box = box * scale if drawn.box is not None else box
    limits = np.array([size[1], size[0]] * 2, np.float64)
    clipped = np.clip(box, 0, limits)
    if (box[2:] <= box[:2]).any():
        return note(NO_AREA, box.tolist())
    if (np.float32(clipped[2:]) <= np.float32(clipped[:2])).any():
        return note(OUTSIDE, box.tolist())
    beyond = float(np.abs(box - clipped).max())
    if beyond > 1e-3 + (1e-5 * max(size) if relative else 0):
        note(OFF_BY_ONE if beyond <= 1.001 else BEYOND, box.tolist())
    mask = _mask(polygons, drawn.rle, size, note)
    return clipped, label, drawn.crowd, _area(drawn.area, mask, clipped, size), mask


def _numbers(values: Any) -> np.ndarray | None:
    """float64 (n,); None where they are no finite numbers of a picture's order."""
    if not isinstance(values, list | tuple | np.ndarray):
        return None
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if found.ndim != 1 or any(isinstance(each, str | bool) for each in values):
        return None
    return found if np.isfinite(found).all() and (np.abs(found) < _LARGEST_PX).all() else None


def _polygons(given: Sequence[Any] | None, scale: np.ndarray, note: Any) -> list[np.ndarray]:
    found = []
    for each in given or ():
        values = _numbers(each)
        if values is None or len(values) < 6 or len(values) % 2:
            note(NO_POLYGON, each)
            continue
        points = values.reshape(-1, 2) * scale
        try:
            check_outlines([points])
        except SampleError:
            note(NO_POLYGON, each)
            continue
        found.append(points)
    return found


def _around(polygons: Sequence[np.ndarray]) -> np.ndarray | None:
    """The box around polygons; None without any."""
    if not polygons:
        return None
    points = np.concatenate(polygons)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _mask(polygons: Sequence[np.ndarray], rle: Any, size: tuple[int, int], note: Any) -> Mask | None:
    if rle is not None:
        try:
            counts = rle_counts(rle, size)
        except SampleError as error:
            return note(NO_MASK, str(error))
        kept = rle["counts"] if isinstance(rle["counts"], str) else counts.tolist()
        return Mask(rle={"size": list(size), "counts": kept})
    return Mask(polygons=tuple(polygons)) if polygons else None


def _area(given: Any, mask: Mask | None, box: np.ndarray, size: tuple[int, int]) -> float:
    """As given, where that is a number; else the mask's pixels; else the box's."""
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given) and given > 0:
        return float(given)
    if mask is not None and mask.rle is not None:
        return float(rle_counts(mask.rle, size)[1::2].sum())
    if mask is not None:
        return float(decode_rle(polygons_rle(mask.polygons, size), size).sum())
    return float((box[2] - box[0]) * (box[3] - box[1]))
