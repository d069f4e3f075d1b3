"""labelme json: a file for each image, of polygons, rectangles, circles and masks; shapes of a group are one object."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from swinv2_train.config.shown import shown
from swinv2_train.data.annotations.form import BACKGROUND, Annotations, Drawn, DrawnImage, Read
from swinv2_train.data.class_names import in_order
from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.data.sample import ShardError
from swinv2_train.data.transforms.decode import DecodeError
from swinv2_train.data.transforms.label_image import read_label_image

LABELME_BYTES = 2**28
"""The most that such a file may hold; it may have its image in it."""
_CIRCLE_POINTS = 64
_NO_AREA = ("point", "points", "line", "linestrip")


def is_labelme(value: Any) -> bool:
    """Whether this is what such a file holds."""
    return isinstance(value, dict) and isinstance(value.get("shapes"), list)


def read_labelme(files: Mapping[str, Read], origin: str) -> Annotations:
    """files: by path from the folder on, with its ending; other JSON among them is passed over.

    Raises ShardError naming the first file that cannot be read.
    """
    images, lines = dict[str, DrawnImage](), 0
    for name, read in files.items():
        content = read()
        if len(content) > LABELME_BYTES:
            raise ShardError(f"{origin}: {name}: {len(content)} bytes, more than the {LABELME_BYTES} that are read")
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{origin}: {name} is no JSON ({shown(error, 200)})") from error
        if is_labelme(value):
            images[name.rpartition(".")[0]], passed = _image(value, f"{origin}: {name}")
            lines += passed
    names = {str(each.category) for image in images.values() for each in image.objects}
    classes = in_order(name for name in names if name.lower() not in BACKGROUND)
    notes = (f"{origin}: {lines} points and lines are no objects and are left out",) if lines else ()
    return Annotations("labelme", origin, images, classes, by_stem=True, absent_is_empty=False, notes=notes)


def _image(value: dict[str, Any], where: str) -> tuple[DrawnImage, int]:
    """And how many shapes have no area."""
    found, passed = DrawnImage(), 0
    height, width = value.get("imageHeight"), value.get("imageWidth")
    if isinstance(height, int) and isinstance(width, int) and 0 < height < 2**24 and 0 < width < 2**24:
        found.size = (height, width)
    groups: dict[tuple[Any, Any], Drawn] = {}
    for shape in value["shapes"]:
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise ShardError(f"{where}: a shape without a label; save it in labelme again")
        kind, group = shape.get("shape_type", "polygon"), shape.get("group_id")
        if kind in _NO_AREA:
            passed += 1
            continue
        drawn = _drawn(shape, kind, found.size, where)
        if isinstance(group, int | str) and drawn.polygons is not None:
            first = groups.setdefault((shape["label"], group), drawn)
            if first is not drawn:
                first.polygons, first.box = [*(first.polygons or ()), *drawn.polygons], None
                continue
        found.objects.append(drawn)
    return found, passed


def _drawn(shape: dict[str, Any], kind: Any, size: tuple[int, int] | None, where: str) -> Drawn:
    label, points = shape["label"].strip(), shape.get("points")
    pairs = _pairs(points)
    if pairs is None:
        return Drawn(label, [])
    if kind == "rectangle" and len(pairs) >= 2:
        (x0, y0), (x1, y1) = np.min(pairs, axis=0).tolist(), np.max(pairs, axis=0).tolist()
        return Drawn(label, [x0, y0, x1, y1])  # it is no outline
    if kind == "circle" and len(pairs) == 2:
        (x, y), radius = pairs[0], math.dist(*pairs)
        turns = [2 * math.pi * number / _CIRCLE_POINTS for number in range(_CIRCLE_POINTS)]
        return Drawn(
            label, None, polygons=[[v for t in turns for v in (x + radius * math.cos(t), y + radius * math.sin(t))]]
        )
    if kind == "mask" and len(pairs) == 2:
        return _of_mask(shape, pairs, size, where)
    if kind in ("polygon", "", None):
        return Drawn(label, None if len(pairs) >= 3 else [], polygons=[[v for pair in pairs for v in pair]])
    return Drawn(label, [])


def _pairs(points: Any) -> list[list[float]] | None:
    """None where they are no finite points."""
    if not isinstance(points, list) or len(points) > 10**5:
        return None
    if not all(isinstance(p, list) and len(p) == 2 and all(_is_number(v) for v in p) for p in points):
        return None
    return [[float(value) for value in point] for point in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e7


def _of_mask(shape: dict[str, Any], pairs: list[list[float]], size: tuple[int, int] | None, where: str) -> Drawn:
    """A mask is a PNG of the part of the image between two corners, both of which belong to it."""
    (x0, y0), (x1, y1) = ([int(round(value)) for value in pair] for pair in pairs)
    box: list[float] = [x0, y0, x1 + 1, y1 + 1]
    text = shape.get("mask")
    if size is None or not isinstance(text, str) or min(x0, y0) < 0 or x1 >= size[1] or y1 >= size[0]:
        return Drawn(shape["label"].strip(), box)
    try:
        part = read_label_image(base64.b64decode(text, validate=True)) > 0
    except (binascii.Error, ValueError, DecodeError) as error:
        raise ShardError(f"{where}: a mask that is no PNG ({shown(error, 120)}); save it in labelme again") from error
    if part.shape != (y1 - y0 + 1, x1 - x0 + 1):
        return Drawn(shape["label"].strip(), box)
    pixels = np.zeros(size, bool)
    pixels[y0 : y1 + 1, x0 : x1 + 1] = part
    rle = encode_mask(pixels)
    return Drawn(shape["label"].strip(), box, rle={"size": list(size), "counts": rle["counts"].decode("ascii")})
