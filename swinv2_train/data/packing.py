"""Packing images into webdataset shards: which images a folder, zip or tar holds, their labels, their order.

Image files are copied byte for byte, in an order shuffled once.
"""

from __future__ import annotations

import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from swinv2_train.data.class_names import (
    CLASSES_NAME,
    class_names_text,
    listed,
    read_class_names,
)
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_index import IMAGE_EXTENSIONS
from swinv2_train.data.shards.tar_reader import Manifest, write_shards
from swinv2_train.data.sources.folder import class_names, empty_warning, is_image, label_numbers, list_folder
from swinv2_train.data.sources.virtual_shards import packing_order


@dataclass(frozen=True)
class Entry:
    """One image to pack, not yet read."""

    key: str
    extension: str
    label: int | None
    read: Callable[[], bytes]


def pack(
    entries: Sequence[Entry], out_prefix: str, samples_per_shard: int, seed: int, classes: Sequence[str] | None = None
) -> Manifest:
    """Write `entries`, shuffled by `seed`, to ``<out_prefix>-*.tar`` with index, manifest and, if given, classes.txt.

    Where the folder has a classes.txt already, its classes' numbers are taken for those of the same names.  Raises
    ShardError when shards of that prefix exist, or when that classes.txt lacks one of the classes.
    """
    order = [entries[number] for number in packing_order(len(entries), seed)]
    if classes is None:
        return write_shards(_read_with_progress(order, out_prefix), out_prefix, samples_per_shard)
    path = Path(out_prefix).parent / CLASSES_NAME
    numbers = _numbers_there(path, classes, {entry.label for entry in entries if entry.label is not None})
    if numbers is not None:
        order = [entry if entry.label is None else replace(entry, label=numbers[entry.label]) for entry in order]
        return write_shards(_read_with_progress(order, out_prefix), out_prefix, samples_per_shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(class_names_text(classes), "utf-8", "surrogateescape")  # first: no shard is ever without its names
    try:
        return write_shards(_read_with_progress(order, out_prefix), out_prefix, samples_per_shard)
    except BaseException:
        path.unlink()
        raise


def _read_with_progress(entries: list[Entry], out_prefix: str) -> Iterator[tuple[str, bytes, str, int | None]]:
    shown = time.monotonic()
    for number, entry in enumerate(entries, 1):
        yield entry.key, entry.read(), entry.extension, entry.label
        if time.monotonic() - shown > 5 or number == len(entries):
            shown = time.monotonic()
            print(f"{out_prefix}: {number} of {len(entries)} images packed", flush=True)


def _numbers_there(path: Path, classes: Sequence[str], used: set[int]) -> list[int] | None:
    """What each class counts as by the folder's classes.txt, -1 for one of no use; None where that is to be written.

    used: the labels that images have.
    """
    known = read_class_names(path)
    if known is None:
        return None
    place = {name: number for number, name in enumerate(known)}
    unknown = [name for label, name in enumerate(classes) if label in used and name not in place]
    if not unknown:
        return [place.get(name, -1) for name in classes]
    if not any(path.parent.glob("*.tar")):  # it speaks of shards that are gone
        return None
    raise ShardError(
        f"{path} lists {len(known)} classes, and not SOURCE's {listed(unknown)} ({len(unknown)} such classes), whose "
        "labels would mean two things; pack the split that has all classes first, or choose another OUT folder"
    )


def read_source(source: Path) -> tuple[list[Entry], tuple[str, ...] | None]:
    """The images of a folder, zip or plain tar, and the class names (None without class folders).

    Raises ShardError for a source that does not exist, is compressed, holds no images, mixes the two layouts, or cannot
    be read through.
    """
    if source.is_dir():
        listing = list_folder(str(source), f"SOURCE {source}")
        images: dict[str, Callable[[], bytes]] = {name: partial(_read_file, source / name) for name in listing.names}
        return _entries(source, images, listing.left_out, listing.empty)
    if not source.is_file():
        raise ShardError(f"SOURCE {source} does not exist; name a folder, zip or tar of images")
    if zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        files = sorted(info.filename for info in archive.infolist() if not info.is_dir())
        return _archive_entries(source, {name: partial(archive.read, name) for name in files})
    try:
        with tarfile.open(source, "r:") as tar:
            members = sorted((member.name, member.offset_data, member.size) for member in tar if member.isreg())
    except tarfile.TarError as error:
        raise ShardError(
            f"SOURCE {source} is not a folder, zip or uncompressed tar ({error}); unpack it and name the folder"
        ) from error
    return _archive_entries(
        source, {name: partial(_read_slice, source, offset, size) for name, offset, size in members}
    )


def _archive_entries(source: Path, files: dict[str, Callable[[], bytes]]) -> tuple[list[Entry], tuple[str, ...] | None]:
    paths = {PurePosixPath(name): read for name, read in files.items()}
    images = {path: read for path, read in paths.items() if is_image(str(path))}
    if not images:
        raise ShardError(
            f"SOURCE {source} holds no images ({len(files)} files, none named *.{', *.'.join(IMAGE_EXTENSIONS)})"
        )
    while len({path.parts[0] for path in images}) == 1 and all(len(path.parts) > 1 for path in images):
        images = {PurePosixPath(*path.parts[1:]): read for path, read in images.items()}  # the archive's own folder
    return _entries(source, {str(path): read for path, read in images.items()}, len(files) - len(images))


def _entries(
    source: Path, images: dict[str, Callable[[], bytes]], left_out: int, empty: Sequence[str] = ()
) -> tuple[list[Entry], tuple[str, ...] | None]:
    if left_out:
        print(f"{left_out} files and hidden folders of {source} are not images and are left out")
    classes = class_names(images, f"SOURCE {source}", empty)
    if classes and empty:
        print(empty_warning(str(source), empty))
    label_of = label_numbers(classes or ())
    entries, taken = [], set()
    for name, read in images.items():
        path = PurePosixPath(name)
        key = str(path.with_name(path.name[: -len(path.suffix)].replace(".", "_")))  # webdataset cuts at the first dot
        while key in taken:  # cat.1.jpg beside cat_1.jpg, or 1.jpg beside 1.png
            key += "_"
        taken.add(key)
        entries.append(Entry(key, path.suffix[1:].lower(), label_of(name) if classes else None, read))
    return entries, classes


def _read_file(path: Path) -> bytes:
    return path.read_bytes()


def _read_slice(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
