"""JSON that lies on a disk, or came from one, and may have been written by anybody: bounded, and checked by a shape.

    _MARKER = record({"step": whole(), "files": mapping(record({"bytes": whole(), "crc32": text()}))})
    marker = read_json(path, 2**24, _MARKER)

A shape is a function that takes a value and what messages call it, and raises ConfigError where it is something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.config.shown import shown

Shape = Callable[[Any, str], None]

_NAME_CHARACTERS = 200
"""Of a file's name: file systems take 255 bytes."""
LARGEST = 2**63 - 1
"""The largest whole number that a file of ours holds."""


def read_json(path: Path, most_bytes: int, shape: Shape, remedy: str = "restore it") -> Any:
    """The content of a JSON file of at most most_bytes that has this shape.

    Raises FileNotFoundError where there is none, ConfigError, which names the file, the place in it and the remedy, for
    everything else: it may be no file, larger, no JSON, or JSON of another form.
    """
    try:
        content = read_bytes(path, most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    return parse_json(content, str(path), shape, remedy)


def parse_json(content: bytes | str, origin: str, shape: Shape, remedy: str = "restore it") -> Any:
    """The content of JSON text that has this shape.  origin: what errors call it.  Raises ConfigError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: cannot be read ({shown(error, 300)}); {remedy}") from error
    try:
        shape(value, "")
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}; {remedy}") from error
    return value


# --------------------------------------------------------------------------------------------------------------------
# Shapes


def whole(low: int = 0, high: int = LARGEST) -> Shape:
    """A whole number of low <= number <= high."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _refusal(where, value, f"a whole number from {low} to {high}")

    return check


def number(low: float = -math.inf) -> Shape:
    """A finite number of at least low."""

    def check(value: Any, where: str) -> None:
        whole_or_not = isinstance(value, int | float) and not isinstance(value, bool)
        if not whole_or_not or not max(low, -LARGEST) <= value <= LARGEST:  # NaN is neither
            raise _refusal(where, value, "a number" if low == -math.inf else f"a number from {low:g} on")

    return check


def text(most: int = 10_000) -> Shape:
    """Text of at most `most` characters."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > most:
            raise _refusal(where, value, f"text of at most {most:,} characters")

    return check


def flag() -> Shape:
    """true or false."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, bool):
            raise _refusal(where, value, "true or false")

    return check


def anything() -> Shape:
    """Whatever it is; who reads it looks at it."""
    return lambda value, where: None


def choice(*values: str) -> Shape:
    """One of a few words."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in values:
            raise _refusal(where, value, f"one of {', '.join(values[:12])}")

    return check


def optional(shape: Shape) -> Shape:
    """null, or what has the shape."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            shape(value, where)

    return check


def listing(shape: Shape, most: int = 1_000_000, least: int = 0) -> Shape:
    """A list of least to `most` values of one shape."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _refusal(where, value, f"a list of {least} to {most:,} values")
        for index, each in enumerate(value):
            shape(each, f"{where}[{index}]")

    return check


def row(*shapes: Shape) -> Shape:
    """A list of just these values."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(shapes):
            raise _refusal(where, value, f"a list of {len(shapes)} values")
        for index, (each, shape) in enumerate(zip(value, shapes, strict=True)):
            shape(each, f"{where}[{index}]")

    return check


def mapping(shape: Shape, names: Shape | None = None) -> Shape:
    """An object whose values have one shape.  names: the shape of its names, for those that mean something."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refusal(where, value, "an object")
        for name, each in value.items():
            here = f"{where}.{shown(name, 100)}".lstrip(".")
            if names is not None:
                names(name, f"the name {here}")
            shape(each, here)

    return check


def record(fields: Mapping[str, Shape], may: Mapping[str, Shape] | None = None) -> Shape:
    """An object with these fields, and perhaps those of `may`; what else it has is not looked at."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refusal(where, value, "an object")
        for name, shape in fields.items():
            if name not in value:
                raise ConfigError(f"{where + '.' if where else ''}{name} is missing")
            shape(value[name], f"{where}.{name}".lstrip("."))
        for name, shape in (may or {}).items():
            if name in value:
                shape(value[name], f"{where}.{name}".lstrip("."))

    return check


def file_name(deep: bool = True) -> Shape:
    """The name of a file in the folder in which the JSON lies; it leads nowhere else.  deep: or of one below it."""

    def check(value: Any, where: str) -> None:
        parts = value.split("/") if isinstance(value, str) else [""]
        if (
            len(parts) > (8 if deep else 1)
            or max(map(len, parts)) > _NAME_CHARACTERS
            or "\0" in str(value)
            or {"", ".", ".."} & set(parts)
        ):
            raise _refusal(where, value, "the name of a file beside it")

    return check


def _refusal(where: str, value: Any, wanted: str) -> ConfigError:
    """A message about a value of any size, for which nothing of that size is built."""
    if isinstance(value, dict | list):
        given = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,} values"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        given = f"a number of {value.bit_length():,} bits"
    else:
        given = json.dumps(value[:100] if isinstance(value, str) else value, ensure_ascii=False)
    return ConfigError(f"{where or 'the content'} ({given}) must be {wanted}")
