"""Files in a cache folder that others might have put there: opened without following links, private, compared once.

What is not a file of our own making (a link, a pipe, a folder, a second name of somebody's file) is taken away, and the
cache makes it again.  Only what lies in the cache folder is ever touched, never what a link in it leads to.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_train.data.shards.tar_index import build_index, index_times, load_index

PRIVATE = 0o600
PRIVATE_FOLDER = 0o700

ROOM_LOCK = "room.lock"
"""A file of every cache folder, by whose lock its room is shared."""

_SLOTS, _DIGEST_BYTES = 2**16, 16


class Compared:
    """Which files were found to be what was fetched, since this start; the worker processes of a rank share it.

    It lies in memory that forks share, without a lock: at worst a file is compared twice.
    """

    def __init__(self) -> None:
        self._table = mmap.mmap(-1, _SLOTS * _DIGEST_BYTES)

    def __contains__(self, file: tuple[object, ...]) -> bool:
        digest, place = self._place(file)
        return self._table[place : place + _DIGEST_BYTES] == digest

    def add(self, file: tuple[object, ...]) -> None:
        """Note a file, in the place of another one where the table is full: that one is compared again."""
        digest, place = self._place(file)
        self._table[place : place + _DIGEST_BYTES] = digest

    def __reduce__(self) -> tuple[Any, ...]:
        return Compared, ()  # another process has made no comparison

    @staticmethod
    def _place(file: tuple[object, ...]) -> tuple[bytes, int]:
        digest = hashlib.blake2b(repr(file).encode(), digest_size=_DIGEST_BYTES).digest()
        return digest, int.from_bytes(digest[:4], "little") % _SLOTS * _DIGEST_BYTES


def make_private_folder(path: Path) -> None:
    """Make a folder, and those above it, for this user alone; one that is there stays as it is."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process
            folder.mkdir(PRIVATE_FOLDER)


def is_our_cache(folder: Path) -> bool:
    """Whether a folder is a shard cache that this user has made, and into which nobody else may write."""
    try:
        found, lock = folder.stat(), (folder / ROOM_LOCK).lstat()
    except OSError:
        return False
    ours = found.st_uid == lock.st_uid == os.geteuid() and not found.st_mode & 0o022
    return ours and stat.S_ISDIR(found.st_mode) and stat.S_ISREG(lock.st_mode)


def open_lock_file(path: Path) -> int:
    """A descriptor of an empty file of our own, made where there is none.  What else has its name is taken away."""
    for _ in range(3):
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path, flags, PRIVATE)
        except OSError:
            if not is_foreign(path):
                raise
        else:
            if _is_own(os.fstat(descriptor)):
                return descriptor
            os.close(descriptor)
        take_away(path)
    raise OSError(f"{path} is no file, and comes again whenever it is removed")


def open_own(path: Path) -> int | None:
    """A descriptor for reading; None where there is nothing, or something else than a file of our own."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        if os.path.lexists(path) and not is_foreign(path):
            raise
        return None
    if _is_own(os.fstat(descriptor)):
        return descriptor
    os.close(descriptor)
    return None


def take_away(path: Path) -> None:
    """Remove what has this name, be it a file, a link (not what it leads to) or a folder."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def is_whole(descriptor: int, size: int, sha256: str) -> bool:
    """Whether an open file holds just these bytes; reads all of it."""
    if os.fstat(descriptor).st_size != size:
        return False
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def is_index_of(index: Path, shard: Path, size: int, image_member: str | None = None) -> bool:
    """Whether an index file is the one of a shard of these bytes; reads the shard's headers."""
    try:
        if not _is_own(index.lstat()):
            return False
        made = build_index(str(shard), checksums=False, image_member=image_member)
        index_times(str(shard), made)
        return bool(np.array_equal(load_index(str(index), size), made))
    except (OSError, ValueError):
        return False


def _is_own(status: os.stat_result) -> bool:
    """A file with one name: what a second name leads to may be somebody's, and a lock file is emptied."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def is_foreign(path: Path) -> bool:
    """Whether something has this name that is no file of our own."""
    try:
        return not _is_own(path.lstat())
    except FileNotFoundError:
        return False
