"""From what was counted of images to mean, standard deviation, extremes, percentiles and histogram of each band."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.data.statistics.numbers import LOWS, Scale, at_place, exact, places, quotient
from swinv2_train.data.statistics.tally import LOWEST, FirstLook, SecondLook, Wanted, bar_counts

PERCENTILES = (1, 2, 25, 50, 75, 98, 99)


@dataclass(frozen=True)
class BandStatistics:
    """One band's values, scaled by data.scale, over all pixels that were measured."""

    mean: float
    std: float
    """Of the population (divided by the number of values), as numpy's."""
    low: float
    high: float
    percentiles: tuple[float, ...]
    """PERCENTILES, interpolated between two values as numpy does it."""
    nodata: float
    """Share of all pixels that were not measured."""
    bars: tuple[int, ...]
    """How many values lie in each of so many bars of equal width from bars_from to bars_to; few lie outside."""
    bars_from: float
    bars_to: float


def needs_second_look(first: FirstLook) -> bool:
    """Whether some image held more than whole numbers."""
    return bool(first.tops.any())


def check_measured(first: FirstLook, source: str, names: Sequence[str]) -> None:
    """Raise ConfigError, naming band and source, where a band was measured nowhere."""
    for number, name in enumerate(names):
        if not first.whole[number].any() and not first.tops[number].any():
            raise ConfigError(
                f"{source}: band {name} holds no data at all (data.nodata) in {first.images} images; leave it out by "
                "data.bands, or mend data.nodata"
            )


def check_varied(bands: Sequence[BandStatistics], source: str, names: Sequence[str]) -> None:
    """Raise ConfigError, naming band and source, where a band has one value, by whose deviation nothing is divided."""
    for name, band in zip(names, bands, strict=True):
        if band.std == 0:
            raise ConfigError(
                f"{source}: band {name} is {band.low:g} everywhere, so its std is 0 and nothing can be divided by it; "
                "leave it out by data.bands (or name the value by data.nodata, or widen data.scale.clip)"
            )


def of_whole_numbers(first: FirstLook, scale: Scale) -> list[BandStatistics]:
    """Statistics of images that hold whole numbers alone: how often each comes says everything."""
    return [_of_counts(*_counted(first, scale, number), first.missing[number]) for number in range(first.bands)]


def wanted_of(first: FirstLook, scale: Scale) -> tuple[Wanted, ...]:
    """What a second look is to count."""
    return tuple(_wanted(*_merged(first, scale, number)) for number in range(first.bands))


def of_two_looks(first: FirstLook, second: SecondLook, scale: Scale) -> list[BandStatistics]:
    """Statistics of any images.  Raises ConfigError where the second look has met other values than the first."""
    found = []
    for number, wanted in enumerate(second.wanted):
        tops, _, low, high = _merged(first, scale, number)
        count = int(tops.sum())
        if (count, first.images) != (second.measured[number], second.images):
            raise ConfigError(
                f"the images were others when they were read again ({second.images} with {second.measured[number]} "
                f"values in a band, {first.images} with {count} before); let them rest, and start again"
            )
        found.append(BandStatistics(
            wanted.mean, math.sqrt(quotient(second.squares[number], count)), low, high,
            _percentiles(count, _by_halves(tops, wanted.tops, second.lower[number])),
            first.missing[number] / (count + first.missing[number]),
            tuple(second.bars[number].tolist()), wanted.low, wanted.high,
        ))  # fmt: skip
    return found


def mixed(parts: Sequence[Sequence[BandStatistics]], weights: Sequence[int]) -> list[BandStatistics]:
    """Mean, std and share of no data of a mixture, of which each source has its weight, however large its images are.

    Percentiles and histogram have no meaning for it that would be exact: they are nan and empty.
    """
    total = sum(weights)
    found = []
    for bands in zip(*parts, strict=True):
        pairs = list(zip(weights, bands, strict=True))
        mean = math.fsum(weight * band.mean for weight, band in pairs) / total
        square = math.fsum(weight * (band.std**2 + (band.mean - mean) ** 2) for weight, band in pairs) / total
        found.append(replace(
            bands[0], mean=mean, std=math.sqrt(square), low=min(band.low for band in bands),
            high=max(band.high for band in bands), percentiles=(math.nan,) * len(PERCENTILES), bars=(),
            nodata=math.fsum(weight * band.nodata for weight, band in pairs) / total,
        ))  # fmt: skip
    return found


def _counted(first: FirstLook, scale: Scale, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The values, ascending, that a band's whole numbers become, and how often each came."""
    codes = np.flatnonzero(first.whole[number])
    values = scale.values((codes + LOWEST).astype(np.float32), number).astype(np.float64)
    order = np.argsort(values, kind="stable")
    return values[order], first.whole[number][codes][order]


def _of_counts(values: np.ndarray, counts: np.ndarray, missing: int) -> BandStatistics:
    count, ends = int(counts.sum()), np.cumsum(counts)
    mean = math.fsum(values * counts) / count
    variance = math.fsum(np.square(values - mean) * counts) / count

    def nth(place: int) -> float:
        return float(values[np.searchsorted(ends, place, side="right")])

    percentiles = _percentiles(count, nth)
    low, high = percentiles[0], percentiles[-1]
    if low == high:
        low, high = float(values[0]), float(values[-1])
    bars = bar_counts(values, counts, low, high) if low < high else np.zeros(0, np.int64)
    return BandStatistics(
        mean, math.sqrt(variance), float(values[0]), float(values[-1]), percentiles, missing / (count + missing),
        tuple(bars.tolist()), low, high,
    )  # fmt: skip


def _merged(first: FirstLook, scale: Scale, number: int) -> tuple[np.ndarray, int, float, float]:
    """Of all values of a band: how often each upper half of a place came, their sum, the smallest and the largest."""
    values, counts = _counted(first, scale, number)
    tops, total = first.tops[number].copy(), first.sums[number]
    low, high = first.lows[number], first.highs[number]
    if len(values):
        np.add.at(tops, places(values.astype(np.float32)) >> 16, counts)
        total += exact(math.fsum(values * counts))
        low, high = min(low, float(values[0])), max(high, float(values[-1]))
    return tops, total, low, high


def _wanted(tops: np.ndarray, total: int, low: float, high: float) -> Wanted:
    count, ends = int(tops.sum()), np.cumsum(tops)
    found = [[int(np.searchsorted(ends, place, side="right")) for place in _around(count, q)] for q in PERCENTILES]
    near = tuple(sorted({top for both in found for top in both}))
    bars_from = max(low, at_place(near[0] * LOWS))
    bars_to = min(high, at_place(near[-1] * LOWS + LOWS - 1))
    return Wanted(quotient(total, count), near, *((bars_from, bars_to) if bars_from < bars_to else (low, low + 1.0)))


def _by_halves(tops: np.ndarray, near: Sequence[int], lower: np.ndarray) -> Callable[[int], float]:
    """The n-th smallest value, where the lower halves of its place were counted."""
    ends = np.cumsum(tops)

    def nth(place: int) -> float:
        top = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[top] - tops[top])
        within = int(np.searchsorted(np.cumsum(lower[near.index(top)]), place - before, side="right"))
        return at_place(top * LOWS + within)

    return nth


def _around(count: int, percent: int) -> tuple[int, int]:
    """The places, among `count` sorted values, of the two between which a percentile lies."""
    below = percent * (count - 1) // 100
    return below, min(below + 1, count - 1)


def _percentiles(count: int, nth: Callable[[int], float]) -> tuple[float, ...]:
    found = []
    for percent in PERCENTILES:
        low, high = map(nth, _around(count, percent))
        share = float(Fraction(percent * (count - 1), 100) % 1)
        found.append(low + (high - low) * share)
    return tuple(found)
