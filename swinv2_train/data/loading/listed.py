"""Micro-batches of images that are to be answered for: any ranges of a source, in its order; damaged ones are listed.

Nothing is replaced and nothing is left out: a row of weight 0 is an image that cannot be read, with its cause, or only
fills the batch up, behind the images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from swinv2_train.config import DataConfig
from swinv2_train.data.loading.batches import BatchRequest
from swinv2_train.data.loading.loader import Transform, _Fetcher, example_image
from swinv2_train.data.loading.order import Location
from swinv2_train.data.loading.rows import Row
from swinv2_train.data.loading.shared_memory import Batch
from swinv2_train.data.loading.workers import Workers
from swinv2_train.data.sample import Targets
from swinv2_train.data.sources.base import Source


class ListedBatch(NamedTuple):
    """Some images of a source, one after the other."""

    first: int
    """The number of the first, over all shards."""
    keys: list[str]
    """One for each image."""
    problems: list[str | None]
    """Of each image: why it cannot be read; None where it can."""
    rows: Batch
    """Of the transform, with "weight"; perhaps more of them than images."""


class ListedLoader:
    """The images of ranges of numbers, [first, end) each, in batches of one size that end with a range.

    transform: needs no targets.  told: what is not told again, of images and files; what is told is added.  None = all
    is told.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        transform: Transform,
        batch_size: int,
        ranges: Sequence[tuple[int, int]],
        told: set[str] | None = None,
    ) -> None:
        self.source, self.batch_size = source, batch_size
        self.config = replace(config, on_bad_sample="replace")
        self._starts = [
            (first, min(first + batch_size, end)) for low, end in ranges for first in range(low, end, batch_size)
        ]
        self._fetch = _Lister(source, self.config, transform, seed=0, max_open=4, rows=batch_size, held=2)
        self._workers = Workers(self, told)

    def __len__(self) -> int:
        """Batches."""
        return len(self._starts)

    def __iter__(self) -> Iterator[ListedBatch]:
        batches = self._workers.run(self._fetch, self._requests(), self.config)
        for (first, end), batch in zip(self._starts, batches, strict=True):
            causes = iter(batch.pop("problems"))
            absent = (batch["weight"] == 0).tolist()[: end - first]
            problems = [next(causes)["cause"] if each else None for each in absent]
            yield ListedBatch(first, batch.pop("keys")[: end - first], problems, batch)

    def close(self) -> None:
        """Stop the worker processes, if any."""
        self._workers.close()

    def _requests(self) -> Iterator[BatchRequest]:
        ends = list(accumulate(self.source.counts))
        ahead = self.config.fetch_ahead_shards if self.source.cache is not None else None
        for first, end in self._starts:
            known = [place_of(ends, number) for number in range(first, end)]
            places: list[Location | None] = [(0, *place) for place in known]
            places += [None] * (self.batch_size - len(places))
            shard = known[0][0]
            upcoming = None if ahead is None else list(range(shard, min(shard + ahead + 1, len(ends))))
            yield BatchRequest(places, shard, upcoming)


def place_of(ends: Sequence[int], number: int) -> tuple[int, int]:
    """The shard of an image and its number in that, by its number over all shards.  ends: of the shards' images."""
    shard = bisect_right(ends, number)
    return shard, number - (ends[shard - 1] if shard else 0)


class _Lister(_Fetcher):
    """Rows of nothing stand in for what cannot be read, whether or not anything can."""

    told_of_damage = "unreadable image"

    def _readable(self, fallback_shard: int) -> Row:
        if self._filler is None:
            unused: Any = np.random.default_rng(0)
            self._filler = self.transform(example_image(self.transform), Targets(), unused)
        return self._filler
