"""Numbers whose sums do not depend on the order: floats as whole numbers, float32 by their place among all floats."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from swinv2_train.config import Config, per_band

_UNIT = 1074
"""Every float64 is a whole multiple of 2^-1074."""
TOPS = LOWS = 1 << 16
"""Values of the upper and of the lower half of a float32's place."""


def exact(value: float) -> int:
    """A finite float64 as a multiple of 2^-1074: such sums are exact, and so the same in any order."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (_UNIT + 1 - denominator.bit_length())


def quotient(total: int, count: int) -> float:
    """The mean of `count` numbers whose sum in exact's unit is `total`, rounded once."""
    return float(Fraction(total, count << _UNIT))


def places(values: np.ndarray) -> np.ndarray:
    """uint32 of the shape of float32 values, without NaN, in the order of the values; -0 has the place of 0."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def at_place(place: int) -> float:
    """The value that has a place."""
    bits = place & 0x7FFFFFFF if place >> 31 else ~place & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


@dataclass(frozen=True)
class Scale:
    """From an image's numbers to the values that data.mean and data.std are of.  Picklable."""

    factor: np.ndarray
    """float32 (C,), and so is offset."""
    offset: np.ndarray
    clip: tuple[float, float] | None
    photographs: bool
    """Numbers are 0..255 and values 0..1."""

    @classmethod
    def of(cls, config: Config) -> Scale:
        """What data.scale says."""
        scale, count = config.data.scale, config.model.in_chans
        factor, offset = (
            np.array(per_band(each, count, default), np.float32)
            for each, default in ((scale.factor, 1.0), (scale.offset, 0.0))
        )
        clip = None if scale.clip is None else (scale.clip[0], scale.clip[1])
        return cls(factor, offset, clip, not config.reads_values)

    def values(self, numbers: np.ndarray, band: int) -> np.ndarray:
        """float32 numbers of one band to its values, float32 in the order in which the device computes them; of
        photographs float64.  NaN stays NaN.
        """
        if self.photographs:
            return numbers.astype(np.float64) / 255
        values = numbers * self.factor[band] + self.offset[band]
        return values if self.clip is None else np.clip(values, np.float32(self.clip[0]), np.float32(self.clip[1]))
