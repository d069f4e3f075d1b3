"""The right objects of an image that is evaluated, and those that a detector finds in it."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import numpy as np

from swinv2_train.data.mask_codes import Rle


class Truth(TypedDict):
    """The objects of an image, in its own pixels."""

    boxes: np.ndarray
    """float32 (N, 4): x0, y0, x1, y1."""
    classes: np.ndarray
    """int64 (N,)"""
    crowd: np.ndarray
    """bool (N,)"""
    area: np.ndarray
    """float64 (N,): pixels of the object."""
    masks: list[Rle | None]
    """None for an object that is known by its box alone."""


class Found(NamedTuple):
    """The objects that are found in one image, the best first; D of them."""

    boxes: np.ndarray
    """(D, 4) float32: x0, y0, x1, y1 in pixels of the image as it is read."""
    scores: np.ndarray
    """(D,) float32."""
    classes: np.ndarray
    """(D,) int64."""
    masks: list[Rle] | None
    """COCO's compressed run lengths, {"size": [H, W], "counts": bytes}, each; None without task.masks."""
    finite: bool = True
    """Whether all scores of the model were numbers: where they are none it finds nothing."""

    @property
    def in_numbers(self) -> bool:
        """Whether all that the model said of the image is a number."""
        return bool(self.finite and np.isfinite(self.scores).all() and np.isfinite(self.boxes).all())
