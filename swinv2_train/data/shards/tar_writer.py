"""Writing shards: plain webdataset tars that are there together with their manifest, or not at all."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swinv2_train.data.sample import LABEL, MEMBERS, ShardError
from swinv2_train.data.shards.manifest import INDEX_SUFFIX, merge_entries, read_entries
from swinv2_train.data.shards.tar_index import sample_member
from swinv2_train.data.shards.tar_reader import Manifest, open_manifest

Written = tuple[str, bytes, str, int | None] | tuple[str, bytes, str, int | None, Mapping[str, bytes]]
"""A sample to write: key, image bytes, extension, label and, where there are any, the bytes of its other targets."""


def write_shards(
    samples: Iterable[Written],
    out_prefix: str,
    samples_per_shard: int,
    overwrite: bool = False,
) -> Manifest:
    """Write samples, in the order given, to ``<out_prefix>-000000.tar`` and on.

    The tars appear under their names only when all of them are written, and in the manifest last; when anything fails,
    nothing is left of them, and what was there is as it was.  Raises ShardError when shards of that prefix exist
    (overwrite: they are replaced), a key comes twice or is none to webdataset, or there are no samples.
    """
    from webdataset import TarWriter

    assert samples_per_shard > 0, samples_per_shard
    folder, stem = Path(out_prefix).parent, Path(out_prefix).name
    existing = shard_files(out_prefix)
    if existing and not overwrite:
        raise ShardError(f"{existing[0]} exists already ({len(existing)} shards); delete them or choose another OUT")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{glob.escape(stem)}-[0-9]*.tar.part"):
        leftover.unlink()
    parts: list[Path] = []
    keys: set[str] = set()
    writer: TarWriter | None = None
    try:
        for number, (key, image, extension, label, *more) in enumerate(samples):
            if key in keys:
                raise ShardError(f"the key '{key}' comes twice; sample keys must be unique")
            keys.add(key)
            if sample_member(f"{key}.{extension}") is None:
                raise ShardError(
                    f"webdataset's readers would pass over the key {key!r} (a line break in it, or __ around its first "
                    "part); rename the file or its folder"
                )
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
            for target, content in more[0].items() if more else ():
                assert target != LABEL, "a label is given by itself"
                sample[MEMBERS[target].suffix] = content
            writer.write(sample)
        if writer is None:
            raise ShardError(f"there is no sample to write to {out_prefix}-*.tar")
        writer.close()
    except BaseException:
        if writer is not None:
            with contextlib.suppress(OSError):  # a full disk fails here again
                writer.close()
        for part in parts:
            part.unlink(missing_ok=True)
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
    for path in {*existing} - {part.with_suffix("") for part in parts}:
        path.unlink()
    for part in parts:
        for index in folder.glob(f"{glob.escape(part.name.removesuffix('.part'))}*{INDEX_SUFFIX}"):
            index.unlink()
    deleted = fnmatch.filter(read_entries(folder), f"{glob.escape(stem)}-[0-9]*.tar")  # by hand, or to be replaced
    merge_entries(folder, dict.fromkeys(deleted))
    paths = [part.rename(part.with_suffix("")) for part in parts]
    return open_manifest("::".join(map(str, paths)))


def shard_files(out_prefix: str) -> list[Path]:
    """The shards that write_shards wrote, or would collide with, in order."""
    return sorted(Path(out_prefix).parent.glob(f"{glob.escape(Path(out_prefix).name)}-[0-9]*.tar"))
