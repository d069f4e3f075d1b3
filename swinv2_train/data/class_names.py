"""Names of classes: which folders are any, their order, and the file beside shards that says what their labels mean."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.config.shown import shown
from swinv2_train.data.sample import ShardError
from swinv2_train.storage.json_files import listing, read_json, text

CLASSES_NAME = "classes.txt"
"""Beside shards: the name of each label, one a line."""

RUN_CLASSES = "classes.json"
"""In a run directory: the names of the model's classes, for those who look."""

CLASSES = listing(text())
"""The names as JSON holds them, label by label."""

CLASSES_BYTES = 2**25
"""The most that a list of names may hold."""
_SHOWN_CHARACTERS, _SHOWN_NAMES = 60, 5
_LEFT_OUT = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot", "lost+found",
    "$recycle.bin", "recycler", "system volume information", "network trash folder", "temporary items",
}  # fmt: skip
"""What storage boxes and operating systems leave in folders, in small letters."""
_WORDNET = re.compile(r"n\d{8}")


def is_left_out(part: str) -> bool:
    """True for a file or folder, by its own name, that no user made: hidden, macOS's, a NAS's thumbnails, a bin."""
    return part.startswith((".", "__MACOSX")) or part.casefold() in _LEFT_OUT


def canonical(name: str) -> str:
    """One form of a name that Unicode writes in several: macOS tells "é" from other systems' "é" by its bytes."""
    return unicodedata.normalize("NFC", name)


def is_number(name: str) -> bool:
    """Whether a class is called by its number."""
    return name.isascii() and name.isdigit()


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The classes of these names, each once: numbers by their value, then the others as text."""
    return tuple(sorted({canonical(name) for name in names}, key=_place))


def _place(name: str) -> tuple[bool, int, str]:
    return (not is_number(name), int(name[:4000]) if is_number(name) else 0, name)


def are_wordnet(names: Sequence[str]) -> bool:
    """Whether the names are ImageNet's folders, n01440764 and its like, which others call in words."""
    return all(_WORDNET.fullmatch(name) for name in names)


def listed(names: Sequence[str]) -> str:
    """The first few of the names."""
    first = ", ".join(shown(name, _SHOWN_CHARACTERS) for name in names[:_SHOWN_NAMES])
    return f"{first} and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else first


def class_names_text(names: Sequence[str]) -> str:
    """What classes.txt holds."""
    return "".join(f"{name}\n" for name in names)


def read_class_names(path: Path, shown_as: str | None = None) -> tuple[str, ...] | None:
    """The names in a classes.txt, label by label; None where there is none.

    shown_as: what errors call the file, else its path.  Raises ShardError for a file that cannot be such a list.
    """
    name = shown_as or str(path)
    try:
        content = read_bytes(path, CLASSES_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ShardError(f"{name} cannot be read: {error.strerror}; mend it, for it names the labels") from error
    except ConfigError as error:
        raise ShardError(f"{error}; {name} is a list of the classes' names, one a line") from error
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff").replace("\r\n", "\n")
    names = tuple(canonical(line) for line in text.removesuffix("\n").split("\n"))
    if len(set(names)) < len(names) or "" in names:
        doubled = next((each for each in names if names.count(each) > 1), "")
        what = f"lists '{shown(doubled)}' twice" if doubled else "has an empty line"
        raise ShardError(f"{name} {what}; it is a list of the classes' names, one a line, in the order of their labels")
    return names


def read_run_classes(run_dir: Path) -> list[str]:
    """The names of a run's classes, to be looked at; none where it has none, or no readable list."""
    try:
        names: list[str] = read_json(run_dir / RUN_CLASSES, CLASSES_BYTES, CLASSES)
    except (FileNotFoundError, ConfigError):
        return []
    return names


def check_class_count(classes: Sequence[str] | None, key: str, num_classes: int) -> None:
    """Raises ConfigError where the images that this key names have more classes than the model."""
    if classes is not None and len(classes) > num_classes:
        raise ConfigError(
            f"task.num_classes ({num_classes}) is too small: {key} has {len(classes)} classes; set "
            f"task.num_classes={len(classes)} or more"
        )
