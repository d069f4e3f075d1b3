"""Which labels the images of a source get: those of data.labels, of their samples' .json, or their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from swinv2_train.config import ConfigError, DataConfig
from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import canonical, listed
from swinv2_train.data.sample import LABEL, LABELS, MEMBERS, OBJECTS
from swinv2_train.data.shards.tar_index import IMAGE_EXTENSIONS
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.label_cells import class_name, is_empty, read_labels
from swinv2_train.data.sources.label_table import Table, read_table
from swinv2_train.data.sources.labelled import JsonLabels, TableLabels

_IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


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
        if is_empty(given):
            raise ConfigError(f"{table.place(row, column)} is empty; it names the image")
        key = _bare(given if isinstance(given, str) else class_name(given))
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
