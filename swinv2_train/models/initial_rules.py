"""The ways in which parameters are drawn before training (models/initial.py says which parameter by which)."""

from __future__ import annotations

import math
from typing import NamedTuple


class Constant(NamedTuple):
    """Every element is value."""

    value: float


class Normal(NamedTuple):
    """A normal distribution around 0; the official truncation at 2 is 100 standard deviations away."""

    std: float


class Uniform(NamedTuple):
    """Between -bound and bound."""

    bound: float


Rule = Constant | Normal | Uniform


def xavier(fan_in: int, fan_out: int) -> Uniform:
    """Keeps the variance of activations and of gradients alike (Glorot and Bengio 2010, equation 16)."""
    return Uniform(math.sqrt(6.0 / (fan_in + fan_out)))


def kaiming(fan_out: int) -> Normal:
    """Keeps the variance of gradients behind a ReLU (arXiv:1502.01852, equation 14)."""
    return Normal(math.sqrt(2.0 / fan_out))
