"""The files beside the shards: ``manifest.json``, one per folder, and an index for each shard.

manifest.json holds the sample count, bytes, sha256, label range and number of targets of every shard of its folder.
Both kinds of file appear by atomic rename, so several processes may make them at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.config.pixels import CLIP_EXTENSIONS
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_index import CHECKSUM, build_index, index_times, save_index, targets_in
from swinv2_train.storage.atomic import replace_text, replacing, sha256_of
from swinv2_train.storage.json_files import file_name, mapping, optional, record, row, whole
from swinv2_train.storage.json_files import text as text_of

MANIFEST_NAME = "manifest.json"
INDEX_SUFFIX = ".idx.npy"
"""What an index file's name ends in."""
_MANIFEST_VERSION = 1
MANIFEST_BYTES = 2**26
"""The most that a manifest may hold: 250 bytes for each shard."""


def index_suffix(image_member: str | None) -> str:
    """What the name of a shard's index adds to the shard's: one for each choice of data.image_member."""
    return INDEX_SUFFIX if image_member is None else f".{image_member}{INDEX_SUFFIX}"


def index_folder(path: str, suffix: str = INDEX_SUFFIX) -> Path:
    """Where the index of a local shard lies: its own folder, or, where that is read-only, one in the user's cache."""
    folder = Path(path).resolve().parent
    made = (folder / MANIFEST_NAME).is_file() and (folder / f"{os.path.basename(path)}{suffix}").is_file()
    if made or os.access(folder, os.W_OK):
        return folder
    return user_cache() / "index" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def user_cache() -> Path:
    """The user's own cache folder for this package ($XDG_CACHE_HOME).  Raises ShardError for who has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swinv2_train"
    except RuntimeError as error:  # a container's user that the system does not know
        raise ShardError(
            "no folder for caches: HOME is not set, and the system knows no home of this user; set XDG_CACHE_HOME, or "
            "data.cache_dir for shards at an address, to a folder of a local disk"
        ) from error


def index_shard(
    path: str, index_path: Path, name: str | None = None, checksums: bool = True, image_member: str | None = None
) -> dict[str, Any]:
    """Write the index of one shard; return its manifest entry.  Arguments as build_index's."""
    index = build_index(path, name, checksums, image_member)
    times = index_times(path, index)
    index_path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(index_path) as file:
        save_index(file, index, times)
    labels = index["label"][index["label"] >= 0]
    targets = {name: int((index[f"{name}_size"] > 0).sum()) for name in targets_in(index)}
    return {
        "samples": len(index),
        "bytes": os.stat(path).st_size,
        "sha256": sha256_of(path),
        "label_range": [int(labels.min()), int(labels.max())] if len(labels) else None,
        "unlabelled": len(index) - len(labels),
        **({"targets": targets} if targets else {}),
        **({"clips": clips} if (clips := count_clips(index)) else {}),
    }


def count_clips(index: np.ndarray) -> int:
    """The samples of an index that are clips."""
    return int(np.isin(index["extension"], [each.encode() for each in CLIP_EXTENSIONS]).sum())


def has_checksums(index_path: Path) -> bool:
    """Whether the index holds a checksum of every image; those of version 0.2 and before do not."""
    try:
        return CHECKSUM in (np.load(index_path, mmap_mode="r").dtype.names or ())
    except (OSError, ValueError):  # damaged: it is made again
        return False


def check_content(path: str, index_path: Path, entry: Mapping[str, Any]) -> None:
    """Compare a shard with its manifest entry: the size always, all bytes when it is younger than its index.

    A shard written anew at the same size is found by its date, so one whose date was set back is not, nor are bytes
    that the disk lost: swinv2-make-shards --verify reads everything.  Raises ShardError.
    """
    status = os.stat(path)
    remedy = f"fetch it again or run swinv2-make-shards --reindex '{path}'"
    if status.st_size != entry["bytes"]:
        raise ShardError(f"{path}: {status.st_size} bytes, manifest says {entry['bytes']}; {remedy}")
    with contextlib.suppress(FileNotFoundError):
        if status.st_mtime_ns > os.stat(index_path).st_mtime_ns:
            if sha256_of(path) != entry["sha256"]:
                raise ShardError(f"{path}: changed since it was indexed, at the same size; {remedy}")
            with contextlib.suppress(OSError):  # a read-only folder: it is read again at the next start
                os.utime(index_path)  # it was only copied; this need not be found out again


def read_entries(folder: Path) -> dict[str, Any]:
    """The entries of a folder's manifest by shard name; none where there is no manifest.  Raises ShardError."""
    path = folder / MANIFEST_NAME
    try:
        content = read_bytes(path, MANIFEST_BYTES)
    except FileNotFoundError:
        return {}
    except ConfigError as error:
        raise ShardError(str(error)) from error
    return parse_entries(content, str(path))


def parse_entries(text: str | bytes, name: str) -> dict[str, Any]:
    """The entries in a manifest's text; name: what errors call it.  Raises ShardError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name} is not JSON ({error}); delete it, it is made again") from error
    if not isinstance(content, dict) or content.get("version") != _MANIFEST_VERSION:
        raise ShardError(f"{name} is not a manifest of version {_MANIFEST_VERSION}; delete it, it is made again")
    try:
        _MANIFEST(content, "")
    except ConfigError as error:
        raise ShardError(f"{name}: {error}; delete it, it is made again") from error
    entries: dict[str, Any] = content["shards"]
    return entries


def _digest(value: Any, where: str) -> None:
    text_of(64)(value, where)
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ConfigError(f"{where} ({value}) must be 64 hexadecimal digits")


def _label_range(value: Any, where: str) -> None:
    row(whole(), whole())(value, where)
    if value[0] > value[1]:
        raise ConfigError(f"{where} ({value}) must be the lowest and the highest label")


def _label_value(value: Any, where: str) -> None:
    text_of(5)(value, where)
    if not value.isascii() or not value.isdigit():
        raise ConfigError(f"{where} ({value}) must be the value of a label image's pixels")


def _entry(value: Any, where: str) -> None:
    _FIELDS(value, where)
    if value["unlabelled"] > value["samples"]:
        raise ConfigError(f"{where}.unlabelled ({value['unlabelled']}) is more than its {value['samples']} samples")
    if value.get("clips", 0) > value["samples"]:
        raise ConfigError(f"{where}.clips ({value['clips']}) is more than its {value['samples']} samples")
    for name, count in value.get("targets", {}).items():
        if count > value["samples"]:
            raise ConfigError(f"{where}.targets.{name} ({count}) is more than its {value['samples']} samples")


_FIELDS = record(
    {"samples": whole(), "bytes": whole(), "sha256": _digest, "unlabelled": whole(),
     "label_range": optional(_label_range)},
    may={"clips": whole(), "targets": mapping(whole()), "label_values": mapping(whole(), names=_label_value)},
)  # fmt: skip
_MANIFEST = record({"shards": mapping(_entry, names=file_name(deep=False))})


def merge_entries(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add (or, with None, remove) entries; a lock keeps two writers from losing each other's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks; a lost entry is made again
            fcntl.flock(lock, fcntl.LOCK_EX)
        merged = {name: entry for name, entry in {**read_entries(folder), **entries}.items() if entry is not None}
        content = {"version": _MANIFEST_VERSION, "shards": dict(sorted(merged.items()))}
        replace_text(folder / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")
    finally:
        os.close(lock)
