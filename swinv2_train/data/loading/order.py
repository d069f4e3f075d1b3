"""The global order of samples: a pure function from a stream position to (epoch, shard, index in the shard).

Every epoch is an exact permutation of the samples, whatever the number of ranks and workers, and positions run on over
the epoch border, so one integer resumes a run anywhere.  Reading stays local: an epoch's permuted shards are cut into
`lanes`, and within a lane only `window_shards` consecutive shards are shuffled together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from swinv2_train.data.sample import ShardError

Location = tuple[int, int, int]
"""(epoch, shard, index in the shard)"""

_SHARD_STREAM, _BLOCK_STREAM = 0, 1  # spawn keys: the two uses of the seed never share random numbers


@dataclass(frozen=True)
class _Lane:
    block_starts: list[int]
    """First element of every block within the lane."""
    blocks: list[list[tuple[int, int, int]]]
    """Per block the (shard, first index, last index + 1) pieces that are shuffled together."""


class GlobalOrder:
    """Position -> (epoch, shard, index), a function of (counts, seed, lanes, window_shards) alone.

    counts: samples per shard, zeros allowed.  Lanes x window_shards shards are mixed at a time.
    """

    def __init__(self, counts: Sequence[int], seed: int, lanes: int, window_shards: int) -> None:
        assert lanes >= 1 and window_shards >= 1, (lanes, window_shards)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.lanes, self.window_shards = seed, lanes, window_shards
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise ShardError("data.shards holds no samples at all; name shards that hold some")
        self._layouts: OrderedDict[int, list[_Lane]] = OrderedDict()
        self._shuffled: OrderedDict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def locate(self, position: int) -> Location:
        """Where the sample at stream position `position` >= 0 lies."""
        epoch, within = divmod(position, self.num_samples)
        element, lane_number = divmod(within, self.lanes)
        lane = self._layout(epoch)[lane_number]
        block = bisect_right(lane.block_starts, element) - 1
        shards, indices = self._block(epoch, lane_number, block)
        element -= lane.block_starts[block]
        return epoch, int(shards[element]), int(indices[element])

    def shard_counts(self, epoch: int) -> np.ndarray:
        """Samples of each shard in an epoch."""
        return self.counts

    @property
    def round(self) -> int:
        """Positions within which every lane has its turn."""
        return self.lanes

    def own(self, position: int) -> tuple[GlobalOrder, int, int]:
        """The order of the source at a position, the position there, and the number of its first shard."""
        return self, position, 0

    def lane(self, position: int) -> tuple[int, int]:
        """The lane that a position reads, and the number of its source's first shard."""
        return (position % self.num_samples) % self.lanes, 0

    def pace(self, first_shard: int) -> float:
        """Positions from one sample of a lane to its next, of the source whose first shard this is."""
        return self.lanes

    def lane_blocks(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """The blocks of the lane at `position`, from the one in which it stands there on, without end.

        Yields for each block the number of this lane's samples between `position` and the block (0 for the first), and
        its shards.
        """
        epoch, within = divmod(position, self.num_samples)
        element, number = divmod(within, self.lanes)
        lane = self._layout(epoch)[number]
        block = bisect_right(lane.block_starts, element) - 1
        passed = -element
        while True:
            yield max(passed + lane.block_starts[block], 0), sorted({shard for shard, _, _ in lane.blocks[block]})
            block += 1
            if block == len(lane.blocks):
                passed += self.num_samples // self.lanes + (number < self.num_samples % self.lanes)
                epoch, block = epoch + 1, 0
                lane = self._layout(epoch)[number]

    def _layout(self, epoch: int) -> list[_Lane]:
        if epoch in self._layouts:
            return self._layouts[epoch]
        shards = generator(self.seed, _SHARD_STREAM, epoch).permutation(len(self.counts))
        counts = self.shard_counts(epoch)
        ends = np.cumsum(counts[shards])
        base, extra = divmod(self.num_samples, self.lanes)  # the first `extra` lanes are one sample longer
        lanes = []
        for number in range(self.lanes):
            low = number * base + min(number, extra)
            high = low + base + (number < extra)
            pieces = []
            for place in range(int(np.searchsorted(ends, low, side="right")), len(shards)):
                first = int(ends[place] - counts[shards[place]])
                if first >= high:
                    break
                start, stop = max(low, first), min(high, int(ends[place]))
                if stop > start:
                    pieces.append((int(shards[place]), start - first, stop - first))
            blocks = [pieces[i : i + self.window_shards] for i in range(0, len(pieces), self.window_shards)]
            starts = np.cumsum([0] + [sum(stop - start for _, start, stop in block) for block in blocks])
            lanes.append(_Lane(starts[:-1].tolist(), blocks))
        self._layouts[epoch] = lanes
        if len(self._layouts) > 2:  # a batch touches at most two epochs, unless it is larger than one
            self._layouts.popitem(last=False)
        return lanes

    def _block(self, epoch: int, lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        name = (epoch, lane, block)
        if name in self._shuffled:
            self._shuffled.move_to_end(name)
            return self._shuffled[name]
        pieces = self._layout(epoch)[lane].blocks[block]
        shards = np.concatenate([np.full(stop - start, shard, np.int32) for shard, start, stop in pieces])
        indices = np.concatenate([np.arange(start, stop, dtype=np.int32) for _, start, stop in pieces])
        shuffle = generator(self.seed, _BLOCK_STREAM, *name).permutation(len(shards))
        self._shuffled[name] = (shards[shuffle], indices[shuffle])
        if len(self._shuffled) > 2 * self.lanes:  # every lane stands in one block, or two at a border
            self._shuffled.popitem(last=False)
        return self._shuffled[name]


def generator(seed: int, *spawn_key: int) -> np.random.Generator:
    """Random numbers of one use of the seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=spawn_key)))


class Order(Protocol):
    """What ranks and loaders ask of an order: GlobalOrder, or MixedOrder of several."""

    num_samples: int

    @property
    def round(self) -> int: ...

    def locate(self, position: int) -> Location: ...

    def own(self, position: int) -> tuple[GlobalOrder, int, int]: ...

    def lane(self, position: int) -> tuple[int, int]: ...

    def pace(self, first_shard: int) -> float: ...


def rank_batch(order: Order, start: int, global_batch_size: int, rank: int, world_size: int) -> list[Location]:
    """Rank `rank`'s part of the global batch at positions [start, start + global_batch_size)."""
    return [order.locate(place) for place in rank_positions(order, start, global_batch_size, rank, world_size)]


def rank_positions(order: Order, start: int, global_batch_size: int, rank: int, world_size: int) -> list[int]:
    """The stream positions of rank_batch: the batch is sorted by lane and cut into equal slices, one for each rank.

    So a rank reads few lanes.
    """
    assert global_batch_size % world_size == 0, (global_batch_size, world_size)
    positions = sorted(range(start, start + global_batch_size), key=order.lane)
    share = global_batch_size // world_size
    return positions[rank * share : (rank + 1) * share]


def rank_shards(
    order: Order, start: int, global_batch_size: int, rank: int, world_size: int, ahead: int
) -> tuple[list[int], list[int]]:
    """Which shards rank `rank` mixes at position `start`, and the next `ahead` ones, soonest first.

    A batch smaller than the number of lanes touches some of them only, so as many batches are looked at as touch all.
    """
    lanes: dict[tuple[int, int], tuple[int, int]] = {}  # lane -> first and last position in it
    for batch in range(-(-order.round // global_batch_size)):
        first = start + batch * global_batch_size
        for position in rank_positions(order, first, global_batch_size, rank, world_size):
            lane = order.lane(position)
            lanes[lane] = (lanes.get(lane, (position,))[0], position)
    now: dict[int, None] = {}
    later: list[tuple[float, tuple[int, int], list[int]]] = []
    for lane, positions in lanes.items():
        (source, first, first_shard), (_, last, _) = map(order.own, positions)
        over_the_border = first // source.num_samples != last // source.num_samples  # of two epochs, maybe one more
        samples = (last - first) // source.lanes + over_the_border
        wanted = -(-ahead // source.window_shards)
        for begins, own_shards in source.lane_blocks(first):
            shards = [first_shard + shard for shard in own_shards]
            if begins <= samples:
                now |= dict.fromkeys(shards)
            elif wanted > 0:
                later.append((begins * order.pace(first_shard), lane, shards))
                wanted -= 1
            else:
                break
    coming = dict.fromkeys(shard for _, _, shards in sorted(later) for shard in shards if shard not in now)
    return list(now), list(coming)[:ahead]
