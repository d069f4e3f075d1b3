"""The global order of several sources that are mixed by weights: a pure function from a position, as of one source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swinv2_train.data.loading.order import GlobalOrder, Location


class MixedOrder:
    """Position -> (pass over the source, shard, index); shards are counted on from source to source.

    counts: of each source the samples per shard.  weights: of each source its samples in a window of sum(weights)
    positions, whole numbers; every window takes its turns in the same order, each source's evenly spread.  A source's
    own samples follow in the order that it has alone, pass after pass, so a pass holds each of them exactly once.
    """

    def __init__(
        self, counts: Sequence[Sequence[int]], weights: Sequence[int], seed: int, lanes: int, window_shards: int
    ) -> None:
        assert len(counts) == len(weights) and min(weights) >= 1, weights
        self.orders = [GlobalOrder(each, seed, lanes, window_shards) for each in counts]
        self.weights = tuple(weights)
        self.window = sum(weights)
        self.first_shards = np.cumsum([0, *(len(each) for each in counts)]).tolist()
        self.num_samples = sum(order.num_samples for order in self.orders)
        self._turns = turns_of(weights)
        before = np.zeros((self.window + 1, len(weights)), dtype=np.int64)
        for place, number in enumerate(self._turns):
            before[place + 1] = before[place]
            before[place + 1, number] += 1
        self._before: list[list[int]] = before.tolist()  # place in the window -> samples of each source before it

    @property
    def round(self) -> int:
        """Positions within which every lane of every source has its turn."""
        return self.window * max(
            -(-order.lanes // weight) for order, weight in zip(self.orders, self.weights, strict=True)
        )

    def locate(self, position: int) -> Location:
        """Where the sample at stream position `position` >= 0 lies; the first number is the pass over its source."""
        order, own, first_shard = self.own(position)
        passes, shard, index = order.locate(own)
        return passes, first_shard + shard, index

    def own(self, position: int) -> tuple[GlobalOrder, int, int]:
        """The source's order at a position, the position there, and the number of its first shard."""
        windows, place = divmod(position, self.window)
        number = self._turns[place]
        own = windows * self.weights[number] + self._before[place][number]
        return self.orders[number], own, self.first_shards[number]

    def lane(self, position: int) -> tuple[int, int]:
        """The lane that a position reads; those of a number lie beside each other, so ranks share every source."""
        order, own, first_shard = self.own(position)
        return order.lane(own)[0], first_shard

    def pace(self, first_shard: int) -> float:
        """Positions from one sample of a lane to its next, on average, of the source whose first shard this is."""
        number = self.first_shards.index(first_shard)
        return self.orders[number].lanes * self.window / self.weights[number]

    def counted(self, position: int) -> list[int]:
        """How many samples of each source stand before a position."""
        windows, place = divmod(position, self.window)
        return [windows * weight + before for weight, before in zip(self.weights, self._before[place], strict=True)]


def turns_of(weights: Sequence[int]) -> list[int]:
    """The source at each position of a window, so that before any position each has had its share to less than one.

    weights: whole numbers.  A source's turn t may come once t - 1 shares are due and must come when t are: unit jobs
    with times, which are kept by taking the most urgent one (R. Tijdeman, The chairman assignment problem, 1980, shows
    that they can be).  Of equally urgent ones the first whose turn's middle comes.
    """
    window, taken = sum(weights), [0] * len(weights)
    turns: list[int] = []
    for position in range(1, window + 1):
        number = min(
            (number for number, weight in enumerate(weights) if position * weight > taken[number] * window),
            key=lambda i: (-(-(taken[i] + 1) * window // weights[i]), (2 * taken[i] + 1) / weights[i], i),
        )
        taken[number] += 1
        turns.append(number)
    return turns
