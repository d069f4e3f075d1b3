"""What is counted of images, band by band: sums of whole numbers, which any order of images gives alike.

The first look counts how often each whole number comes (images of 8 and 16 bit hold nothing else, and need no second
look), or, of images with other numbers, the upper half of each float32's place.  The second look counts what the first
one made known: deviations from the mean, bars, and the lower half of the places near the percentiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from swinv2_train.data.statistics.numbers import LOWS, TOPS, Scale, exact, places

LOWEST, HIGHEST = -(1 << 15), (1 << 16) - 1
"""Whole numbers that are counted one by one: of int16 and uint16."""
_WHOLES = HIGHEST - LOWEST + 1
BARS = 128
"""Of a band's histogram."""

Sparse = tuple[np.ndarray, np.ndarray]
"""The places of an array that are not 0, and what stands there."""


def sparse(dense: np.ndarray) -> Sparse:
    """A flat view of an array by what is in it."""
    found = np.flatnonzero(dense)
    return found, dense.reshape(-1)[found]


def add_sparse(dense: np.ndarray, part: Sparse) -> None:
    """Add to an array in place; it is contiguous."""
    dense.reshape(-1)[part[0]] += part[1]


@dataclass
class FirstLook:
    """Of `bands` bands.  What is per band has a place for each."""

    bands: int
    images: int = 0
    missing: list[int] = field(default_factory=list)
    """Values that were not measured."""
    whole: np.ndarray = field(default_factory=lambda: np.empty(0))
    """int64 (bands, HIGHEST - LOWEST + 1): how often each whole number came, in images that hold nothing else."""
    tops: np.ndarray = field(default_factory=lambda: np.empty(0))
    """int64 (bands, TOPS): how often values came with each upper half of their place, in the other images."""
    sums: list[int] = field(default_factory=list)
    """In numbers.exact's unit, of these values; a sum within one image is a float64."""
    lows: list[float] = field(default_factory=list)
    """The smallest and, in highs, the largest of these values; inf and -inf where there are none."""
    highs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing, self.sums = [0] * self.bands, [0] * self.bands
        self.whole = np.zeros((self.bands, _WHOLES), np.int64)
        self.tops = np.zeros((self.bands, TOPS), np.int64)
        self.lows, self.highs = [np.inf] * self.bands, [-np.inf] * self.bands

    def image(self, numbers: np.ndarray, scale: Scale) -> None:
        """Count an image: float32 (C, values), NaN where nothing was measured."""
        self.images += 1
        measured = [band[~np.isnan(band)] for band in numbers]
        for number, found in enumerate(measured):
            self.missing[number] += numbers.shape[1] - len(found)
        if all(map(_are_whole, measured)):
            for number, found in enumerate(measured):
                self._count_whole(number, found)
        else:
            for number, found in enumerate(measured):
                self._count_values(number, scale.values(found, number))

    def _count_whole(self, number: int, found: np.ndarray) -> None:
        if len(found):
            codes = found.astype(np.int64) - LOWEST
            low = int(codes.min())
            counts = np.bincount(codes - low)
            self.whole[number, low : low + len(counts)] += counts

    def _count_values(self, number: int, values: np.ndarray) -> None:
        if len(values):
            self.tops[number] += np.bincount(places(values) >> 16, minlength=TOPS)
            self.sums[number] += exact(float(values.sum(dtype=np.float64)))
            self.lows[number] = min(self.lows[number], float(values.min()))
            self.highs[number] = max(self.highs[number], float(values.max()))

    def sent(self) -> dict[str, Any]:
        """What add takes, without the zeros."""
        plain = {name: getattr(self, name) for name in ("images", "missing", "sums", "lows", "highs")}
        return {**plain, "whole": sparse(self.whole), "tops": sparse(self.tops)}

    def add(self, sent: dict[str, Any]) -> Self:
        """Add what another one sent."""
        self.images += sent["images"]
        for name, both in (("missing", _sum), ("sums", _sum), ("lows", min), ("highs", max)):
            setattr(self, name, [both(*pair) for pair in zip(getattr(self, name), sent[name], strict=True)])
        add_sparse(self.whole, sent["whole"])
        add_sparse(self.tops, sent["tops"])
        return self


def _sum(one: int, other: int) -> int:
    return one + other


def _are_whole(numbers: np.ndarray) -> bool:
    if not len(numbers):
        return True
    return bool(numbers.min() >= LOWEST and numbers.max() <= HIGHEST and (np.rint(numbers) == numbers).all())


@dataclass(frozen=True)
class Wanted:
    """What the second look is to count of a band.  Picklable."""

    mean: float
    tops: tuple[int, ...]
    """Upper halves near the percentiles, ascending."""
    low: float
    """Where the histogram begins and, in high, ends; what lies outside is in no bar."""
    high: float


@dataclass
class SecondLook:
    """What is wanted of each band."""

    wanted: tuple[Wanted, ...]
    images: int = 0
    measured: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)
    """Sums of squared deviations from the mean, in numbers.exact's unit."""
    bars: np.ndarray = field(default_factory=lambda: np.empty(0))
    """int64 (bands, BARS)"""
    lower: list[np.ndarray] = field(default_factory=list)
    """Of each band int64 (its tops, LOWS)."""

    def __post_init__(self) -> None:
        self.measured, self.squares = [0] * len(self.wanted), [0] * len(self.wanted)
        self.bars = np.zeros((len(self.wanted), BARS), np.int64)
        self.lower = [np.zeros((len(each.tops), LOWS), np.int64) for each in self.wanted]

    def image(self, numbers: np.ndarray, scale: Scale) -> None:
        """Count an image: float32 (C, values), NaN where nothing was measured."""
        self.images += 1
        for number, wanted in enumerate(self.wanted):
            found = numbers[number][~np.isnan(numbers[number])]
            values = scale.values(found, number)
            self.measured[number] += len(values)
            self.squares[number] += exact(float(np.square(values.astype(np.float64) - wanted.mean).sum()))
            place = places(values)
            slots = np.full(TOPS, -1, np.int64)
            slots[list(wanted.tops)] = range(len(wanted.tops))
            slot = slots[place >> 16]
            near = slot >= 0
            np.add.at(self.lower[number].reshape(-1), slot[near] * LOWS + (place[near] & (LOWS - 1)), 1)
            self.bars[number] += bar_counts(values, None, wanted.low, wanted.high)

    def sent(self) -> dict[str, Any]:
        """What add takes, without the zeros."""
        plain = {name: getattr(self, name) for name in ("images", "measured", "squares", "bars")}
        return {**plain, "lower": [sparse(each) for each in self.lower]}

    def add(self, sent: dict[str, Any]) -> Self:
        """Add what another one sent."""
        self.images += sent["images"]
        for name in ("measured", "squares"):
            setattr(self, name, [_sum(*pair) for pair in zip(getattr(self, name), sent[name], strict=True)])
        self.bars += sent["bars"]
        for mine, part in zip(self.lower, sent["lower"], strict=True):
            add_sparse(mine, part)
        return self


def bar_counts(values: np.ndarray, counts: np.ndarray | None, low: float, high: float) -> np.ndarray:
    """int64 (BARS,) of bars of equal width from low to high.  counts: how often each value came; None = once."""
    inside = (values >= low) & (values <= high)
    width = (high - low) / BARS
    place = np.minimum((values[inside].astype(np.float64) - low) / width, BARS - 1).astype(np.int64)
    found = np.zeros(BARS, np.int64)
    np.add.at(found, place, 1 if counts is None else counts[inside])
    return found
