"""Several sources as one, each with a share of every batch: data.mix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm
from typing import Self

import numpy as np

from swinv2_train.config import ConfigError, DataConfig
from swinv2_train.data.sample import Sample
from swinv2_train.data.shards.shard_cache import ShardCache, shard_cache_for
from swinv2_train.data.shards.tar_reader import added
from swinv2_train.data.sources.base import Reader, Source, open_source

MOST_WINDOW = 10_000
"""Positions after which the sources' turns begin again; a longer window would be a weight that nobody means."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """What is known of several sources; their shards are counted on from one to the next.  Picklable."""

    names: tuple[str, ...]
    sources: tuple[Source, ...]
    weights: tuple[int, ...]
    """Samples of each in a window of sum(weights) positions."""

    @cached_property
    def first_shards(self) -> tuple[int, ...]:
        """The number of each source's first shard, and of the one behind the last."""
        return tuple(np.cumsum([0, *(len(source.counts) for source in self.sources)]).tolist())

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(count for source in self.sources for count in source.counts)

    @property
    def num_samples(self) -> int:
        """Of all sources together: what an epoch of the mixture is as long as."""
        return sum(source.num_samples for source in self.sources)

    @property
    def unlabelled(self) -> tuple[int, ...]:
        """Samples per shard without a readable label."""
        return tuple(count for source in self.sources for count in source.unlabelled)

    @property
    def unsegmented(self) -> tuple[int, ...]:
        """Samples per shard without a label image."""
        return tuple(count for source in self.sources for count in source.unsegmented)

    @property
    def unannotated(self) -> tuple[int, ...]:
        """Samples per shard without a JSON of objects."""
        return tuple(count for source in self.sources for count in source.unannotated)

    @property
    def clips(self) -> tuple[int, ...]:
        """Samples per shard that are clips."""
        return tuple(count for source in self.sources for count in source.clips)

    @property
    def label_values(self) -> Mapping[int, int] | None:
        """Pixels of all sources' label images by their value; None where any does not know."""
        return added([source.label_values for source in self.sources])

    @property
    def label_range(self) -> tuple[int, int] | None:
        """Lowest and highest label; None without any."""
        ranges = [source.label_range for source in self.sources if source.label_range is not None]
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

    @property
    def labels_from(self) -> str:
        """What gives a sample its label, for error texts."""
        return " or ".join(dict.fromkeys(source.labels_from for source in self.sources))

    @property
    def classes(self) -> tuple[str, ...] | None:
        """All sources' classes by name, those of the first one first; None where any has numbers alone."""
        named = [source.classes for source in self.sources]
        if any(classes is None for classes in named):
            return None
        return tuple(dict.fromkeys(name for classes in named for name in classes or ()))

    @property
    def used_labels(self) -> frozenset[int]:
        """The labels that images have."""
        return frozenset().union(*(source.used_labels for source in self.sources))

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same images with numbers[label] for each label, and names of these."""
        return replace(self, sources=tuple(
            source if source.label_range is None else source.relabelled(numbers, classes) for source in self.sources
        ))  # fmt: skip

    @property
    def digest(self) -> str:
        """Distinguishes these samples and their numbering from others; weights are not part of it."""
        text = "\n".join(f"{name} {source.digest}" for name, source in zip(self.names, self.sources, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def cache(self) -> ShardCache | None:
        """Where shards at an address are kept on this machine, by all sources; None when nothing is far away."""
        return next((source.cache for source in self.sources if source.cache is not None), None)

    def part(self, shard: int) -> tuple[int, int]:
        """The number of a shard's source, and the shard's own number there."""
        number = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        while not self.sources[number].counts:  # one without shards begins where the next one does
            number -= 1
        return number, shard - self.first_shards[number]

    def name(self, shard: int) -> str:
        """What messages call the shard."""
        number, own = self.part(shard)
        return self.sources[number].name(own)

    def open_reader(self, max_open: int = 64) -> MixtureReader:
        """A reader that keeps at most max_open files open, or one of each source."""
        each = max(1, max_open // len(self.sources))
        return MixtureReader(self, [source.open_reader(each) for source in self.sources])


@dataclass
class MixtureReader:
    """The sources' own readers; keys have the source's name before them.  Picklable."""

    mixture: Mixture
    readers: list[Reader]

    def read(self, shard: int, index: int) -> Sample:
        """The sample's bytes."""
        number, own = self.mixture.part(shard)
        return self.readers[number].read(own, index)

    def key(self, shard: int, index: int) -> str:
        """NAME/KEY: what data.record_keys writes."""
        number, own = self.mixture.part(shard)
        return f"{self.mixture.names[number]}/{self.readers[number].key(own, index)}"

    def place(self, shard: int, index: int) -> str:
        """Where its bytes lie within a larger file."""
        number, own = self.mixture.part(shard)
        return self.readers[number].place(own, index)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Say which shards will be read next, to each source its own."""
        wanted: dict[int, list[int]] = {}
        for number, own in map(self.mixture.part, shards):
            wanted.setdefault(number, []).append(own)
        for number, own_shards in wanted.items():
            self.readers[number].fetch_ahead(own_shards)

    def close(self) -> None:
        """Let go of what is open."""
        for reader in self.readers:
            reader.close()


def open_mixture(
    data: DataConfig, progress: Callable[[str], None] | None, prepared: Callable[[Source, str], Source]
) -> Mixture:
    """The sources of data.mix, in the order of their names.  prepared: what each one is to become, given its key.

    Raises ConfigError and ShardError, naming the source's key.
    """
    names = tuple(sorted(data.mix))
    sources = []
    for name in names:
        shards, key = data.mix[name].shards, f"data.mix.{name}.shards"
        cache = shard_cache_for(shards, data)
        source = open_source(
            shards, key, progress, cache, data.verify, data.image_member, data.label_folders, data.annotations
        )
        if source.num_samples == 0:
            raise ConfigError(
                f"{key} ({shards}) holds no samples at all; name shards that hold some, or leave {name} out"
            )
        sources.append(prepared(source, key))
    return Mixture(names, tuple(sources), whole_weights({name: data.mix[name].weight for name in names}))


def whole_weights(weights: dict[str, float]) -> tuple[int, ...]:
    """The weights as the smallest whole numbers of the same ratios: 0.7, 0.2, 0.1 are 7, 2, 1.

    Raises ConfigError where their sum, the window, would be more than MOST_WINDOW.
    """
    exact = [Fraction(str(weight)) for weight in weights.values()]
    whole = [int(each * lcm(*(part.denominator for part in exact))) for each in exact]
    divisor = gcd(*whole)
    found = tuple(each // divisor for each in whole)
    if sum(found) > MOST_WINDOW:
        told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        raise ConfigError(
            f"data.mix: the weights ({told}) are {':'.join(map(str, found))}, which needs {sum(found):,} images to be "
            f"exact, more than {MOST_WINDOW:,}; round them, such as 0.7, 0.2 and 0.1"
        )
    return found
