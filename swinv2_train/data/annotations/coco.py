"""COCO json: one file for many images, with polygons or run lengths (cocodataset.org/#format-data)."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from swinv2_train.config.shown import shown
from swinv2_train.data.annotations.form import BACKGROUND, Annotations, Drawn, DrawnImage
from swinv2_train.data.sample import ShardError

COCO_BYTES = 2**32
"""The most that such a file may hold; COCO's own largest has 470 MB."""
_AN_ID = "a whole number of less than 64 bits"
_REMEDY = "write it again as COCO json (images, annotations, categories)"


def is_coco(value: Any) -> bool:
    """Whether this is what such a file holds."""
    return isinstance(value, dict) and {"images", "annotations", "categories"} <= value.keys()


def parse_coco_json(content: bytes, origin: str) -> Any:
    """Raises ShardError where it is no JSON, or larger than is read."""
    if len(content) > COCO_BYTES:
        raise ShardError(f"{origin}: {len(content)} bytes, more than the {COCO_BYTES} that are read; split it")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{origin} is no JSON ({shown(error, 200)}); {_REMEDY}") from error


def read_coco(value: Any, origin: str) -> Annotations:
    """value: the parsed file.  Classes are numbered in the order of their ids, as COCO's 80 of 1 to 90.

    Raises ShardError where it is none; what is wrong with single objects is left to rules.py.
    """
    categories = _categories(value["categories"], origin)
    images, name_of = dict[str, DrawnImage](), dict[Any, str]()
    for number, each in enumerate(_rows(value["images"], f"{origin}: images")):
        name, given = each.get("file_name"), each.get("id")
        key = _id(given)
        if not isinstance(name, str) or not name or key is None:
            raise ShardError(f"{origin}: images[{number}] needs a file_name and an id, {_AN_ID}; {_REMEDY}")
        if key in name_of:
            raise ShardError(f"{origin}: two images have the id {key} (the second: {shown(name, 100)}); {_REMEDY}")
        name_of[key] = name = name.replace("\\", "/")
        if name in images:
            raise ShardError(f"{origin}: two images are called {shown(name, 100)}; {_REMEDY}")
        images[name] = DrawnImage(size=_size(each), image_id=key)
    lost: Counter[str] = Counter()
    for each in _rows(value["annotations"], f"{origin}: annotations"):
        found = name_of.get(_id(each.get("image_id")))
        if found is None:
            lost[str(each.get("image_id"))[:20]] += 1
        else:
            images[found].objects.append(_drawn(each, categories))
    notes: tuple[str, ...] = ()
    if lost:
        notes = (
            f"warning: {origin}: {lost.total()} annotations are of images that it does not list (image_id "
            f"{', '.join(list(lost)[:3])}) and are left out",
        )
    if not images:
        raise ShardError(f"{origin} lists no images; {_REMEDY}")
    classes = tuple(name for name in categories.values() if name.lower() not in BACKGROUND)
    return Annotations("COCO", origin, images, classes, by_stem=False, absent_is_empty=False, notes=notes)


def _rows(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ShardError(f"{where} must be a list of objects; {_REMEDY}")
    return value


def _categories(value: Any, origin: str) -> dict[int, str]:
    """Names by id, in the order of ids."""
    found: dict[int, str] = {}
    for each in _rows(value, f"{origin}: categories"):
        number, name = _id(each.get("id")), each.get("name")
        if number is None or not isinstance(name, str) or not name.strip():
            raise ShardError(f"{origin}: a category needs a name that is text and an id, {_AN_ID}; {_REMEDY}")
        if number in found or name.strip() in found.values():
            raise ShardError(f"{origin}: two categories are {number} or called {shown(name, 60)}; {_REMEDY}")
        found[number] = name.strip()
    if not found:
        raise ShardError(f"{origin} has no categories, so no classes; {_REMEDY}")
    return dict(sorted(found.items()))


def _id(value: Any) -> int | None:
    """Programs write ids as 7, 7.0 and "7"."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = _id(image.get("height")), _id(image.get("width"))
    return (height, width) if height and width and height > 0 and width > 0 else None


def _drawn(each: dict[str, Any], categories: dict[int, str]) -> Drawn:
    number = _id(each.get("category_id"))
    category: Any = each.get("category_id") if number is None else categories.get(number, number)
    box, shape = each.get("bbox"), each.get("segmentation")
    polygons = shape if isinstance(shape, list) else None if shape is None or isinstance(shape, dict) else [shape]
    if isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box):
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    elif box is None and isinstance(shape, list) and shape:
        box = None
    else:
        box = []
    return Drawn(
        category=category,
        box=box,
        crowd=each.get("iscrowd") in (1, True, "1"),
        area=each.get("area"),
        polygons=polygons or None,
        rle=shape if isinstance(shape, dict) else None,
    )
