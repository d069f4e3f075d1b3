"""What is known of the objects of an image, and the JSON in which a packed sample keeps it (KEY.json).

    {"size": [H, W], "image_id": 7, "objects": [{"class": 0, "box": [x0, y0, x1, y1], "crowd": false, "area": 812.5,
     "polygons": [[x, y, x, y, ...], ...]}, {..., "rle": {"size": [H, W], "counts": "..."}}]}

Coordinates are in pixels of the image and continuous: pixel (0, 0) reaches from 0 to 1.  An object without polygons and
without rle is known by its box alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.data.mask_codes import Rle, check_outlines, polygons_mask, polygons_rle, rle_counts
from swinv2_train.data.mask_codes import decode_rle as _decode_rle
from swinv2_train.data.sample import SampleError
from swinv2_train.storage.json_files import (
    LARGEST,
    Shape,
    anything,
    flag,
    listing,
    number,
    parse_json,
    record,
    row,
    whole,
)

OBJECTS_BYTES = 2**26
"""The most that the JSON of one image may hold."""
MAX_OBJECTS = 100_000
"""Of one image, before any choice among them."""
_MAX_SIDE = 2**24


@dataclass(frozen=True, eq=False)
class Mask:
    """The pixels of an object, as they were drawn: polygons, or the run lengths of an image of the same size."""

    polygons: tuple[np.ndarray, ...] = ()
    """(points, 2) float64 of x, y each."""
    rle: Rle | None = None

    def codes(self, size: tuple[int, int]) -> Rle:
        """As run lengths of an image of this size (H, W), their counts as text."""
        return polygons_rle(self.polygons, size) if self.rle is None else self.rle

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """bool (H, W)"""
        return polygons_mask(self.polygons, size) if self.rle is None else _decode_rle(self.rle, size)


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image."""

    size: tuple[int, int]
    """(height, width) of the image."""
    image_id: int
    """The image's number in the file that it came from."""
    boxes: np.ndarray
    """float32 (N, 4): x0, y0, x1, y1."""
    classes: np.ndarray
    """int64 (N,)"""
    crowd: np.ndarray
    """bool (N,): a group, of which detections count neither as right nor as wrong."""
    area: np.ndarray
    """float64 (N,): pixels of the object; by it COCO tells small from large."""
    masks: tuple[Mask | None, ...]
    """None for an object that is known by its box alone."""


def check_image_size(objects: Objects, size: tuple[int, int]) -> None:
    """Raises SampleError where the objects are of an image of other sides (height, width) than this one."""
    if objects.size != size:
        turned = " (turned by a quarter: the camera's rotation was applied to one of them alone)"
        raise SampleError(
            f"its objects are of an image of {objects.size[0]} x {objects.size[1]} pixels and it has {size[0]} x "
            f"{size[1]}{turned if objects.size == size[::-1] else ''}"
        )


# --------------------------------------------------------------------------------------------------------------------
# As JSON


def _counts(value: Any, where: str) -> None:
    if not isinstance(value, str):
        listing(whole(), most=OBJECTS_BYTES)(value, where)


_OBJECT: Shape = record(
    {"class": whole(high=2**31), "box": row(*[number()] * 4), "crowd": flag(), "area": number(0)},
    may={
        "polygons": listing(listing(number(), most=2 * 10**5, least=6), most=10_000),
        "rle": record({"size": row(whole(1, _MAX_SIDE), whole(1, _MAX_SIDE)), "counts": _counts}),
    },
)
_OBJECTS: Shape = record(
    {"size": row(whole(1, _MAX_SIDE), whole(1, _MAX_SIDE)), "objects": listing(_OBJECT, most=MAX_OBJECTS)},
    may={"image_id": whole(-LARGEST, LARGEST), "left_out": anything()},
)


def objects_to_json(objects: Objects) -> bytes:
    """The stored form, on one line; objects_from_json gives the same back."""
    rows = []
    for number_, mask in enumerate(objects.masks):
        found: dict[str, Any] = {
            "class": int(objects.classes[number_]),
            "box": [_short(value) for value in objects.boxes[number_].tolist()],
            "crowd": bool(objects.crowd[number_]),
            "area": _short(float(objects.area[number_])),
        }
        if mask is not None and mask.rle is not None:
            counts = mask.rle["counts"]
            found["rle"] = {
                "size": list(mask.rle["size"]),
                "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
            }
        elif mask is not None:
            found["polygons"] = [[_short(value) for value in each.ravel().tolist()] for each in mask.polygons]
        rows.append(found)
    content = {"size": list(objects.size), "image_id": objects.image_id, "objects": rows}
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def _short(value: float) -> float:
    """To a thousandth of a pixel, which is more than anybody draws."""
    return round(value, 3)


def objects_from_json(content: bytes) -> Objects:
    """The objects of an image.

    Raises SampleError where the bytes are something else, such as the JSON that other programs put beside an image, or
    a box has no area, or a mask is none of such an image.
    """
    if len(content) > OBJECTS_BYTES:
        raise SampleError(f"its .json has {len(content)} bytes, more than the {OBJECTS_BYTES} that are read")
    try:
        value = parse_json(content, "its .json", _OBJECTS, "pack the images with their annotations (docs/detection.md)")
    except ConfigError as error:
        raise SampleError(str(error)) from error
    size = (value["size"][0], value["size"][1])
    rows: Sequence[dict[str, Any]] = value["objects"]
    boxes = np.array([each["box"] for each in rows], np.float32).reshape(-1, 4)
    if ((boxes[:, 2:] <= boxes[:, :2]).any()) or not np.isfinite(boxes).all():
        raise SampleError("its .json has a box without an area; pack the images with their annotations again")
    return Objects(
        size=size,
        image_id=value.get("image_id", 0),
        boxes=boxes,
        classes=np.array([each["class"] for each in rows], np.int64),
        crowd=np.array([each["crowd"] for each in rows], bool),
        area=np.array([each["area"] for each in rows], np.float64),
        masks=tuple(_mask(each, size) for each in rows),
    )


def _mask(value: dict[str, Any], size: tuple[int, int]) -> Mask | None:
    if "rle" in value:
        rle_counts(value["rle"], size)
        return Mask(rle=value["rle"])
    if "polygons" not in value:
        return None
    if any(len(each) % 2 for each in value["polygons"]) or not value["polygons"]:
        raise SampleError("its .json has a polygon of an odd number of coordinates")
    polygons = tuple(np.array(each, np.float64).reshape(-1, 2) for each in value["polygons"])
    check_outlines(polygons)
    return Mask(polygons=polygons)
