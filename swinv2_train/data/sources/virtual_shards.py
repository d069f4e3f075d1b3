"""Images that are not packed, in the order and the shards in which swinv2-make-shards would pack them.

Folders and data sets usually lie sorted by class, so shards of neighbours would hold few classes each, and so would
the batches mixed from them: the images are shuffled once, by a fixed seed, and every 4,000 make a shard, which exists
in numbers only.  They are the command's own defaults: a run on a folder sees what a run on its packed shards sees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

PACKING_SEED = 0
SAMPLES_PER_SHARD = 4000


def packing_order(count: int, seed: int = PACKING_SEED) -> list[int]:
    """The numbers 0 .. count - 1 in the order in which the images are packed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True, eq=False)
class VirtualShards:
    """What is known of unpacked images before the first one is read; arrays are in packing order.  Picklable."""

    path: str
    """The directory."""
    labels: np.ndarray
    """int64 (images,), -1 without a label."""
    classes: tuple[str, ...] | None
    """Name of each label; None where labels have no names, or there are none."""
    digest: str
    """sha256 over what distinguishes these images and their order from others; a resumed run compares it."""

    @property
    def cache(self) -> None:
        """None: the images lie on this machine's disks."""
        return

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Images per shard."""
        whole, rest = divmod(len(self.labels), SAMPLES_PER_SHARD)
        return (SAMPLES_PER_SHARD,) * whole + ((rest,) if rest else ())

    @cached_property
    def unlabelled(self) -> tuple[int, ...]:
        """Images per shard without a label."""
        ends = np.cumsum(self.counts)
        return tuple(int((shard < 0).sum()) for shard in np.split(self.labels, ends[:-1]))

    @property
    def unsegmented(self) -> tuple[int, ...]:
        """Images per shard without a label image: all of them, where the source knows of none."""
        return self.counts

    @property
    def unannotated(self) -> tuple[int, ...]:
        """Images per shard without a JSON of objects: all of them, where the source knows of none."""
        return self.counts

    @property
    def clips(self) -> tuple[int, ...]:
        """Clips per shard: none, where the source knows of none."""
        return (0,) * len(self.counts)

    @property
    def label_values(self) -> None:
        """None: nothing has looked at the label images yet."""
        return

    @cached_property
    def label_range(self) -> tuple[int, int] | None:
        """Lowest and highest label; None without any."""
        known = self.labels[self.labels >= 0]
        return (int(known.min()), int(known.max())) if len(known) else None

    @cached_property
    def used_labels(self) -> frozenset[int]:
        """The labels that images have."""
        return frozenset(np.unique(self.labels[self.labels >= 0]).tolist())

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same images with numbers[label] for each label, and names of these."""
        known = self.labels >= 0
        labels = self.labels.copy()
        labels[known] = np.asarray(numbers, "<i8")[self.labels[known]]
        return replace(self, labels=labels, classes=classes)

    def name(self, shard: int) -> str:
        """What messages call the shard: the directory, for the shard itself is nowhere."""
        return self.path


class VirtualShardsReader:
    """What readers of unpacked images have in common."""

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Does nothing, as nothing is far away."""

    def place(self, shard: int, index: int) -> str:
        """An image is the whole of its bytes, so there is nothing to add."""
        return ""

    def close(self) -> None:
        """Does nothing, as nothing is kept open."""


def packed_index(shard: int, index: int) -> int:
    """The place of a sample in packing order."""
    return shard * SAMPLES_PER_SHARD + index
