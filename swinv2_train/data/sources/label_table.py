"""A table of labels beside images (data.labels): CSV or Parquet, read whole, by the names of its columns.

CSV is UTF-8 with or without a byte order mark; its first line names the columns, and of comma, semicolon and tab the
one that line has most of separates cells.  Cells may be quoted, and hold line breaks then.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import open_regular, read_bytes
from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import listed

TABLE_BYTES = 2**31
"""The most that a table may hold; one of a million images has 2^26."""
SEPARATORS = (",", ";", "\t")
PARQUET = (".parquet", ".pq")
"""What the name of a Parquet file ends in; any other is read as CSV."""


@dataclass(frozen=True)
class Table:
    """The columns of a file that are asked for."""

    path: str
    name: str
    """What errors call the file: its key and its path."""
    columns: tuple[str, ...]
    """All that there are."""
    cells: Mapping[str, Sequence[Any]]
    """By column, those that were asked for: of CSV text without blanks around it, of Parquet its own values."""
    lines: Sequence[int]
    """The line of the file at which each row ends; of Parquet the number of the row, from 1."""
    is_text: bool

    def place(self, row: int, column: str) -> str:
        """Where a cell is, for error texts."""
        return f"{self.name}: {'line' if self.is_text else 'row'} {self.lines[row]}, column '{shown(column)}'"


def read_table(path: str, key: str, wanted: Sequence[str] | None) -> Table:
    """The columns `wanted` of a file; None = all of them.

    key: the config key that named the file, for errors.  Raises ConfigError for a file that cannot be read or is no
    table, and for a column that it has not, or has twice.
    """
    name = f"{key} ({path})"
    try:
        if path.lower().endswith(PARQUET):
            return _read_parquet(path, name, wanted)
        return _read_csv(path, name, wanted)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}; name a CSV or Parquet file") from error


def _read_csv(path: str, name: str, wanted: Sequence[str] | None) -> Table:
    content = read_bytes(Path(path), TABLE_BYTES)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{name} is UTF-16; save it as CSV in UTF-8")
    if content.startswith(b"PAR1"):
        raise ConfigError(f"{name} is a Parquet file; let its name end in .parquet")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from error
    del content
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(text), strict=True)
    rows, lines = [], []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise ConfigError(f"{name}: line {reader.line_num}: {error}; mend the quotes around its cells") from error
    if not any(header):
        raise ConfigError(f"{name} is empty; its first line names the columns, such as 'file,label'")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise ConfigError(
                f"{name}: line {line} has {len(row)} cells, and the first line names {len(header)} columns; put cells "
                "that hold the separator in double quotes"
            )
    chosen = _places(header, wanted, name)
    cells = {column: [row[place].strip() for row in rows] for column, place in chosen.items()}
    return Table(path, name, tuple(header), cells, lines, is_text=True)


def _separator(text: str) -> str:
    """Of the first line, outside of quotes; a comma where it has none of them."""
    counts, quoted = dict.fromkeys(SEPARATORS, 0), False
    for char in text:
        if char == '"':
            quoted = not quoted
        elif not quoted and char in "\r\n":
            break
        elif not quoted and char in counts:
            counts[char] += 1
    return max(SEPARATORS, key=lambda each: counts[each])


def _read_parquet(path: str, name: str, wanted: Sequence[str] | None) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{name} needs pyarrow, which is not installed; pip install 'pyarrow>=16', or save the table as CSV"
        ) from error
    try:
        with open(open_regular(Path(path)), "rb") as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            header = list(file.schema_arrow.names)
            chosen = _places(header, wanted, name)
            table = file.read(columns=list(chosen))
            cells = {column: _values(table.column(column)) for column in chosen}
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{name} is no whole Parquet file ({shown(error)}); write it again") from error
    return Table(path, name, tuple(header), cells, range(1, table.num_rows + 1), is_text=False)


def _values(column: Any) -> list[Any]:
    """Of a column; texts that a program has written without saying so (binary, as Spark does) are text."""
    found: list[Any] = column.to_pylist()
    if "binary" not in str(column.type):
        return found
    return [_decoded(each) for each in found]


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _places(header: Sequence[str], wanted: Sequence[str] | None, name: str) -> dict[str, int]:
    """The place of each column."""
    names = header if wanted is None else wanted
    for column in names:
        if header.count(column) != 1:
            many = "has no column" if column not in header else "has more than one column"
            raise ConfigError(f"{name} {many} '{shown(column)}'; there are {listed(header)}")
    return {column: header.index(column) for column in names}
