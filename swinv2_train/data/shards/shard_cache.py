"""A bounded folder of this machine for the shards of an address; all ranks and workers of the host share it.

A shard is fetched whole, checked against its sha256, and appears under its name by rename, so a half-written file never
counts.  What lies there already is compared with its checksum once per start, and fetched again where it is another;
the folder is this user's alone (0700), and yet a disk, or somebody, may have changed what is in it.  All state lies in
the files, and every lock is the kernel's (flock), so a killed process leaves nothing to repair.  For a shard NAME of an
address:

- ``NAME.<sha256>.shard`` and ``.shard.idx.npy``: its bytes and index.  Whoever reads it holds a shared lock on it; the
  file's date is its last use.  What nobody holds may go when room is needed, the least recently used first.
- ``NAME.lock``: whoever fetches it holds it, so that each shard is fetched once per host.  Its length (it has no
  content) is the room that the fetch has reserved.
- ``NAME.<process>.part``: what has come so far.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import glob
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from swinv2_train.config import DataConfig
from swinv2_train.data.class_names import CLASSES_BYTES, CLASSES_NAME, read_class_names
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.answers import Kind, MismatchError, PageError, answer_of, is_page, text_of
from swinv2_train.data.shards.cache_files import (
    PRIVATE,
    Compared,
    is_foreign,
    is_index_of,
    is_whole,
    make_private_folder,
    open_lock_file,
    open_own,
    take_away,
)
from swinv2_train.data.shards.cache_room import Arrivals, arrivals, reserve, room_lock
from swinv2_train.data.shards.manifest import (
    INDEX_SUFFIX,
    MANIFEST_BYTES,
    MANIFEST_NAME,
    index_shard,
    index_suffix,
    merge_entries,
    parse_entries,
    read_entries,
    user_cache,
)
from swinv2_train.data.shards.transfers import (
    RetryPolicy,
    base_name,
    download,
    folder_of,
    is_remote,
    redacted,
    retry,
    sibling_url,
    sizes,
)
from swinv2_train.storage.atomic import sha256_of

Content = TypeVar("Content")
PAGE_BYTES = 512
"""By its beginning a web page is told from a file."""
_PAGE_CAME = "a web page came in the place of the file"
TOLD_EVERY_SEC = 10.0
"""Fetches at the start that take longer say how far they are."""
TRANSFERS = 4
"""Transfers of one process at a time."""


class RemoteShard(NamedTuple):
    """A shard at an address, as its manifest knows it."""

    url: str
    size: int
    sha256: str


def shard_cache(config: DataConfig) -> ShardCache:
    """The cache that the data section describes."""
    folder = Path(config.cache_dir).expanduser() if config.cache_dir is not None else user_cache() / "shards"
    retry_policy = RetryPolicy(config.fetch_stall_sec, config.fetch_give_up_sec)
    return ShardCache(str(folder.absolute()), round(config.cache_gib * 2**30), retry_policy, config.image_member)


def shard_cache_for(pattern: str, config: DataConfig) -> ShardCache | None:
    """The same for a value of data.shards and its like; None, and no folder is asked for, where nothing is far away."""
    return shard_cache(config) if is_remote(pattern) else None


@dataclass(frozen=True)
class ShardCache:
    """Shards of addresses in a folder of at most max_bytes.  Picklable: it is its settings."""

    folder: str
    max_bytes: int
    retry_policy: RetryPolicy
    image_member: str | None = None
    """What follows KEY. in the names of images; None = one of IMAGE_EXTENSIONS."""
    compared: Compared = field(default_factory=Compared, compare=False, repr=False)
    """Which shards were compared with their checksum since this start: the folder may hold what another put there."""

    def entries(
        self, urls: Sequence[str], wildcards: Sequence[str] = (), progress: Callable[[str], None] | None = None
    ) -> dict[str, dict[str, Any]]:
        """The manifest entry of every shard, from the manifest beside it, or else by fetching and indexing it once.

        wildcards: those that gave urls.  Every shard's size is asked of the server and compared.  Raises ShardError for
        one that is missing, also one that a wildcard means and only the manifest knows, or another.
        """
        found: dict[str, dict[str, Any]] = {}
        for folder in dict.fromkeys(map(folder_of, urls)):
            group = [url for url in urls if folder_of(url) == folder]
            theirs = self._their_entries(group[0], progress)
            with self._cache_errors():
                known = {**read_entries(self._place(group[0])), **theirs}
            lost = {name for wildcard in wildcards for name in _expected_names(wildcard, folder, theirs or known)}
            lost.difference_update(map(base_name, group))
            if lost:
                where = redacted(folder) + MANIFEST_NAME if theirs else self._place(group[0]) / MANIFEST_NAME
                raise ShardError(
                    f"{redacted(folder)}{min(lost)} is missing, {where} lists it ({len(lost)} such shards); put it "
                    "there again, or delete its entry to go on without it"
                )
            for url, (size, page) in zip(group, sizes(group, self.retry_policy), strict=True):
                entry = known.get(base_name(url))
                if entry is None:
                    continue
                if size is not None and size != entry["bytes"] and page:
                    raise ShardError(
                        f"{redacted(url)}: {_PAGE_CAME}: {Kind.PAGE.value}; check the address and your access"
                    )
                if size is not None and size != entry["bytes"]:
                    where = (
                        redacted(folder) + MANIFEST_NAME
                        if base_name(url) in theirs
                        else self._place(url) / MANIFEST_NAME
                    )
                    raise ShardError(
                        f"{redacted(url)}: {size} bytes, manifest says {entry['bytes']}; put the shard there again, or "
                        f"delete {where} and index it anew"
                    )
                found[url] = entry
            unknown = [url for url in group if url not in found]
            if unknown and progress is not None:
                progress(
                    f"{redacted(folder)}: {len(unknown)} shards have no manifest; each is fetched once to be indexed"
                )
            for url, entry in zip(unknown, self._index_all(unknown, progress), strict=True):
                found[url] = entry
                if progress is not None:
                    progress(f"indexed {redacted(url)}: {entry['samples']} samples")
        return found

    def open(self, shard: RemoteShard, wait: bool = True) -> tuple[int, str] | None:
        """A descriptor of the shard's local file, held until it is closed, and the path of its index.

        Fetches what is not there.  wait: else None where another process fetches it, or where there is no room now.
        Raises ShardError when it cannot be had.
        """
        started = time.monotonic()
        while True:
            path = self._path(shard.url, shard.sha256)
            with self._cache_errors():
                fd = self._open_compared(path, shard)
            if fd is not None:
                return fd, str(path) + index_suffix(self.image_member)
            if self._fetch(shard.url, shard.size, shard.sha256, wait, started) is None:
                return None

    def incoming(self) -> Arrivals:
        """What any process of this host fetches, and how far it is: it changes with every byte that comes."""
        return arrivals(self.folder)

    def _open_compared(self, path: Path, shard: RemoteShard) -> int | None:
        """A descriptor of a shard that is the one its manifest knows, and has its index; None when it is to be fetched.

        Each file is read and compared once per start.
        """
        fd = _open_locked(path)
        if fd is None:
            if is_foreign(path):
                take_away(path)
            return None
        index = Path(f"{path}{index_suffix(self.image_member)}")
        file = _identity(fd, path)
        if file in self.compared and index.is_file():
            return fd
        if is_whole(fd, shard.size, shard.sha256):
            if not is_index_of(index, path, shard.size, self.image_member):
                take_away(index)
                index_shard(str(path), index, redacted(shard.url), False, self.image_member)
                index.chmod(PRIVATE)
            self.compared.add(file)
            return fd
        os.close(fd)
        for each in (path, index):
            take_away(each)
        return None

    def class_names(self, url: str, progress: Callable[[str], None] | None = None) -> tuple[str, ...] | None:
        """What the labels mean, of classes.txt beside the shard; None where there is none."""
        shown_as = redacted(sibling_url(url, CLASSES_NAME))
        return self._read_beside(
            url, CLASSES_NAME, CLASSES_BYTES, lambda path: read_class_names(path, shown_as), progress
        )

    def _their_entries(self, url: str, progress: Callable[[str], None] | None) -> dict[str, Any]:
        """What the manifest beside the shard says; nothing where there is none."""
        shown_as = redacted(sibling_url(url, MANIFEST_NAME))

        def read(path: Path) -> dict[str, Any]:
            return parse_entries(path.read_text(encoding="utf-8", errors="replace"), shown_as)

        return self._read_beside(url, MANIFEST_NAME, MANIFEST_BYTES, read, progress) or {}

    def _read_beside(
        self,
        url: str,
        name: str,
        most_bytes: int,
        read: Callable[[Path], Content],
        progress: Callable[[str], None] | None,
    ) -> Content | None:
        """What a file of this name that lies beside the shard says, as read understands it; None where there is none.

        Many servers forbid what is not there (S3, to who may not list), or answer with a page: the shards themselves,
        which are asked for next, decide whether that is an error.  progress: is told then.
        """
        address, came = sibling_url(url, name), set[str]()

        def attempt(path: Path) -> tuple[Content | None, str]:
            try:
                download(address, str(path), self.retry_policy, most_bytes)
            except Exception as error:
                if answer_of(error).kind not in (Kind.MISSING, Kind.FORBIDDEN, Kind.REFUSED):
                    raise
                return None, "" if answer_of(error).kind is Kind.MISSING else text_of(error)
            with path.open("rb") as file:
                if is_page(file.read(PAGE_BYTES)):
                    return None, "a web page"
            try:
                return read(path), ""
            except ShardError as error:
                _raise_again(error, sha256_of(str(path)), came)
                raise

        with tempfile.TemporaryDirectory() as folder:
            content, why = retry(redacted(address), lambda: attempt(Path(folder) / name), self.retry_policy)
        if why and progress is not None:
            progress(f"{redacted(address)}: the server answers {why}; it is taken as not there")
        return content

    def _index_all(self, urls: Sequence[str], progress: Callable[[str], None] | None) -> Iterator[dict[str, Any]]:
        abandon = threading.Event()

        def bring(url: str) -> dict[str, Any]:
            entry = self._fetch(url, 0, None, True, time.monotonic(), abandon)
            assert entry is not None
            return entry

        with ThreadPoolExecutor(TRANSFERS) as pool:
            try:
                for fetching in [pool.submit(bring, url) for url in urls]:
                    while wait_for([fetching], TOLD_EVERY_SEC).not_done:
                        if progress is not None and (coming := self.incoming()):
                            progress(str(coming))
                    yield fetching.result()
            finally:
                abandon.set()  # a thread that goes on trying would be waited for
                pool.shutdown(wait=False, cancel_futures=True)

    def _place(self, url: str) -> Path:
        return Path(self.folder) / hashlib.sha256(folder_of(url).encode()).hexdigest()[:16]

    def _path(self, url: str, sha256: str) -> Path:
        return self._place(url) / f"{base_name(url)}.{sha256[:16]}.shard"

    def _fetch(
        self,
        url: str,
        size: int,
        sha256: str | None,
        wait: bool,
        started: float,
        abandon: threading.Event | None = None,
    ) -> dict[str, Any] | None:
        """Fetch one shard of `size` bytes (0: not known), unless it is there; its manifest entry ({} if it was there).

        abandon: another thread sets it to end this.  None where it would have to wait and may not.
        """
        place = self._place(url)
        lock = self._lock(place / f"{base_name(url)}.lock", wait)
        if lock is None:
            return None
        try:
            if sha256 is not None and self._path(url, sha256).exists():
                return {}
            if sha256 is None and (entry := self._indexed_meanwhile(url)) is not None:
                return entry
            for left in glob.glob(f"{glob.escape(str(place / base_name(url)))}.*.part*"):
                Path(left).unlink(missing_ok=True)  # of a process that was killed, or its lock would not be free
            while not reserve(self.folder, self.max_bytes, lock, size, redacted(url)):
                if not wait:
                    return None
                if time.monotonic() - started > self.retry_policy.give_up_sec:
                    raise ShardError(
                        f"{redacted(url)}: no room for its {size / 2**30:.3g} GiB: all of data.cache_gib "
                        f"({self.max_bytes / 2**30:.3g}) is in use; raise it, or lower data.lanes, data.window_shards "
                        "or data.fetch_ahead_shards"
                    )
                time.sleep(0.2)
            damaged: set[str] = set()
            try:
                waited = time.monotonic() - started

                def attempt() -> dict[str, Any]:
                    return self._attempt(url, size, sha256, lock, damaged, abandon)

                entry = retry(redacted(url), attempt, self.retry_policy, waited, abandon=abandon)
                if sha256 is None:  # before the lock is let go, so that who waits for it finds the entry
                    merge_entries(place, {base_name(url): entry})
                return entry
            finally:
                os.ftruncate(lock, 0)
        finally:
            os.close(lock)

    def _indexed_meanwhile(self, url: str) -> dict[str, Any] | None:
        """The entry of a shard that another process has fetched and indexed while this one waited for the lock."""
        return read_entries(self._place(url)).get(base_name(url))

    def _lock(self, path: Path, wait: bool) -> int | None:
        """A descriptor that alone holds the lock file; None when another one does and wait is false."""
        with self._cache_errors():
            make_private_folder(path.parent)
            lock = open_lock_file(path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                os.close(lock)
        return None

    @contextlib.contextmanager
    def _cache_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ShardError(
                f"data.cache_dir ({self.folder}) cannot be used: {error}; name a folder of a local disk"
            ) from error

    def _attempt(
        self,
        url: str,
        size: int,
        sha256: str | None,
        lock: int,
        damaged: set[str],
        abandon: threading.Event | None,
    ) -> dict[str, Any]:
        """damaged: checksums of what has come of a shard without a manifest, and is none."""
        part = self._place(url) / f"{base_name(url)}.{os.getpid()}-{time.monotonic_ns()}.part"
        index = Path(f"{part}{INDEX_SUFFIX}")
        try:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE))
            download(url, str(part), self.retry_policy, size or self.max_bytes, abandon)
            with open(part, "rb") as file:
                if is_page(file.read(PAGE_BYTES)):
                    raise PageError(_PAGE_CAME)
            if size and (came := part.stat().st_size) != size:
                raise MismatchError(f"{came} bytes came, the manifest says {size}")
            if sha256 is not None and sha256_of(str(part)) != sha256:
                raise MismatchError("the bytes that came have another checksum than the manifest says")
            try:
                entry = index_shard(str(part), index, redacted(url), False, self.image_member)
            except ShardError as error:
                if sha256 is None:
                    _raise_again(error, sha256_of(str(part)), damaged)
                raise
            with open(part, "rb") as file:
                os.fsync(file.fileno())  # a machine that fails must not leave the name without the bytes
            path = self._path(url, entry["sha256"])
            index.chmod(PRIVATE)
            with room_lock(self.folder):  # the file takes the place of its reservation
                for made, name in ((index, Path(f"{path}{index_suffix(self.image_member)}")), (part, path)):
                    if name.is_dir() and not name.is_symlink():  # over which nothing can be renamed
                        take_away(name)
                    os.replace(made, name)
                os.ftruncate(lock, 0)
            self._note(path)
            return entry
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ShardError(f"data.cache_dir ({self.folder}): {error.strerror}; lower data.cache_gib") from error
            if error.filename is not None and str(error.filename).startswith(self.folder):  # and not the server's
                raise ShardError(f"data.cache_dir ({self.folder}) cannot be used: {error}; mend the disk") from error
            raise
        finally:
            part.unlink(missing_ok=True)
            index.unlink(missing_ok=True)

    def _note(self, path: Path) -> None:
        """What was just fetched was compared while it came."""
        fd = open_own(path)
        if fd is not None:
            self.compared.add(_identity(fd, path))
            os.close(fd)


def _raise_again(error: ShardError, sha256: str, came: set[str]) -> None:
    """Damage that came for the first time may be a transfer that ended early: MismatchError, so that it is fetched
    again.  What comes twice alike is the file itself.
    """
    if sha256 not in came:
        came.add(sha256)
        raise MismatchError(str(error)) from error


def _expected_names(wildcard: str, folder: str, names: Iterable[str]) -> list[str]:
    """The names that a wildcard address would match in a folder."""
    theirs, ours = (address.partition("://")[2] for address in (folder_of(wildcard), folder))  # s3a:// lists as s3://
    deep = "**" in theirs or theirs.count("/") == ours.count("/")  # fnmatch's * goes over slashes
    return fnmatch.filter(names, base_name(wildcard)) if deep and fnmatch.fnmatchcase(ours, theirs) else []


def _open_locked(path: Path) -> int | None:
    """A descriptor with a shared lock, which keeps the file from being evicted; None when it is not there."""
    fd = open_own(path)
    if fd is None:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    if os.fstat(fd).st_nlink == 0:  # evicted in between
        os.close(fd)
        return None
    os.utime(fd)
    return fd


def _identity(fd: int, path: Path) -> tuple[object, ...]:
    """What a file is known by; one that is written anew is another."""
    status = os.fstat(fd)
    return str(path), status.st_dev, status.st_ino, status.st_size
