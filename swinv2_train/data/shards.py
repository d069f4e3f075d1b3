"""Shards on disk: patterns, the manifest beside them, reading one sample by position, and writing.

A shard is a plain webdataset tar (``KEY.jpg|jpeg|png|webp`` and optionally ``KEY.cls``).  Beside it lie
``<shard>.idx.npy`` (index.py) and, once per folder, ``manifest.json`` with the sample count, bytes, sha256 and label
range of every shard.  Both are made by scripts/make_shards.py or on first use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.data.index import ShardError, build_index

__all__ = ["Manifest", "Sample", "SampleError", "ShardError", "TarReader", "expand_pattern", "open_manifest"]
__all__ += ["reindex", "verify_shards", "write_shards"]

MANIFEST_NAME = "manifest.json"
_MANIFEST_VERSION = 1


class SampleError(ConfigError):
    """One sample is damaged; data.on_bad_sample decides what follows."""


@dataclass(frozen=True)
class Sample:
    """One undecoded sample: the bytes of the image file as they were packed."""

    key: str
    image: bytes
    extension: str
    """jpg, jpeg, png or webp."""
    label: int | None
    """None where the shard has no .cls for the key, or one that is not a non-negative integer."""
    shard: str


@dataclass(frozen=True)
class Manifest:
    """Everything that must be known of a set of shards before the first sample is read.  Picklable."""

    paths: tuple[str, ...]
    index_paths: tuple[str, ...]
    counts: tuple[int, ...]
    """Samples per shard."""
    sizes: tuple[int, ...]
    """Bytes per shard."""
    unlabelled: tuple[int, ...]
    """Samples per shard without a readable label."""
    label_range: tuple[int, int] | None
    """Lowest and highest label over all shards; None without any label."""
    digest: str
    """sha256 over the names, counts and checksums of the shards in order; a resumed run compares it."""

    @property
    def num_samples(self) -> int:
        return sum(self.counts)


# --------------------------------------------------------------------------------------------------------------------
# Patterns


def expand_pattern(pattern: str, key: str = "data.shards") -> list[str]:
    """Paths of a pattern: ``{00..11}`` and ``{a,b}`` braces, ``* ? [..]`` wildcards (sorted), parts joined by ``::``.

    Raises ShardError naming `key` when a part matches no file or is not a local path.
    """
    import glob

    from braceexpand import braceexpand

    remedy = f"set {key} to your shards (scripts/make_shards.py SOURCE OUT makes them), or run make demo for CIFAR-10"
    paths: list[str] = []
    for part in pattern.split("::"):
        if "://" in part or part.startswith("pipe:"):
            raise ShardError(f"{key} '{part}' is not a local path; copy the shards to a disk and name that")
        try:
            candidates = list(braceexpand(os.path.expanduser(part)))
        except ValueError as error:  # a brace without its partner
            raise ShardError(f"{key} '{part}': {error}; a range is written {{00..11}}") from error
        for candidate in candidates:
            if os.path.isdir(candidate):
                raise ShardError(
                    f"{key} '{part}' is a folder; name its shards, e.g. {os.path.join(candidate, '*.tar')}"
                )
            if glob.has_magic(candidate):
                found = sorted(path for path in glob.glob(candidate, recursive=True) if os.path.isfile(path))
                if not found:
                    raise ShardError(f"{key} '{candidate}' matches no file; {remedy}")
                paths += found
            elif os.path.isfile(candidate):
                paths.append(candidate)
            else:
                raise ShardError(f"{key} names '{candidate}', which does not exist; {remedy}")
    doubled = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if doubled:
        raise ShardError(f"{key} names {doubled[0]} twice; every shard may appear once")
    return paths


# --------------------------------------------------------------------------------------------------------------------
# The manifest


def open_manifest(pattern: str, key: str = "data.shards", progress: Callable[[str], None] | None = None) -> Manifest:
    """Index what has no index yet, and compare every shard's size with the manifest (a stat each).

    `key` is the config key that error messages name; `progress` receives one line per shard that is indexed.
    Several processes may do this at once: files appear by atomic rename.  Raises ShardError.
    """
    paths = expand_pattern(pattern, key)
    entries: list[dict[str, Any]] = []
    index_paths: list[str] = []
    known: dict[Path, dict[str, Any]] = {}
    fresh: dict[Path, dict[str, Any]] = {}
    try:
        for path in paths:
            folder = _index_folder(path)
            if folder not in known:
                known[folder] = _read_manifest(folder)
            name = os.path.basename(path)
            index_path = folder / f"{name}.idx.npy"
            entry = known[folder].get(name)
            if entry is not None:
                size = os.stat(path).st_size
                if size != entry["bytes"]:
                    raise ShardError(
                        f"{path}: {size} bytes, manifest says {entry['bytes']}; "
                        f"fetch it again or run scripts/make_shards.py --reindex '{path}'"
                    )
            if entry is None or not index_path.is_file():
                made = _index_shard(path, index_path)
                if entry is not None and entry["sha256"] != made["sha256"]:
                    index_path.unlink()
                    raise ShardError(
                        f"{path}: its checksum differs from the manifest; "
                        f"fetch it again or run scripts/make_shards.py --reindex '{path}'"
                    )
                if progress is not None:
                    progress(f"indexed {path}: {made['samples']} samples")
                entry = fresh.setdefault(folder, {})[name] = made
            entries.append(entry)
            index_paths.append(str(index_path))
    finally:
        for folder, made_entries in fresh.items():
            _merge_manifest(folder, made_entries)

    if not any(entry["samples"] for entry in entries):
        raise ShardError(f"{key} '{pattern}': all {len(paths)} shards are empty; name shards that hold samples")
    ranges = [entry["label_range"] for entry in entries if entry["label_range"] is not None]
    digest = hashlib.sha256()
    for path, entry in zip(paths, entries, strict=True):
        digest.update(f"{os.path.basename(path)}\0{entry['samples']}\0{entry['sha256']}\n".encode())
    return Manifest(
        paths=tuple(paths),
        index_paths=tuple(index_paths),
        counts=tuple(entry["samples"] for entry in entries),
        sizes=tuple(entry["bytes"] for entry in entries),
        unlabelled=tuple(entry["unlabelled"] for entry in entries),
        label_range=(min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None,
        digest=digest.hexdigest(),
    )


def reindex(pattern: str, progress: Callable[[str], None] | None = None) -> Manifest:
    """Forget what the index and manifest say of the shards of `pattern`, and make both again."""
    for path in expand_pattern(pattern, "SOURCE"):
        folder = _index_folder(path)
        _merge_manifest(folder, {os.path.basename(path): None})
        (folder / f"{os.path.basename(path)}.idx.npy").unlink(missing_ok=True)
    return open_manifest(pattern, "SOURCE", progress)


def verify_shards(pattern: str, progress: Callable[[str], None] | None = None) -> None:
    """Read every byte of the shards and compare with the manifest's checksums.  Raises ShardError at a difference."""
    manifest = open_manifest(pattern, "SOURCE")
    for path in manifest.paths:
        entry = _read_manifest(_index_folder(path))[os.path.basename(path)]
        if _sha256(path) != entry["sha256"]:
            raise ShardError(f"{path}: its checksum differs from the manifest; fetch it again")
        if progress is not None:
            progress(f"{path}: checksum agrees")


def _index_folder(path: str) -> Path:
    """The shard's own folder, or, where that is read-only, one in the user's cache."""
    folder = Path(path).resolve().parent
    made = (folder / MANIFEST_NAME).is_file() and (folder / f"{os.path.basename(path)}.idx.npy").is_file()
    if made or os.access(folder, os.W_OK):
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "swinv2_train" / "index" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def _index_shard(path: str, index_path: Path) -> dict[str, Any]:
    """Write the index of one shard; return its manifest entry."""
    index = build_index(path)
    index_path.parent.mkdir(parents=True, exist_ok=True)
    with _atomic(index_path) as temporary, open(temporary, "wb") as file:
        np.save(file, index)
    labels = index["label"][index["label"] >= 0]
    return {
        "samples": len(index),
        "bytes": os.stat(path).st_size,
        "sha256": _sha256(path),
        "label_range": [int(labels.min()), int(labels.max())] if len(labels) else None,
        "unlabelled": len(index) - len(labels),
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({error}); delete it, it is made again") from error
    if not isinstance(content, dict) or content.get("version") != _MANIFEST_VERSION:
        raise ShardError(f"{path} is not a manifest of version {_MANIFEST_VERSION}; delete it, it is made again")
    shards: dict[str, Any] = content["shards"]
    return shards


def _merge_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Add (or, with None, remove) entries; a lock keeps two writers from losing each other's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks; a lost entry is made again
            fcntl.flock(lock, fcntl.LOCK_EX)
        merged = {name: entry for name, entry in (_read_manifest(folder) | entries).items() if entry is not None}
        with _atomic(folder / MANIFEST_NAME) as temporary:
            content = {"version": _MANIFEST_VERSION, "shards": dict(sorted(merged.items()))}
            Path(temporary).write_text(json.dumps(content, indent=1) + "\n")
    finally:
        os.close(lock)


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[str]:
    """A temporary name beside `path` that is renamed to it when the block succeeds."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Reading


class TarReader:
    """Any sample by (shard, index): one ``pread`` each, at most `max_open` shards open.  Picklable; has no position."""

    def __init__(self, manifest: Manifest, max_open: int = 64) -> None:
        assert max_open >= 1, max_open
        self.manifest = manifest
        self.max_open = max_open
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def read(self, shard: int, index: int) -> Sample:
        """The sample's bytes.  Raises SampleError where the sample is damaged, ShardError where the shard is."""
        fd, rows = self._shard(shard)
        offset, size, label, extension, key_bytes = rows[index].tolist()
        path = self.manifest.paths[shard]
        key = key_bytes.decode("utf-8", "surrogateescape")
        if size <= 0:
            raise SampleError(f"{path}: sample '{key}' {'has no image' if size < 0 else 'has an empty image'}")
        try:
            image = os.pread(fd, size, offset)
        except OSError as error:
            raise ShardError(f"{path}: reading {size} bytes at {offset} failed: {error}; check the disk") from error
        if len(image) != size:
            raise ShardError(f"{path}: ends before byte {offset + size}; it changed while it was read: fetch it again")
        return Sample(key, image, extension.decode(), label if label >= 0 else None, path)

    def key(self, shard: int, index: int) -> str:
        """The sample's key, without reading it."""
        key_bytes: bytes = self._shard(shard)[1]["key"][index]
        return key_bytes.decode("utf-8", "surrogateescape")

    def offset(self, shard: int, index: int) -> int:
        """The byte in the shard at which the sample's image begins."""
        return int(self._shard(shard)[1]["offset"][index])

    def _shard(self, shard: int) -> tuple[int, np.ndarray]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.manifest.paths[shard]
        try:
            fd = os.open(path, os.O_RDONLY)
            rows = np.load(self.manifest.index_paths[shard], mmap_mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: the shard or its index cannot be opened: {error}") from error
        if os.fstat(fd).st_size != self.manifest.sizes[shard] or len(rows) != self.manifest.counts[shard]:
            os.close(fd)
            raise ShardError(f"{path}: changed since the run started; fetch it again or run make_shards.py --reindex")
        self._open[shard] = (fd, rows)
        if len(self._open) > self.max_open:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[shard]

    def close(self) -> None:
        """Close the open shards; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


# --------------------------------------------------------------------------------------------------------------------
# Writing


def write_shards(
    samples: Iterable[tuple[str, bytes, str, int | None]], out_prefix: str, samples_per_shard: int
) -> Manifest:
    """Write (key, image bytes, extension, label) samples, in the order given, to ``<out_prefix>-000000.tar`` and on.

    The tars appear under their names only when all of them are written, and in the manifest last.  Raises ShardError
    when shards of that prefix exist, a key comes twice, or there are no samples.
    """
    from webdataset import TarWriter

    assert samples_per_shard > 0, samples_per_shard
    folder, stem = Path(out_prefix).parent, Path(out_prefix).name
    folder.mkdir(parents=True, exist_ok=True)
    existing = shard_files(out_prefix)
    if existing:
        raise ShardError(f"{existing[0]} exists already ({len(existing)} shards); delete them or choose another OUT")
    for leftover in folder.glob(f"{stem}-[0-9]*.tar.part"):
        leftover.unlink()
    parts: list[Path] = []
    keys: set[str] = set()
    writer: TarWriter | None = None
    try:
        for number, (key, image, extension, label) in enumerate(samples):
            if key in keys:
                raise ShardError(f"the key '{key}' comes twice; sample keys must be unique")
            keys.add(key)
            if number % samples_per_shard == 0:
                if writer is not None:
                    writer.close()
                parts.append(folder / f"{stem}-{len(parts):06d}.tar.part")
                # mtime=0: the same bytes every time, and no PAX header per member, which halves reading speed
                writer = TarWriter(str(parts[-1]), mtime=0, encoder=False)
            assert writer is not None
            sample: dict[str, Any] = {"__key__": key, extension: image}
            if label is not None:
                sample["cls"] = str(label).encode()
            writer.write(sample)
        if writer is None:
            raise ShardError(f"there is no sample to write to {out_prefix}-*.tar")
        writer.close()
    except BaseException:
        if writer is not None:
            writer.close()
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    for part in parts:
        part.with_name(f"{part.name.removesuffix('.part')}.idx.npy").unlink(missing_ok=True)
    _merge_manifest(folder, {part.name.removesuffix(".part"): None for part in parts})  # of shards deleted by hand
    paths = [part.rename(part.with_suffix("")) for part in parts]
    return open_manifest("::".join(map(str, paths)))


def shard_files(out_prefix: str) -> list[Path]:
    """The shards that write_shards wrote, or would collide with, in order."""
    return sorted(Path(out_prefix).parent.glob(f"{Path(out_prefix).name}-[0-9]*.tar"))
