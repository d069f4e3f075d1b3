"""Shards: the manifest of a set of them, and reading one sample by position.

A shard is a plain webdataset tar (``KEY.jpg`` or another image, and optionally ``KEY.cls``).  Beside it lie its index
(tar_index.py) and, once per folder, ``manifest.json`` (manifest.py).  Both are made by swinv2-make-shards or on
first use.  ``classes.txt``, which it puts there too, says what the labels mean.  Shards at an address are
read through a cache on this machine (shard_cache.py).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np

from swinv2_train.data.class_names import CLASSES_NAME, read_class_names
from swinv2_train.data.clips.frame_times import FrameTimes
from swinv2_train.data.sample import (
    MEMBERS,
    OBJECTS,
    SEGMENTATION,
    Sample,
    SampleError,
    ShardError,
    Targets,
    again,
    labelled,
    unreadable,
)
from swinv2_train.data.shards.manifest import (
    INDEX_SUFFIX,
    check_content,
    has_checksums,
    index_folder,
    index_shard,
    index_suffix,
    merge_entries,
    read_entries,
)
from swinv2_train.data.shards.pattern import expand_pattern, remote_wildcards
from swinv2_train.data.shards.prefetch import ShardPrefetcher
from swinv2_train.data.shards.shard_cache import RemoteShard, ShardCache
from swinv2_train.data.shards.tar_index import (
    CHECKSUM,
    TIME_FIELDS,
    build_index,
    index_times,
    load_index,
    load_times,
    target_fields,
    targets_in,
)
from swinv2_train.data.shards.transfers import ONCE, base_name, folder_of, is_remote, redacted
from swinv2_train.storage.atomic import sha256_of

__all__ = [
    "Manifest", "Sample", "SampleError", "ShardError", "TarReader", "open_manifest", "reindex", "verify_shards",
]  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """Everything that must be known of a set of shards before the first sample is read.  Picklable."""

    paths: tuple[str, ...]
    """Local paths, and addresses."""
    index_paths: tuple[str, ...]
    """Empty for an address: its index lies in the cache."""
    checksums: tuple[str, ...]
    """sha256 per shard."""
    counts: tuple[int, ...]
    """Samples per shard."""
    sizes: tuple[int, ...]
    """Bytes per shard."""
    unlabelled: tuple[int, ...]
    """Samples per shard without a readable label."""
    unsegmented: tuple[int, ...]
    """Samples per shard without a label image."""
    unannotated: tuple[int, ...]
    """Samples per shard without a JSON of objects."""
    clips: tuple[int, ...]
    """Samples per shard that are clips; the others are images."""
    label_values: Mapping[int, int] | None
    """Pixels of all label images by their value; None where that was not counted when they were packed."""
    label_range: tuple[int, int] | None
    """Lowest and highest label over all shards; None without any label."""
    digest: str
    """sha256 over the names, counts and checksums of the shards in order; a resumed run compares it."""
    cache: ShardCache | None
    """Where shards at an address are kept on this machine; None when all are local."""
    class_list: tuple[str, ...] | str | None = None
    """What `classes` gives, or in words why the lists beside the shards cannot be taken."""
    numbers: tuple[int, ...] | None = None
    """What each label of the shards counts as; None = as itself."""
    verify: bool = False
    """Compare every image that is read with its checksum in the index."""
    image_member: str | None = None
    """What follows KEY. in the names of images; None = one of IMAGE_EXTENSIONS."""
    labels_from = ".cls"

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each label, or class of pixels, of classes.txt beside the shards; None without one.

        Raises ShardError where the lists cannot be taken: only who asks for names needs them.
        """
        if isinstance(self.class_list, str):
            raise ShardError(self.class_list)
        return self.class_list

    @property
    def used_labels(self) -> frozenset[int]:
        """The labels that images have; of shards at an address, whose index is not here yet, all of the range."""
        if self.label_range is None:
            return frozenset()
        if self.cache is not None:
            return frozenset(range(self.label_range[0], self.label_range[1] + 1))
        found: set[int] = set()
        for path in self.index_paths:
            found.update(np.unique(np.load(path, mmap_mode="r")["label"]).tolist())
        return frozenset(self.number(label) for label in found if label >= 0)

    def number(self, label: int) -> int:
        """What a label of the shards counts as."""
        return label if self.numbers is None or label < 0 else self.numbers[label]

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same images with numbers[label] for each label, and names of these."""
        assert self.label_range is not None, "labels are there"
        low, high = self.label_range
        within = [number for number in numbers[low : high + 1] if number >= 0]
        if self.numbers is not None:
            numbers = [number if number < 0 else numbers[number] for number in self.numbers]
        return replace(self, numbers=tuple(numbers), class_list=classes, label_range=(min(within), max(within)))

    def name(self, shard: int) -> str:
        """What messages call the shard: its path, or its address without anything secret."""
        return redacted(self.paths[shard])

    def remote(self, shard: int) -> RemoteShard | None:
        """What the cache must know of a shard at an address; None for a local one."""
        path = self.paths[shard]
        return RemoteShard(path, self.sizes[shard], self.checksums[shard]) if is_remote(path) else None

    def open_reader(self, max_open: int = 64) -> TarReader:
        """max_open: shards that are open at a time."""
        return TarReader(self, max_open)


# --------------------------------------------------------------------------------------------------------------------
# The manifest


def open_manifest(
    pattern: str,
    key: str = "data.shards",
    progress: Callable[[str], None] | None = None,
    cache: ShardCache | None = None,
    verify: bool = False,
    image_member: str | None = None,
) -> Manifest:
    """Index what has no index yet, and compare every shard's size with the manifest (a stat each).

    key: the config key that error messages name.  progress: receives one line per shard that is indexed.  cache: where
    shards at an address are kept on this machine; None allows local ones alone.  verify:
    compare every image that is read with the checksum that the index has of it.  image_member: as build_index's; the
    cache has its own, which is the same.  Several processes may do this at once.  Raises ShardError.
    """
    paths = expand_pattern(pattern, key, retry_policy=ONCE if cache is None else cache.retry_policy)
    remote = [path for path in paths if is_remote(path)]
    found, index_paths = _local_entries([path for path in paths if not is_remote(path)], progress, verify, image_member)
    if remote:
        if cache is None:
            raise ShardError(
                f"{key} '{redacted(remote[0])}' is not a local path; copy the shards to a disk and name that"
            )
        found |= cache.entries(remote, remote_wildcards(pattern), progress)
    entries = [found[path] for path in paths]
    if not any(entry["samples"] for entry in entries):
        raise ShardError(f"{key} '{pattern}': all {len(paths)} shards are empty; name shards that hold samples")
    ranges = [entry["label_range"] for entry in entries if entry["label_range"] is not None]
    label_range = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
    digest = hashlib.sha256()
    for path, entry in zip(paths, entries, strict=True):
        digest.update(f"{base_name(path)}\0{entry['samples']}\0{entry['sha256']}\n".encode())
    return Manifest(
        paths=tuple(paths),
        index_paths=tuple(index_paths.get(path, "") for path in paths),
        checksums=tuple(entry["sha256"] for entry in entries),
        counts=tuple(entry["samples"] for entry in entries),
        sizes=tuple(entry["bytes"] for entry in entries),
        unlabelled=tuple(entry["unlabelled"] for entry in entries),
        unsegmented=_without(SEGMENTATION, entries),
        unannotated=_without(OBJECTS, entries),
        clips=tuple(entry.get("clips", 0) for entry in entries),
        label_values=added([_label_values(entry) for entry in entries if entry["samples"]]),
        label_range=label_range,
        digest=digest.hexdigest(),
        cache=cache if remote else None,
        class_list=_class_names(paths, -1 if label_range is None else label_range[1], key, cache, progress)
        if label_range is not None or any(entry.get("targets") for entry in entries)
        else None,
        verify=verify,
        image_member=image_member,
    )


def _without(target: str, entries: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Samples per shard that do not have this target."""
    return tuple(entry["samples"] - entry.get("targets", {}).get(target, 0) for entry in entries)


def added(counts: Sequence[Mapping[int, int] | None]) -> Mapping[int, int] | None:
    """Pixels by value of all together; None where one of them is not known."""
    total: Counter[int] = Counter()
    for each in counts:
        if each is None:
            return None
        total.update(each)
    return dict(total)


def _label_values(entry: Mapping[str, Any]) -> Mapping[int, int] | None:
    counted = entry.get("label_values")
    return None if counted is None else {int(value): count for value, count in counted.items()}


def _class_names(
    paths: Sequence[str], last: int, key: str, cache: ShardCache | None, progress: Callable[[str], None] | None
) -> tuple[str, ...] | str | None:
    """The names of the labels 0 .. last at least, of the classes.txt beside the shards; None where all have none.

    In words what is wrong with a list that is too short, and with shards of several folders whose lists differ.
    """
    found: dict[str, tuple[str, ...] | None] = {}
    for path in paths:
        place = folder_of(path) if is_remote(path) else os.path.dirname(path)
        if place in found:
            continue
        if is_remote(path):
            assert cache is not None, path
            found[place] = cache.class_names(path, progress)
        else:
            beside = read_class_names(Path(place, CLASSES_NAME))
            found[place] = beside or read_class_names(Path(path).resolve().with_name(CLASSES_NAME))
    places: dict[tuple[str, ...] | None, str] = {}
    for place, names in found.items():
        places.setdefault(names, redacted(os.path.join(place, CLASSES_NAME)))
    unnamed = places.pop(None, None)
    if len(places) > 1:
        first, second = list(places.values())[:2]
        return (
            f"{key}: {first} and {second} name other classes, so the same label would mean two things; pack both with "
            "the same classes"
        )
    if not places:
        return None
    ((classes, place),) = places.items()
    if unnamed is not None:
        return (
            f"{key}: {place} names the classes, but there is no {unnamed}, and the same label may mean two things; put "
            "a list there too, or name one of the two folders alone"
        )
    if classes is not None and len(classes) <= last:
        return (
            f"{place} names {len(classes)} classes, but {key} has labels up to {last}; it is not the list of these "
            "shards: put theirs there, or remove it"
        )
    return classes


def _local_entries(
    paths: Sequence[str], progress: Callable[[str], None] | None, verify: bool, image_member: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The manifest entry and the index path of every shard, made where they are not there yet."""
    entries: dict[str, dict[str, Any]] = {}
    index_paths: dict[str, str] = {}
    known: dict[Path, dict[str, Any]] = {}
    fresh: dict[Path, dict[str, Any]] = {}
    suffix = index_suffix(image_member)
    try:
        for path in paths:
            folder = index_folder(path, suffix)
            if folder not in known:
                known[folder] = read_entries(folder)
            name = os.path.basename(path)
            index_path = folder / f"{name}{suffix}"
            entry = known[folder].get(name)
            if entry is not None:
                check_content(path, index_path, entry)
            if entry is None or not index_path.is_file() or (verify and not has_checksums(index_path)):
                made = index_shard(path, index_path, image_member=image_member)
                if entry is not None and entry["sha256"] != made["sha256"]:
                    index_path.unlink()
                    raise ShardError(
                        f"{path}: its checksum differs from the manifest; "
                        f"fetch it again or run swinv2-make-shards --reindex '{path}'"
                    )
                if progress is not None:
                    progress(f"indexed {path}: {made['samples']} samples")
                entry = fresh.setdefault(folder, {})[name] = made
            entries[path], index_paths[path] = entry, str(index_path)
    finally:
        for folder, made_entries in fresh.items():
            merge_entries(folder, made_entries)
    return entries, index_paths


def reindex(pattern: str, progress: Callable[[str], None] | None = None) -> Manifest:
    """Forget what the index and manifest say of the shards of `pattern`, and make both again.

    Shards that lay in the same folders and are gone are forgotten too.
    """
    for path in _local_paths(pattern, complete=False):
        folder = index_folder(path)
        gone = [name for name in read_entries(folder) if not Path(path).with_name(name).is_file()]
        merge_entries(folder, dict.fromkeys([*gone, os.path.basename(path)]))
        for index in folder.glob(f"{glob.escape(os.path.basename(path))}*{INDEX_SUFFIX}"):
            index.unlink()
    return open_manifest(pattern, "SOURCE", progress)


def verify_shards(pattern: str, progress: Callable[[str], None] | None = None) -> None:
    """Read every byte of the shards and compare with the manifest's checksums.  Raises ShardError at a difference."""
    _local_paths(pattern, complete=True)
    manifest = open_manifest(pattern, "SOURCE")
    for path, checksum in zip(manifest.paths, manifest.checksums, strict=True):
        if sha256_of(path) != checksum:
            raise ShardError(f"{path}: its checksum differs from the manifest; fetch it again")
        if progress is not None:
            progress(f"{path}: checksum agrees")


def _local_paths(pattern: str, complete: bool) -> list[str]:
    paths = expand_pattern(pattern, "SOURCE", complete)
    for path in paths:
        if is_remote(path):
            raise ShardError(f"SOURCE '{redacted(path)}' is not a local path; run this where the shards lie")
    return paths


# --------------------------------------------------------------------------------------------------------------------
# Reading


class _OpenShard(NamedTuple):
    fd: int
    rows: np.ndarray
    """Its index."""
    times: np.ndarray | None
    """int64: the time stamps that the index speaks of."""


class TarReader:
    """Any sample by (shard, index): one ``pread`` each, at most `max_open` shards open.  Picklable; has no position.

    A shard at an address is fetched into the manifest's cache when it is read, unless `fetch_ahead` did so before.
    """

    def __init__(self, manifest: Manifest, max_open: int = 64) -> None:
        assert max_open >= 1, max_open
        self.manifest = manifest
        self.max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._ahead: ShardPrefetcher | None = None

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Say which shards will be read next, the most urgent first, so that they come in the background.

        Others are closed, or they could not leave the cache.
        """
        cache = self.manifest.cache
        if cache is not None:
            if self._ahead is None:
                self._ahead = ShardPrefetcher(cache)
            wanted = (self.manifest.remote(shard) for shard in shards)
            self._ahead.request([shard for shard in wanted if shard is not None])
            for shard in self._open.keys() - set(shards):
                os.close(self._open.pop(shard).fd)

    def read(self, shard: int, index: int) -> Sample:
        """The sample's bytes.

        Raises SampleError where the sample is damaged, ShardError where the shard is, MachineError where the machine
        cannot read it.
        """
        fd, rows, stamps = self._shard(shard)
        record, name = rows[index], self.manifest.name(shard)
        checksums = CHECKSUM in (rows.dtype.names or ())  # not in the index of a cached shard
        offset, size, label, extension, key_bytes, *rest = record.tolist()
        key = key_bytes.decode("utf-8", "surrogateescape")
        if size <= 0:
            raise SampleError("no image" if size < 0 else "an empty image", name, key)
        targets: dict[str, Any] = dict(labelled(self.manifest.number(label)))
        try:
            image = self._bytes(fd, name, offset, size, rest[:1] if checksums else [])
            for target in targets_in(rows):
                offset, size, *checksum = record[list(target_fields(target, checksums))].tolist()
                if size < 0:
                    continue
                value = MEMBERS[target].read(self._bytes(fd, name, offset, size, checksum))
                if value is not None:
                    targets[target] = value
        except SampleError as error:
            raise SampleError(error.cause, name, key) from error
        times = None if stamps is None else _times_of(stamps, record)
        return Sample(key, image, extension.decode(), cast(Targets, targets), name, times)

    def _bytes(self, fd: int, name: str, offset: int, size: int, checksum: list[int]) -> bytes:
        """The content of a member of the shard `name`, compared with its checksum where that is wanted."""
        try:
            content = again(lambda: os.pread(fd, size, offset))
        except OSError as error:
            problem = ShardError(f"{name}: reading {size} bytes at {offset} failed: {error}; check the disk")
            raise unreadable(error, f"{name}: {size} bytes at {offset}", problem) from error
        if len(content) != size:
            raise ShardError(f"{name}: ends before byte {offset + size}; it changed while it was read: fetch it again")
        if self.manifest.verify and zlib.crc32(content) != checksum[0]:
            raise SampleError(f"its checksum is another than the index has, at byte {offset}")
        return content

    def key(self, shard: int, index: int) -> str:
        """The sample's key, without reading it."""
        key_bytes: bytes = self._shard(shard).rows["key"][index]
        return key_bytes.decode("utf-8", "surrogateescape")

    def place(self, shard: int, index: int) -> str:
        """The byte in the shard at which the sample's image begins, as it is added to an error text."""
        return f", at byte {self._shard(shard).rows['offset'][index]}"

    def _shard(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        try:
            self._open[shard] = self._opened(shard)
        except OSError as error:
            if error.errno != errno.EMFILE or not self._open:
                raise
            self.max_open = max(1, len(self._open) // 2)  # what this process may have open at a time is known now
            while len(self._open) >= self.max_open:
                os.close(self._open.popitem(last=False)[1].fd)
            return self._shard(shard)
        if len(self._open) > self.max_open:
            os.close(self._open.popitem(last=False)[1].fd)
        return self._open[shard]

    def _opened(self, shard: int) -> _OpenShard:
        """A descriptor of a shard and its index.  Raises OSError where this process may open no further file."""
        name = self.manifest.name(shard)
        fd, index_path = self._open_file(shard)
        try:
            changed = f"{name}: changed since the run started; fetch it again or run swinv2-make-shards --reindex"
            if os.fstat(fd).st_size != self.manifest.sizes[shard]:
                raise ShardError(changed)
            try:
                rows = load_index(index_path, self.manifest.sizes[shard])
                times = load_times(index_path) if self.manifest.clips[shard] else None
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno == errno.EMFILE:
                    raise
                problem = ShardError(
                    f"{name}: its index cannot be opened: {error}; delete {index_path}, it is made again"
                )
                raise unreadable(error, index_path, problem) if isinstance(error, OSError) else problem from error
            if self.manifest.verify and CHECKSUM not in (rows.dtype.names or ()):  # a cached shard's
                rows, times = self._indexed_anew(
                    shard, index_path.removesuffix(index_suffix(self.manifest.image_member))
                )
            if len(rows) != self.manifest.counts[shard]:
                raise ShardError(changed)
        except BaseException:
            os.close(fd)
            raise
        return _OpenShard(fd, rows, times)

    def _indexed_anew(self, shard: int, path: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The index, with checksums, of a shard that is the one in the manifest: all of it is read."""
        if sha256_of(path) != self.manifest.checksums[shard]:
            raise ShardError(f"{path}: its checksum differs from the manifest; delete it, it is fetched again")
        rows = build_index(path, self.manifest.name(shard), image_member=self.manifest.image_member)
        return rows, index_times(path, rows)

    def _open_file(self, shard: int) -> tuple[int, str]:
        """A descriptor of the shard on this machine, and the path of its index."""
        remote = self.manifest.remote(shard)
        if remote is not None:
            assert self.manifest.cache is not None
            if self._ahead is not None:
                self._ahead.check(remote)
            found = self.manifest.cache.open(remote)
            assert found is not None, remote
            return found
        path = self.manifest.paths[shard]
        try:
            return os.open(path, os.O_RDONLY), self.manifest.index_paths[shard]
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            raise unreadable(error, path, ShardError(f"{path}: the shard cannot be opened: {error}")) from error

    def close(self) -> None:
        """Close the open shards and stop fetching ahead; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].fd)
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_ahead": None}

    def __del__(self) -> None:
        if hasattr(self, "_ahead"):
            self.close()


def _times_of(stamps: np.ndarray, record: np.void) -> FrameTimes | None:
    """Those of one sample; None where the index has none of it."""
    at, num_frames, num_keys = (int(record[field]) for field in TIME_FIELDS)
    if num_frames == 0:
        return None
    behind = at + num_frames
    return FrameTimes(stamps[at:behind], stamps[behind : behind + num_keys])
