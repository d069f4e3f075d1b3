"""What a task may measure of an evaluation batch, exact on any number of ranks.

A mean is a scalar tensor: over the batch's images, weighted by batch["weight"]; a mean over something else is a Mean.
What is none is a quotient of Sums (mIoU), or comes out of all Rows or all Records together (average precision);
evaluation/scoring.py adds them all up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Finish = Callable[[Tensor], dict[str, float]]
"""From what all batches of all ranks gave to scores by metric name."""


class Mean(NamedTuple):
    """A mean over something that images have unequally much of, such as measured pixels."""

    value: Tensor
    """()"""
    weight: Tensor
    """() how much of it the batch has; a batch of weight 0 does not count."""


class Sums(NamedTuple):
    """Whole numbers that are added up over all images."""

    values: Tensor
    """(B, ...) of an integer dtype, a row per image; rows of images of weight 0 do not count."""
    finish: Finish
    """Is given the sum over all images, (...) int64."""


class Rows(NamedTuple):
    """Rows of numbers that are looked at together, any number of them per image."""

    values: Tensor
    """(n, columns), the columns the same in every batch."""
    image: Tensor
    """(n,) int64, the image of the batch that each row is of, 0 .. B - 1; rows of images of weight 0 do not count."""
    finish: Finish
    """Is given the rows of all images, (N, columns) float64 on the CPU, sorted by their columns from the first on."""


class Records(NamedTuple):
    """What is known of each image, of any size, that is looked at together."""

    values: Sequence[bytes]
    """B of them; those of images of weight 0 do not count."""
    finish: Callable[[Sequence[bytes]], dict[str, float]]
    """Is given the records of all images, sorted."""


CONFUSION = "confusion"
"""The name of Sums that are the pixels of each image by right and predicted class, (B, classes, classes)."""

Metric = Tensor | Mean | Sums | Rows | Records
