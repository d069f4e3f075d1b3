"""The JSON of an image's objects: the same back, and nothing else taken for it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.data.objects import Mask, Objects, check_image_size, objects_from_json, objects_to_json
from swinv2_train.data.sample import MEMBERS, OBJECTS, SampleError

BLOCK = np.zeros((20, 30), bool)
BLOCK[2:5, 3:9] = True


def example() -> Objects:
    triangle = np.array([[1, 1], [12.5, 1], [1, 9.25]])
    return Objects(
        size=(20, 30),
        image_id=17,
        boxes=np.array([[1, 1, 12.5, 9.25], [3, 2, 9, 5], [0, 0, 30, 20]], np.float32),
        classes=np.array([2, 0, 1]),
        crowd=np.array([False, True, False]),
        area=np.array([47.4, 18, 600]),
        masks=(Mask(polygons=(triangle,)), Mask(rle=encode_mask(BLOCK)), None),
    )


def test_what_is_written_is_read_again() -> None:
    first, again = example(), objects_from_json(objects_to_json(example()))
    assert (again.size, again.image_id) == ((20, 30), 17)
    for name in ("boxes", "classes", "crowd", "area"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        assert getattr(again, name).dtype == getattr(first, name).dtype, name
    assert again.masks[0] is not None and again.masks[1] is not None and again.masks[2] is None
    np.testing.assert_array_equal(again.masks[0].polygons[0], first.masks[0].polygons[0])  # type: ignore[union-attr]
    assert (again.masks[1].pixels((20, 30)) == BLOCK).all()
    assert objects_to_json(again) == objects_to_json(first)


def test_an_image_without_objects_is_one() -> None:
    found = objects_from_json(MEMBERS[OBJECTS].example)
    assert found.boxes.shape == (0, 4) and found.masks == () and found.size == (64, 64)


def changed(path: list[Any], value: Any) -> bytes:
    """The example's JSON with one value replaced."""
    content = json.loads(objects_to_json(example()))
    at = content
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "content, cause",
    [
        (b'{"caption": "a cat", "width": 3}', "size is missing"),
        (b"[" * 100_000, "cannot be read"),
        (b"\xff", "cannot be read"),
        (changed(["objects", 0, "box"], [1, 1, float("nan"), 3]), r"box\[2\]"),
        (changed(["objects", 0, "box"], [5, 1, 5, 3]), "without an area"),
        (changed(["objects", 0, "class"], -1), "class"),
        (changed(["objects", 0, "crowd"], 1), "crowd"),
        (changed(["objects", 0, "polygons"], [[1, 1, 2, 2]]), "polygons"),
        (changed(["objects", 0, "polygons"], [[1, 1, 2, 2, 3, 3, 4]]), "odd number"),
        (changed(["objects", 0, "polygons"], []), "odd number|polygon"),
        (changed(["objects", 1, "rle", "size"], [20, 31]), "of size"),
        (changed(["objects", 1, "rle", "counts"], [1, 2]), "do not add up"),
        (changed(["size"], [20]), "size"),
    ],
)
def test_what_is_no_such_json_is_a_damaged_sample(content: bytes, cause: str) -> None:
    with pytest.raises(SampleError, match=cause):
        objects_from_json(content)


def test_objects_of_a_turned_image_are_told_so() -> None:
    check_image_size(example(), (20, 30))
    with pytest.raises(SampleError, match="turned by a quarter"):
        check_image_size(example(), (30, 20))
    with pytest.raises(SampleError, match="20 x 30 pixels and it has 20 x 31"):
        check_image_size(example(), (20, 31))
