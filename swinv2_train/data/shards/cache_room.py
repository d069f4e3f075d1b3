"""The room of a cache folder: reserved before a shard is fetched, and made by removing what was not used for longest.

All state lies in the files (shard_cache.py), so what a killed process has reserved is free again.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.cache_files import ROOM_LOCK, open_lock_file, open_own, take_away
from swinv2_train.data.shards.manifest import INDEX_SUFFIX

_MOST_NAMED = 4


class Arrival(NamedTuple):
    """A shard on its way to this host; as text how far it is, in MB of 10^6 bytes."""

    name: str
    came: int
    """Bytes that are here."""
    size: int
    """Bytes of the whole; 0 where no manifest says it."""

    def __str__(self) -> str:
        came, size = f"{self.came / 1e6:.1f}", f"{self.size / 1e6:.1f}"
        return f"{self.name}: {came} of {size} MB" if self.size else f"{self.name}: {came} MB so far"


class Arrivals(tuple[Arrival, ...]):
    """Shards on their way; as text one line, however many they are."""

    def __str__(self) -> str:
        more = f" and {len(self) - _MOST_NAMED} more" if len(self) > _MOST_NAMED else ""
        return "fetching " + ", ".join(map(str, self[:_MOST_NAMED])) + more


def arrivals(folder: str) -> Arrivals:
    """What any process of this host fetches into the cache at the moment, by name."""
    found = []
    for part in Path(folder).glob("*/*.part"):
        name = part.name.rsplit(".", 2)[0]
        with contextlib.suppress(OSError):  # it is here
            found.append(Arrival(name, part.lstat().st_size, part.with_name(f"{name}.lock").lstat().st_size))
    return Arrivals(sorted(found))


@contextlib.contextmanager
def room_lock(folder: str) -> Iterator[None]:
    """Inside, this process alone counts and reserves the cache's space."""
    with open(open_lock_file(Path(folder) / ROOM_LOCK), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reserve(folder: str, max_bytes: int, lock: int, size: int, name: str) -> bool:
    """Make room for `size` more bytes and note them in the lock file; False when too much is in use.

    name: what errors call the shard.  Raises ShardError where max_bytes could never hold it.
    """
    if size > max_bytes:
        raise ShardError(
            f"data.cache_gib ({max_bytes / 2**30:.3g}) is less than one shard: {name} has "
            f"{size / 2**30:.3g} GiB; raise it"
        )
    with room_lock(folder):
        os.ftruncate(lock, 0)
        used, shards = 0, []
        for path in Path(folder).glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                if path.suffix == ".shard":
                    shards.append((status.st_mtime_ns, path))
                if path.suffix == ".lock" and status.st_size and _abandoned(path):
                    continue
                if path.suffix in (".shard", ".npy", ".lock"):
                    used += status.st_size
        for _, path in sorted(shards):
            if used + size <= max_bytes:
                break
            used -= _evict(path)
        if used + size > max_bytes:
            return False
        os.ftruncate(lock, size)
        return True


def _evict(path: Path) -> int:
    """Remove a shard that nobody holds; the bytes that became free."""
    fd = open_own(path)
    if fd is None:
        return 0
    with contextlib.suppress(FileNotFoundError, BlockingIOError), open(fd, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        indexes = [Path(each) for each in glob.glob(f"{glob.escape(str(path))}*{INDEX_SUFFIX}")]
        freed = os.fstat(fd).st_size + sum(index.lstat().st_size for index in indexes)
        path.unlink()
        for index in indexes:
            take_away(index)
        return freed
    return 0


def _abandoned(lock: Path) -> bool:
    """Clean up after a process that was killed while it fetched: its lock is free but still reserves room."""
    with contextlib.suppress(BlockingIOError), open(open_lock_file(lock), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in glob.glob(f"{glob.escape(str(lock.with_suffix('')))}.*.part*"):
            Path(left).unlink(missing_ok=True)
        file.truncate(0)
        return True
    return False
