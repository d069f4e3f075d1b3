"""Masks as COCO writes them, against pycocotools; and what no compiled code may see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as reference

from swinv2_train.data.mask_codes import decode_rle, encode_mask, polygons_mask, polygons_rle, rle_counts
from swinv2_train.data.sample import SampleError


def masks(rng: np.random.Generator) -> list[np.ndarray]:
    """Noise, nothing, everything, and single blocks, of odd sizes."""
    sizes = rng.integers(1, 40, size=(40, 2)).tolist()
    found = [rng.random((h, w)) < rng.choice([0, 0.02, 0.5, 1]) for h, w in sizes]
    for h, w in rng.integers(5, 400, size=(10, 2)).tolist():
        block = np.zeros((h, w), bool)
        block[h // 3 : h // 2 + 1, w // 4 : w // 2 + 1] = True
        found.append(block)
    return found


def test_run_lengths_of_both_kinds_are_pycocotools_own() -> None:
    for mask in masks(np.random.default_rng(0)):
        codes: Any = reference.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert encode_mask(mask) == codes
        assert (decode_rle(codes, mask.shape) == mask).all()
        counts = rle_counts({"size": list(mask.shape), "counts": codes["counts"].decode()}, mask.shape)
        plain = {"size": list(mask.shape), "counts": counts.tolist()}
        assert reference.frPyObjects(plain, *mask.shape)["counts"] == codes["counts"]
        assert (decode_rle(plain, mask.shape) == mask).all()


def test_polygons_are_drawn_as_pycocotools_draws_them() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        size = (int(rng.integers(1, 60)), int(rng.integers(1, 60)))
        polygons = [rng.uniform(-20, 80, size=(int(rng.integers(3, 9)), 2)) for _ in range(2)]
        codes: Any = reference.merge(reference.frPyObjects([each.ravel().tolist() for each in polygons], *size))
        assert (polygons_mask(polygons, size) == reference.decode(codes)).all()
        assert polygons_rle(polygons, size) == codes


@pytest.mark.parametrize(
    "rle, cause",
    [
        ({"size": [4, 4], "counts": [16]}, "of size"),
        ({"size": [3, 4], "counts": [3, 10]}, "do not add up"),
        ({"size": [3, 4], "counts": [2**62, 2**62, 2**63 - 1, 14]}, "do not add up"),
        ({"size": [3, 4], "counts": [14, -2]}, "no list of lengths"),
        ({"size": [3, 4], "counts": [[12]]}, "no list of lengths"),
        ({"size": [3, 4], "counts": ["many"]}, "no whole numbers"),
        ({"size": [3, 4], "counts": None}, "no whole numbers|no list"),
        ({"size": [3, 4], "counts": ""}, "text is none"),
        ({"size": [3, 4], "counts": "P"}, "text is none"),
        ({"size": [3, 4], "counts": "\x00"}, "text is none"),
        ({"size": [3, 4], "counts": "ooooooooooooo0"}, "text is none"),
        ({"size": [3, 4], "counts": "=="}, "do not add up"),
        ({}, "of size"),
    ],
)
def test_run_lengths_that_are_none_of_the_image_are_refused(rle: dict[str, Any], cause: str) -> None:
    """The compiled decoders write beyond their memory for some of these."""
    with pytest.raises(SampleError, match=cause):
        rle_counts(rle, (3, 4))


@pytest.mark.parametrize(
    "polygon", [[[0, 0], [1, 1]], [[0, 0], [np.nan, 1], [1, 2]], [[0, 0], [1e9, 0], [1e9, 1e9]]], ids=str
)
def test_outlines_that_are_none_or_fill_the_memory_are_refused(polygon: list[list[float]]) -> None:
    with pytest.raises(SampleError, match="polygon"):
        polygons_mask([np.array(polygon, float)], (8, 8))
