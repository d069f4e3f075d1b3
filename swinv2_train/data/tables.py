"""Tables of answers on disk: CSV, JSON lines and Parquet, each written row by row in one way.

A cell is a number, a text, or a list of such; None where there is no answer.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from swinv2_train.config import ConfigError

ENDINGS = (".csv", ".jsonl", ".parquet")
_ROWS_AT_ONCE = 10_000
"""Of a Parquet file, in memory and in a group of rows."""


class Column(NamedTuple):
    """What the cells of a column are."""

    kind: str
    """int, float or str; floats: lists of numbers."""
    length: int | None = 0
    """Of lists of such: how many there are in each; None = any number; 0: no lists."""


def check_table(path: Path, key: str) -> None:
    """Raises ConfigError, naming the key, for a path of no kind that is written here."""
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{key} ({path}) ends in none of {', '.join(ENDINGS)}; name such a file")
    if path.suffix == ".parquet":
        _pyarrow(key)


def can_write_parquet() -> bool:
    """Whether pyarrow is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def write_table(
    file: IO[bytes], ending: str, columns: Mapping[str, Column], rows: Iterable[Mapping[str, Any]]
) -> None:  # fmt: skip
    """Write rows, each a cell by name, as the ending says; a column that a row does not have is None there.

    CSV has a heading; a list of a fixed length becomes so many columns (NAME_1, ...), any other list JSON.
    """
    write = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[ending]
    write(file, columns, rows)


def _write_csv(file: IO[bytes], columns: Mapping[str, Column], rows: Iterable[Mapping[str, Any]]) -> None:
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    writer = csv.writer(text, lineterminator="\n")
    heads = []
    for name, column in columns.items():
        heads += [f"{name}_{place + 1}" for place in range(column.length)] if column.length else [name]
    writer.writerow(heads)
    for row in rows:
        cells: list[Any] = []
        for name, column in columns.items():
            value = row.get(name)
            if column.length:
                cells += ["" for _ in range(column.length)] if value is None else value
            elif column.length is None and value is not None:
                cells.append(json.dumps(value))
            else:
                cells.append("" if value is None else value)
        writer.writerow(cells)
    text.flush()
    text.detach()


def _write_jsonl(file: IO[bytes], columns: Mapping[str, Column], rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        given = {name: row[name] for name in columns if row.get(name) is not None}
        file.write(json.dumps(given, allow_nan=False).encode() + b"\n")


def _write_parquet(file: IO[bytes], columns: Mapping[str, Column], rows: Iterable[Mapping[str, Any]]) -> None:
    arrow = _pyarrow("out")
    import pyarrow.parquet as parquet

    plain = {"int": arrow.int64(), "float": arrow.float64(), "str": arrow.string()}
    plain["floats"] = arrow.list_(arrow.float64())
    types = {name: plain[kind] if length == 0 else arrow.list_(plain[kind]) for name, (kind, length) in columns.items()}
    schema = arrow.schema(list(types.items()))
    with parquet.ParquetWriter(file, schema) as writer:
        for part in _parts(rows):
            cells = {name: [_parquet_text(row.get(name)) for row in part] for name in types}
            writer.write_table(arrow.table(cells, schema=schema))


def _parquet_text(value: Any) -> Any:
    """Names of files that are no text keep what of them is; Parquet has UTF-8 alone."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value


def _parts(rows: Iterable[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    part: list[Mapping[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == _ROWS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def _pyarrow(key: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            f"{key}: Parquet needs pyarrow, which is not installed ({error}): pip install 'pyarrow>=16' (in the "
            "checkout pip install -e '.[huggingface]'), or name a .csv or .jsonl file"
        ) from error
    return pyarrow
