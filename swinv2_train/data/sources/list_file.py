"""Files with a list of clips or images and their labels, a line each, as Kinetics is passed on: ``path label``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.config.shown import shown
from swinv2_train.data.sample import LABEL_BYTES, ShardError
from swinv2_train.data.sources.folder import Folder, check_unique
from swinv2_train.data.sources.listing import ending, is_clip, is_image
from swinv2_train.data.sources.virtual_shards import packing_order

LIST_EXTENSIONS = (".txt", ".csv")
"""What the names of such lists end in."""
_FILE_BYTES = 2**30
_THREADS = 16


class Listed(NamedTuple):
    """What a list names."""

    root: str
    """The folder below which all files lie."""
    names: list[str]
    """Their paths from there on, in the list's order."""
    labels: list[int]
    sizes: list[int]
    """Bytes of each; -1 for one that is not there."""


def is_list(path: str) -> bool:
    """Whether a value of data.shards and its like names a list."""
    return path.lower().endswith(LIST_EXTENSIONS) and os.path.isfile(path)


def read_list(
    path: str, key: str, progress: Callable[[str], None] | None = None, labelled: bool = True
) -> Listed:  # fmt: skip
    """The files that a list names: a path, from the list's folder on or absolute, and a label from 0 on, with spaces,
    a tab or a comma between them.

    key: what errors call the list.  progress: hears how many files are not there.  labelled: whether every line must
    have a label; else a path alone will do.  Raises ShardError for a line of another form, a file that is named twice
    or is neither image nor clip, both of these in one list, and where no file is there at all.
    """
    what, folder = f"{key} '{path}'", os.path.dirname(os.path.abspath(path))
    try:
        text = read_bytes(Path(path), _FILE_BYTES).decode("utf-8", "surrogateescape")
    except (OSError, ConfigError) as error:
        raise ShardError(f"{what} cannot be read: {error}") from error
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if not line.strip():
            continue
        comma = "," in line and " " not in line.strip() and "\t" not in line.strip()
        name, *rest = line.strip().rsplit("," if comma else None, 1)
        label = rest[0].strip() if rest else ""
        if not labelled and is_image(os.path.basename(line.strip())):
            name, label = line.strip(), "0"  # which nobody reads
        if not label.isascii() or not label.isdigit() or len(label) > LABEL_BYTES:
            raise ShardError(
                f"{what}: line {number} ({shown(line, 80)}) is not 'path label', a label being a number from 0 on; a "
                "list of other columns must be written anew"
            )
        if not is_image(os.path.basename(name)):
            raise ShardError(
                f"{what}: line {number} names {shown(name, 80)}, which is neither an image nor a clip by its ending "
                f"({ending(name)})"
            )
        paths.append(os.path.normpath(os.path.join(folder, name)))
        labels.append(int(label))
    if not paths:
        raise ShardError(f"{what} names no file; it must hold lines 'path label'")
    clips = sum(map(is_clip, paths))
    if 0 < clips < len(paths):
        raise ShardError(f"{what} names {clips} clips and {len(paths) - clips} images; a list is of one kind")
    root = os.path.commonpath([os.path.dirname(each) for each in paths])
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(_size, paths))
    missing = [each for each, size in zip(paths, sizes, strict=True) if size < 0]
    if len(missing) == len(paths):
        raise ShardError(f"{what}: none of its {len(paths)} files is there, such as {shown(paths[0], 200)}")
    if missing and progress is not None:
        progress(
            f"warning: {what}: {len(missing)} of its {len(paths)} files are not there, such as "
            f"{shown(missing[0], 200)}; they count as damaged samples (data.on_bad_sample)"
        )
    names = [os.path.relpath(each, root) for each in paths]
    check_unique(names, what)
    return Listed(root, names, labels, sizes)


def open_list(
    path: str, key: str, progress: Callable[[str], None] | None = None, in_order: bool = False
) -> Folder:  # fmt: skip
    """The files that a list names, as a folder of them; labels have no names.  Arguments and errors as read_list's.

    in_order: as the list has them, with their endings in their keys, and perhaps without labels; else in the order of
    packing.
    """
    listed = read_list(path, key, progress, labelled=not in_order)
    count = len(listed.names)
    order = np.arange(count) if in_order else packing_order(count)
    encoded = [listed.names[number].encode("utf-8", "surrogateescape") for number in order]
    names, ends = b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype="<i8")
    sizes, labels = (np.array(each, "<i8")[order] for each in (listed.sizes, listed.labels))
    digest = hashlib.sha256(b"list\0")
    for part in (names, ends.tobytes(), sizes.tobytes(), labels.tobytes()):
        digest.update(part)
    return Folder(listed.root, labels, None, digest.hexdigest(), names, ends, sizes, keyed_by_name=in_order)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
