"""Images whose labels stand somewhere else: in a table beside them, or in the .json of each sample."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self, cast

import numpy as np

from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import canonical
from swinv2_train.data.sample import LABEL, LABELS, VALUES, Sample, SampleError, Targets
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.sources.base import Reader, Source
from swinv2_train.data.sources.labels import Labels

_JSON_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class LabelledSource:
    """The images of a source, with labels that it does not have itself.  Picklable."""

    source: Source
    labels_from: str
    """What gives a sample its label, for error texts."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples per shard."""
        return self.source.counts

    @property
    def num_samples(self) -> int:
        return self.source.num_samples

    @property
    def unsegmented(self) -> tuple[int, ...]:
        """Samples per shard without a label image."""
        return self.source.unsegmented

    @property
    def unannotated(self) -> tuple[int, ...]:
        """Samples per shard without a .json."""
        return self.source.unannotated

    @property
    def clips(self) -> tuple[int, ...]:
        """Samples per shard that are clips."""
        return self.source.clips

    @property
    def label_values(self) -> Mapping[int, int] | None:
        """Pixels of all label images by their value."""
        return self.source.label_values

    @property
    def cache(self) -> ShardCache | None:
        """Where shards at an address are kept on this machine."""
        return self.source.cache

    @cached_property
    def first_samples(self) -> tuple[int, ...]:
        """The number of each shard's first sample over all shards."""
        return tuple(np.cumsum([0, *self.counts]).tolist())

    def name(self, shard: int) -> str:
        """What messages call the shard."""
        return self.source.name(shard)


@dataclass(frozen=True, eq=False)
class TableLabels(LabelledSource):
    """Labels of a table."""

    labels: Labels
    """Of all samples, in the order of the shards."""

    @cached_property
    def unlabelled(self) -> tuple[int, ...]:
        """Samples per shard of which the table says nothing."""
        absent = self.labels.absent()
        return tuple(int(part.sum()) for part in np.split(absent, self.first_samples[1:-1]))

    @cached_property
    def label_range(self) -> tuple[int, int] | None:
        """Lowest and highest class; None for numbers."""
        used = self.labels.used()
        return (min(used), max(used)) if used else None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each class."""
        return self.labels.classes

    @property
    def used_labels(self) -> frozenset[int]:
        """The classes that images have."""
        return self.labels.used()

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same images with numbers[c] for class c, and names of these."""
        return replace(self, labels=self.labels.relabelled(numbers, classes))

    @cached_property
    def digest(self) -> str:
        """Distinguishes these samples and their labels from others."""
        return hashlib.sha256(self.source.digest.encode() + self.labels.digest()).hexdigest()

    def open_reader(self, max_open: int = 64) -> LabelledReader:
        """A reader that keeps at most max_open files open."""
        return LabelledReader(self, self.source.open_reader(max_open))

    def targets(self, place: int, sample: Sample) -> Targets:
        """Of the sample at this place over all shards."""
        return self.labels.target(place)


@dataclass(frozen=True, eq=False)
class JsonLabels(LabelledSource):
    """Labels of the .json of each sample: {"labels": [class, ...]}, a class by number or name, or {"values": [...]}."""

    kind: str
    """LABELS or VALUES."""
    rows: int
    """Classes, or numbers of an image."""
    classes: tuple[str, ...] | None
    """Name of each class; None where they are known by number alone."""
    numbers: tuple[int, ...] | None = None
    """What each class counts as; None = as itself."""
    place: Mapping[str, int] = field(default_factory=dict)
    """The number of each name in the files."""

    @property
    def unlabelled(self) -> tuple[int, ...]:
        """Samples per shard without a .json."""
        return self.source.unannotated

    @property
    def label_range(self) -> tuple[int, int] | None:
        """All classes that there may be, for the files are read with the images."""
        return (0, max(0, len(self.place or self.numbers or range(self.rows)) - 1)) if self.kind == LABELS else None

    @property
    def used_labels(self) -> frozenset[int]:
        """All classes that there may be."""
        return frozenset(range(self.label_range[1] + 1)) if self.label_range is not None else frozenset()

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same images with numbers[c] for class c, and names of these."""
        if self.numbers is not None:
            numbers = [each if each < 0 else numbers[each] for each in self.numbers]
        return replace(self, numbers=tuple(numbers), classes=classes)

    @property
    def digest(self) -> str:
        """Distinguishes these samples from others."""
        return self.source.digest

    def open_reader(self, max_open: int = 64) -> LabelledReader:
        """A reader that keeps at most max_open files open."""
        return LabelledReader(self, self.source.open_reader(max_open))

    def targets(self, place: int, sample: Sample) -> Targets:
        """Of a sample.  Raises SampleError for JSON of another form."""
        content = sample.targets.get("objects")
        if content is None:
            return {}
        try:
            found = json.loads(content) if len(content) <= _JSON_BYTES else None
        except (ValueError, RecursionError) as error:
            raise SampleError(f"its .json is no JSON ({shown(error)})") from error
        if not isinstance(found, dict) or not isinstance(found.get(self.kind), list):
            raise SampleError(f'its .json has no list "{self.kind}"')
        if self.kind == VALUES:
            return {"values": np.array([_json_number(each) for each in found[VALUES]], np.float64)}
        return {"labels": np.array([self._number(each) for each in found[LABELS]], np.int32)}

    def _number(self, given: Any) -> int:
        number = self.place.get(canonical(given), -1) if isinstance(given, str) else given
        if type(number) is int and 0 <= number < (self.rows if self.numbers is None else len(self.numbers)):
            number = number if self.numbers is None else self.numbers[number]
            if number >= 0:
                return number
        raise SampleError(f"its .json has the class {shown(given)}, which is none of the model's {self.rows}")


def _json_number(given: Any) -> float:
    """null is not known."""
    if given is None:
        return math.nan
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise SampleError(f"its .json has the value {shown(given)}, which is no number")
    return float(given)


@dataclass
class LabelledReader:
    """The source's own reader, whose samples get other labels.  Picklable."""

    labelled: TableLabels | JsonLabels
    reader: Reader

    def read(self, shard: int, index: int) -> Sample:
        """The sample's bytes, and its label."""
        sample = self.reader.read(shard, index)
        others = {name: value for name, value in sample.targets.items() if name not in (LABEL, LABELS, VALUES)}
        try:
            own = self.labelled.targets(self.labelled.first_samples[shard] + index, sample)
        except SampleError as error:
            raise SampleError(error.cause, sample.shard, sample.key) from error
        return replace(sample, targets=cast(Targets, {**others, **own}))

    def key(self, shard: int, index: int) -> str:
        """The sample's key."""
        return self.reader.key(shard, index)

    def place(self, shard: int, index: int) -> str:
        """Where its bytes lie within a larger file."""
        return self.reader.place(shard, index)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Say which shards will be read next."""
        self.reader.fetch_ahead(shards)

    def close(self) -> None:
        """Let go of what is open."""
        self.reader.close()
