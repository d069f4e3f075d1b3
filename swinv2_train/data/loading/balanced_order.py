"""The global order in which every class has the same share of each epoch: a pure function from a position.

An epoch has as many samples as the images are.  Each class has an equal number of them (to one, and those that are over
go round), and its images take their turns: every one of a class is used equally often, to one, at any place of the run.
So images of rare classes come several times in an epoch, and those of common ones not in every one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from swinv2_train.data.loading.order import GlobalOrder, Location, generator
from swinv2_train.data.sample import ShardError

_TURN_STREAM = 3  # spawn key of the turns of a class's images; order.py uses 0 and 1, loader.py 2


class _Uses(NamedTuple):
    """Of an epoch."""

    samples: np.ndarray
    """The sample of each use, over all shards, sorted."""
    before: np.ndarray
    """How often it was used before."""
    starts: np.ndarray
    """The place of each shard's first use, and the end."""


class BalancedOrder(GlobalOrder):
    """Position -> (how often the sample was used before, shard, index), as of an epoch of repeated samples.

    counts: samples per shard.  labels: (samples,), each one's class over all shards; below 0 = none, never used.
    Lanes and windows are GlobalOrder's, of the repeated samples; the first number gives repetitions other crops.
    """

    def __init__(self, counts: Sequence[int], labels: np.ndarray, seed: int, lanes: int, window_shards: int) -> None:
        super().__init__(counts, seed, lanes, window_shards)
        assert len(labels) == self.num_samples, (len(labels), self.num_samples)
        self.members = [np.flatnonzero(labels == each) for each in np.unique(labels[labels >= 0])]
        """Of each class that images have, their numbers over all shards."""
        if not self.members:
            raise ShardError("data.balanced: no image of data.shards has a class; set data.balanced=false")
        self._first = np.concatenate([[0], np.cumsum(self.counts)])
        self._uses: OrderedDict[int, _Uses] = OrderedDict()

    def locate(self, position: int) -> Location:
        """Where the sample at stream position `position` >= 0 lies, and how often it was used before."""
        epoch, shard, place = super().locate(position)
        used = self._epoch(epoch)
        number = int(used.starts[shard]) + place
        return int(used.before[number]), shard, int(used.samples[number] - self._first[shard])

    def shard_counts(self, epoch: int) -> np.ndarray:
        """Uses of each shard's samples in an epoch."""
        return np.diff(self._epoch(epoch).starts)

    def uses_before(self, epoch: int, which: int) -> int:
        """Uses of all samples of a class, by its place among those that images have, before an epoch."""
        count = len(self.members)
        even, over = divmod(self.num_samples, count)
        return even * epoch + max(0, over * epoch - which + count - 1) // count

    def _epoch(self, epoch: int) -> _Uses:
        if epoch not in self._uses:
            parts = [self._of_class(epoch, which) for which in range(len(self.members))]
            samples, before = (np.concatenate(each) for each in zip(*parts, strict=True))
            order = np.lexsort((before, samples))
            samples = samples[order]
            self._uses[epoch] = _Uses(samples, before[order], np.searchsorted(samples, self._first))
            if len(self._uses) > 2:  # as GlobalOrder's layouts
                self._uses.popitem(last=False)
        return self._uses[epoch]

    def _of_class(self, epoch: int, which: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a class that an epoch uses, one as often as it is used, and how often each was before."""
        members = self.members[which]
        size, first, last = len(members), self.uses_before(epoch, which), self.uses_before(epoch + 1, which)
        passes = np.arange(first // size, -(-last // size))
        samples, before = np.tile(members, (len(passes), 1)), np.repeat(passes[:, None], size, axis=1)
        for row in {0, len(passes) - 1} if len(passes) else ():  # those of which a part lies in other epochs
            samples[row] = generator(self.seed, _TURN_STREAM, which, int(passes[row])).permutation(members)
        within = slice(first - first // size * size, last - first // size * size)
        return samples.reshape(-1)[within], before.reshape(-1)[within]
