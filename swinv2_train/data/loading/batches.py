"""Which samples make which micro-batch of a rank: what the loader's workers are asked for, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from swinv2_train.data.loading.order import Location, Order, rank_batch, rank_shards


@dataclass(frozen=True)
class BatchRequest:
    """One micro-batch, as a worker is asked for it."""

    locations: list[Location | None]
    """None for a row that only fills the batch up."""
    fallback_shard: int
    """A shard that this rank reads anyway: replacements of damaged samples come from it."""
    upcoming_shards: list[int] | None
    """The shards to have at hand, the most urgent first; None when all are on this machine."""


@dataclass(frozen=True)
class TrainBatches:
    """The endless sequence of one rank's training micro-batches, from image number `start` on."""

    order: Order
    start: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    ahead: int | None
    """Shards to fetch before they are needed; None when all are on this machine."""

    def __iter__(self) -> Iterator[BatchRequest]:
        position = self.start
        while True:
            mine = rank_batch(self.order, position, self.global_batch_size, self.rank, self.world_size)
            upcoming_shards = None if self.ahead is None else self._upcoming_shards(position, self.ahead)
            for first in range(0, len(mine), self.micro_batch_size):
                locations: list[Location | None] = list(mine[first : first + self.micro_batch_size])
                yield BatchRequest(locations, mine[first][1], upcoming_shards)
            position += self.global_batch_size

    def _upcoming_shards(self, position: int, ahead: int) -> list[int]:
        now, later = rank_shards(self.order, position, self.global_batch_size, self.rank, self.world_size, ahead)
        return now + later


@dataclass(frozen=True)
class EvalBatches:
    """One pass of one rank: its share of the samples in their own order, as many micro-batches as any other rank's."""

    counts: tuple[int, ...]
    micro_batch_size: int
    rank: int
    world_size: int
    ahead: int | None

    def __iter__(self) -> Iterator[BatchRequest]:
        ends = np.cumsum(self.counts)
        num_samples = int(ends[-1])
        share = math.ceil(num_samples / self.world_size)
        first, last = self.rank * share, min((self.rank + 1) * share, num_samples)

        def shard_of(sample: int) -> int:
            return int(np.searchsorted(ends, min(sample, num_samples - 1), side="right"))

        for start in range(first, first + share, self.micro_batch_size):
            locations: list[Location | None] = []
            for sample in range(start, start + self.micro_batch_size):
                shard = shard_of(sample)
                within = int(sample - (ends[shard] - self.counts[shard]))
                locations.append((0, shard, within) if sample < last else None)
            fallback_shard, final = shard_of(start), shard_of(max(first, last - 1))
            upcoming_shards = (
                None if self.ahead is None else list(range(fallback_shard, min(fallback_shard + self.ahead, final) + 1))
            )
            yield BatchRequest(locations, fallback_shard, upcoming_shards)
