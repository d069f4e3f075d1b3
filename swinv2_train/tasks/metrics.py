"""What a task may measure of an evaluation batch, exact on any number of ranks.

A mean is a scalar tensor: over the batch's images, weighted by batch["weight"].  What is no mean over images is a
quotient of Sums (mIoU), or comes out of all Rows together (average precision); evaluation/scoring.py adds up all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Finish = Callable[[Tensor], dict[str, float]]
"""From what all batches of all ranks gave to scores by metric name."""


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


Metric = Tensor | Sums | Rows
