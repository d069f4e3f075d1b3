"""What the cells of a table say of each of its rows: classes or numbers.

A table says which classes apply, or are not known to, and all others do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import canonical, in_order, is_number, listed
from swinv2_train.data.sample import LABEL, LABELS, VALUES
from swinv2_train.data.sources.label_table import Table
from swinv2_train.data.sources.labels import Labels

TRUE, FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
"""What a cell of a column that is a class may hold, in small letters, besides nothing: not known."""
NAN = "nan"
"""What programs write for a number that is not known."""


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
        names: list[list[str]] = [[] if is_empty(each) else [class_name(each)] for each in cells]
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


def is_empty(given: Any) -> bool:
    """Whether a cell says nothing: without text in CSV, in Parquet a null or the nan that programs write for it."""
    return given is None or given == "" or _is_nan(given)


def _is_nan(given: Any) -> bool:
    return isinstance(given, float) and math.isnan(given)


def class_name(given: Any) -> str:
    """A cell's value as text, a whole number without its point."""
    if isinstance(given, float | Decimal) and given % 1 == 0:  # pandas writes whole numbers so where a cell is empty
        given = int(given)
    name = canonical(str(given).strip())
    return name[:-2] if name.endswith(".0") and is_number(name[:-2]) else name


def _names(given: Any, separator: str) -> list[str]:
    """The classes of a cell: a list of Parquet, or text between separators; an empty cell names none."""
    if isinstance(given, str):
        given = given.split(separator)
    parts = given if isinstance(given, list | tuple) else [given]
    return [name for name in (class_name(part) for part in parts if not is_empty(part)) if name]


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
