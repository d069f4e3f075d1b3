"""Images whose labels stand somewhere else: in a table beside them (data.labels), or in the .json of each sample.

What a label is depends on the task: one class (LABEL), the classes that apply (LABELS), or numbers (VALUES).  A table
says which classes apply, or are not known to, and all others do not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Any, Self, cast

import numpy as np

from swinv2_train.config import ConfigError, DataConfig
from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import canonical, in_order, is_number, listed
from swinv2_train.data.sample import LABEL, LABELS, MEMBERS, OBJECTS, VALUES, Sample, SampleError, Targets
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.tar_index import IMAGE_EXTENSIONS
from swinv2_train.data.sources.base import Reader, Source
from swinv2_train.data.sources.label_table import Table, read_table

TRUE, FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
"""What a cell of a column that is a class may hold, in small letters, besides nothing: not known."""
NAN = "nan"
"""What programs write for a number that is not known."""
_IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_JSON_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class Labels:
    """Of many images, or rows of a table, what one of the three kinds says of each.  Picklable.

    Several classes are kept as their numbers one image after the other; -1 - c stands for class c that is not known to
    apply or not.
    """

    kind: str
    """LABEL, LABELS or VALUES."""
    values: np.ndarray
    """LABEL: int64 (n,), -1 without one.  LABELS: int32 of all images.  VALUES: float64 (n, K), nan where not known."""
    ends: np.ndarray | None = None
    """LABELS: int64 (n,), where each image's numbers end in values."""
    missing: np.ndarray | None = None
    """LABELS: bool (n,), where nothing is known of an image."""
    classes: tuple[str, ...] | None = None
    """Names of the classes; None where they are known by number alone, and for VALUES."""
    unknown: tuple[int, ...] = ()
    """Classes of which nothing is known in any image."""
    by_columns: bool = False
    """LABELS: each class is a column, so that of others nothing is known."""

    def of(self, rows: np.ndarray) -> Self:
        """Those of these rows, int64 (m,), in this order; -1 = nothing is known."""
        there = rows >= 0
        if self.ends is None:
            values = self.values[np.where(there, rows, 0)]
            values[~there] = -1 if self.kind == LABEL else math.nan
            return replace(self, values=values)
        assert self.missing is not None
        starts = np.concatenate([[0], self.ends[:-1]])[rows]
        lengths = np.where(there, self.ends[rows] - starts, 0)
        ends = np.cumsum(lengths)
        places = np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
        return replace(self, values=self.values[places], ends=ends, missing=~there | self.missing[rows])

    def absent(self) -> np.ndarray:
        """bool (n,), where nothing is known of an image."""
        if self.missing is not None:
            return self.missing
        found: np.ndarray = self.values < 0 if self.kind == LABEL else np.isnan(self.values).all(axis=1)
        return found

    def target(self, place: int) -> Targets:
        """Of one image; empty where nothing is known."""
        if self.ends is None:
            if self.kind == VALUES:
                values = self.values[place]
                return {} if np.isnan(values).all() else {"values": values}
            return {"label": int(self.values[place])} if self.values[place] >= 0 else {}
        assert self.missing is not None
        if self.missing[place]:
            return {}
        numbers = self.values[self.ends[place - 1] if place else 0 : self.ends[place]]
        return {"labels": np.concatenate([numbers, -1 - np.array(self.unknown, np.int32)])}

    def used(self) -> frozenset[int]:
        """The classes that images have."""
        if self.kind == VALUES:
            return frozenset()
        return frozenset(np.unique(self.values[self.values >= 0]).tolist())

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same with numbers[c] for class c, of names `classes`; a number below 0 is of a class that is dropped."""
        place = np.asarray([*numbers, -1], np.int64)
        if self.ends is None:
            return replace(self, values=np.where(self.values >= 0, place[self.values], -1), classes=classes)
        known = self.values >= 0
        found = place[np.where(known, self.values, -1 - self.values)]
        kept = found >= 0
        values = np.where(known, found, -1 - found)[kept].astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(kept)])[self.ends]
        others = set(range(len(classes or ()))) - set(numbers) if self.by_columns else set[int]()
        unknown = {int(place[each]) for each in self.unknown if place[each] >= 0} | others
        return replace(self, values=values, ends=ends, classes=classes, unknown=tuple(sorted(unknown)))

    def digest(self) -> bytes:
        """Distinguishes these from others."""
        found = hashlib.sha256(f"{self.kind} {self.classes} {self.unknown}".encode())
        for part in (self.values, self.ends, self.missing):
            found.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        return found.digest()


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


# --------------------------------------------------------------------------------------------------------------------
# From a configuration


def with_labels_of(
    source: Source, key: str, data: DataConfig, kind: str | None, rows: int, say: Callable[[str], None]
) -> Source:
    """The source with the labels that a task asks for: of data.labels, else of its samples' .json, else its own.

    key: what named the source.  kind: LABEL, LABELS or VALUES; None = the task has none of these.  rows: classes, or
    numbers of an image.  say: receives notes, a line each.
    Raises ConfigError for a table that does not fit the images, and where nothing gives them labels of this kind.
    """
    evaluated = key != "data.shards" and not key.startswith("data.mix.")
    labels_key = "data.eval_labels" if evaluated and data.eval_labels is not None else "data.labels"
    path = data.eval_labels if labels_key == "data.eval_labels" else data.labels
    if path is not None and kind is not None:
        return _with_table(source, key, path, labels_key, data, kind, say)
    if kind in (None, LABEL):
        return source
    if sum(source.unannotated) >= source.num_samples:
        raise ConfigError(
            f"{key} has no {kind}, which task.target asks for; name a table: data.labels=FILE.csv, or pack a .json "
            f'with {{"{kind}": [...]}} beside each image'
        )
    names = source.classes if kind == LABELS else None
    place = {name: number for number, name in enumerate(names or ())}
    assert kind is not None
    return JsonLabels(source, f".{MEMBERS[OBJECTS].suffix}", kind, rows, names, None, place)


def _with_table(
    source: Source, key: str, path: str, labels_key: str, data: DataConfig, kind: str, say: Callable[[str], None]
) -> TableLabels:
    if source.cache is not None:
        raise ConfigError(
            f"{labels_key} ({path}) needs the keys of all images before the first step, and {key} is at an address; "
            "copy the shards to a disk, or pack their labels into them"
        )
    table, keys, columns = _chosen_columns(path, labels_key, data)
    labels = read_labels(table, columns, kind, data.labels_separator)
    row_of = _rows_by_key(table, keys)
    rows = np.full(source.num_samples, -1, np.int64)
    seen, number, first, header = set[str](), 0, "", _bare(keys)
    reader = source.open_reader()
    for shard, count in enumerate(source.counts):
        for index in range(count):
            sample = reader.key(shard, index)
            row = row_of.get(canonical(sample), -1)
            if row >= 0:
                if sample in seen:
                    raise ConfigError(f"{labels_key} ({path}): two images of {key} have the key '{sample}'; rename one")
                seen.add(sample)
            elif sample == header:
                raise ConfigError(
                    f"{labels_key} ({path}): its first line is of the image '{shown(sample)}'; put a line with "
                    "names of columns before it"
                )
            else:
                first = first or sample
            rows[number] = row
            number += 1
    reader.close()
    if not seen:
        example = next(iter(row_of), "")
        raise ConfigError(
            f"{labels_key} ({path}): no row is of an image of {key}: the images are called '{shown(first)}' and the "
            f"like, and the rows '{shown(example)}' (column '{shown(keys)}'); name the column of paths "
            f"from the folder of {key} on: data.labels_key=COLUMN"
        )
    if len(seen) < len(row_of):
        say(f"note: {len(row_of) - len(seen)} of {len(row_of)} rows of {path} are of no image of {key}")
    labels = labels.of(rows)
    if absent := int(labels.absent().sum()):
        which = f", '{shown(first)}' among them" if first else ": their cells are empty"
        say(f"note: {absent} of {source.num_samples} images of {key} have no label in {path}{which}")
    return TableLabels(source, f"a row with a label in {path}", labels)


def _chosen_columns(path: str, labels_key: str, data: DataConfig) -> tuple[Table, str, tuple[str, ...]]:
    """The table, the column of keys and the columns of labels."""
    wanted = None
    if data.labels_columns is not None and data.labels_key is not None:
        wanted = [data.labels_key, *data.labels_columns]
    table = read_table(path, labels_key, wanted)
    keys = table.columns[0] if data.labels_key is None else data.labels_key
    columns = data.labels_columns
    if columns is None:
        columns = [name for name in table.columns if name != keys]
    for column, key in [(keys, "data.labels_key"), *((each, "data.labels_columns") for each in columns)]:
        if column not in table.cells:
            raise ConfigError(f"{key}: {table.name} has no column '{shown(column)}'; there are {listed(table.columns)}")
    if not columns or keys in columns:
        raise ConfigError(
            f"{table.name} has the columns {listed(table.columns)}, of which '{shown(keys)}' names the images and none "
            "is left for labels; name them: data.labels_key=COLUMN data.labels_columns=[COLUMN]"
        )
    return table, keys, tuple(columns)


def _rows_by_key(table: Table, column: str) -> dict[str, int]:
    """The row of each image, by its key."""
    found: dict[str, int] = {}
    for row, given in enumerate(table.cells[column]):
        if _is_empty(given):
            raise ConfigError(f"{table.place(row, column)} is empty; it names the image")
        key = _bare(given if isinstance(given, str) else _name(given))
        if found.setdefault(key, row) != row:
            raise ConfigError(
                f"{table.place(row, column)}: '{shown(given)}' is in {'line' if table.is_text else 'row'} "
                f"{table.lines[found[key]]} already; leave one row for each image"
            )
    return found


def _bare(given: str) -> str:
    """The key of the image that a cell names: a path without its ending, with / between folders."""
    name = canonical(given.strip().replace("\\", "/").removeprefix("./"))
    return name.rpartition(".")[0] if name.lower().endswith(_IMAGE_ENDINGS) else name


def read_labels(table: Table, columns: Sequence[str], kind: str, separator: str) -> Labels:
    """What the columns say of each row.  Raises ConfigError naming line and column."""
    if kind == VALUES:
        return Labels(VALUES, np.stack([_numbers(table, column) for column in columns], axis=1))
    if kind == LABELS and len(columns) > 1:
        return _flags(table, columns)
    if len(columns) > 1:
        raise ConfigError(
            f"{table.name} has the columns {listed(columns)} for one class of an image; name one of them: "
            "data.labels_columns=[COLUMN], or set task.target=multilabel or regression"
        )
    (column,) = columns
    cells = table.cells[column]
    if kind == LABEL:
        names: list[list[str]] = [[] if _is_empty(each) else [_name(each)] for each in cells]
    else:
        names = [_names(each, separator) for each in cells]
    distinct = {name for row in names for name in row}
    nothing = {name for name in distinct if name.lower() == NAN}
    if distinct != nothing and all(map(is_number, distinct - nothing)):  # beside numbers nan is no class
        names, distinct = [[name for name in row if name not in nothing] for row in names], distinct - nothing
    else:
        nothing = set()
    by_number = all(map(is_number, distinct))
    classes = None if by_number else in_order(distinct)
    if by_number and any(int(name[:20]) >= 2**31 for name in distinct):
        raise ConfigError(f"{table.name}, column '{shown(column)}': a class is a number below 2^31, or a name")
    place = {name: int(name) for name in distinct} if by_number else {name: n for n, name in enumerate(classes or ())}
    if kind == LABEL:
        return Labels(LABEL, np.array([place[row[0]] if row else -1 for row in names], np.int64), classes=classes)
    flat = np.array([place[name] for row in names for name in dict.fromkeys(row)], np.int32)
    ends = np.cumsum([len(set(row)) for row in names], dtype=np.int64)
    missing = np.array([each is None or _is_nan(each) or str(each) in nothing for each in cells], bool)
    return Labels(LABELS, flat, ends, missing, classes)


def _is_empty(given: Any) -> bool:
    """Whether a cell says nothing: without text in CSV, in Parquet a null or the nan that programs write for it."""
    return given is None or given == "" or _is_nan(given)


def _is_nan(given: Any) -> bool:
    return isinstance(given, float) and math.isnan(given)


def _name(given: Any) -> str:
    if isinstance(given, float | Decimal) and given % 1 == 0:  # pandas writes whole numbers so where a cell is empty
        given = int(given)
    name = canonical(str(given).strip())
    return name[:-2] if name.endswith(".0") and is_number(name[:-2]) else name


def _names(given: Any, separator: str) -> list[str]:
    """The classes of a cell: a list of Parquet, or text between separators; an empty cell names none."""
    if isinstance(given, str):
        given = given.split(separator)
    parts = given if isinstance(given, list | tuple) else [given]
    return [name for name in (_name(part) for part in parts if not _is_empty(part)) if name]


def _numbers(table: Table, column: str) -> np.ndarray:
    """float64 (rows,), nan for an empty cell and for nan."""
    cells = table.cells[column]
    try:
        found = np.array([math.nan if each is None or each == "" else float(each) for each in cells], np.float64)
    except (TypeError, ValueError):
        found = None
    if found is None or np.isinf(found).any():
        row = next(row for row, each in enumerate(cells) if not _is_number(each))
        hint = "; write decimals with a point" if "," in str(cells[row]) else ""
        raise ConfigError(
            f"{table.place(row, column)}: '{shown(cells[row])}' is no finite number{hint}, or name columns "
            "of numbers: data.labels_columns=[COLUMN]"
        )
    return found


def _is_number(given: Any) -> bool:
    try:
        return given is None or given == "" or not math.isinf(float(given))
    except (TypeError, ValueError):
        return False


def _flags(table: Table, columns: Sequence[str]) -> Labels:
    """A column of 0 and 1 per class."""
    states = np.zeros((len(table.lines), len(columns)), np.int8)
    meaning = {**dict.fromkeys(TRUE, 1), **dict.fromkeys(FALSE, 0), "": -1, NAN: -1}
    for number, column in enumerate(columns):
        for row, given in enumerate(table.cells[column]):
            state = -1 if given is None else meaning.get(str(given).lower())
            if state is None:
                raise ConfigError(
                    f"{table.place(row, column)}: '{shown(given)}' is neither 0 nor 1 nor empty; of several columns "
                    "each is a class (data.labels_columns), of one its cells name the classes"
                )
            states[row, number] = state
    rows, places = np.nonzero(states)
    values = np.where(states[rows, places] > 0, places, -1 - places).astype(np.int32)
    ends = np.cumsum((states != 0).sum(axis=1))
    names = tuple(canonical(column) for column in columns)
    return Labels(LABELS, values, ends, np.all(states < 0, axis=1), names, by_columns=True)
