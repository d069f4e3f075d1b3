"""Packing images into webdataset shards: which images a folder, zip or tar holds, their labels, their order.

Image files are copied byte for byte, in an order shuffled once.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from swinv2_train.config.shown import tell
from swinv2_train.data.class_names import CLASSES_NAME, class_names_text, listed, read_class_names
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_reader import Manifest, shard_files, write_shards
from swinv2_train.data.sources.archives import Read, open_archive
from swinv2_train.data.sources.folder import (
    beside_images,
    check_separators,
    class_names,
    empty_warning,
    ending,
    is_hidden,
    is_image,
    label_numbers,
    list_folder,
    no_image_named,
    say_left_out,
)
from swinv2_train.data.sources.virtual_shards import packing_order


@dataclass(frozen=True)
class Entry:
    """One image to pack, not yet read."""

    key: str
    extension: str
    label: int | None
    read: Callable[[], bytes]


def pack(
    entries: Sequence[Entry],
    out_prefix: str,
    samples_per_shard: int,
    seed: int,
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write `entries`, shuffled by `seed`, to ``<out_prefix>-*.tar`` with index, manifest and, if given, classes.txt.

    Where the folder has a classes.txt already, its classes' numbers are taken for those of the same names.  Raises
    ShardError when shards of that prefix exist (overwrite: they are replaced, once all images are packed), or when that
    classes.txt lacks one of the classes and speaks of shards that stay.
    """
    order = [entries[number] for number in packing_order(len(entries), seed)]
    path = Path(out_prefix).parent / CLASSES_NAME

    def write() -> Manifest:
        return write_shards(_read_with_progress(order, out_prefix), out_prefix, samples_per_shard, overwrite)

    if classes is None:
        return write()
    stay = not {*map(str, path.parent.glob("*.tar"))} <= {*map(str, shard_files(out_prefix) if overwrite else ())}
    numbers = _numbers_there(path, classes, {entry.label for entry in entries if entry.label is not None}, stay)
    if numbers is not None:
        order = [entry if entry.label is None else replace(entry, label=numbers[entry.label]) for entry in order]
        return write()
    if path.exists():  # it speaks of shards that are gone, or go when the new ones are there
        packed = write()
        _write_classes(path, classes)
        return packed
    made = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_classes(path, classes)  # first: no shard is ever without its names
    try:
        return write()
    except BaseException:
        path.unlink()
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _write_classes(path: Path, classes: Sequence[str]) -> None:
    path.write_text(class_names_text(classes), "utf-8", "surrogateescape")


def _read_with_progress(entries: list[Entry], out_prefix: str) -> Iterator[tuple[str, bytes, str, int | None]]:
    shown = time.monotonic()
    for number, entry in enumerate(entries, 1):
        yield entry.key, entry.read(), entry.extension, entry.label
        if time.monotonic() - shown > 5 or number == len(entries):
            shown = time.monotonic()
            tell(f"{out_prefix}: {number} of {len(entries)} images packed")


def _numbers_there(path: Path, classes: Sequence[str], used: set[int], shards_stay: bool) -> list[int] | None:
    """What each class counts as by the folder's classes.txt, -1 for one of no use; None where that is to be written.

    used: the labels that images have.  shards_stay: whether it speaks of shards that stay there.
    """
    known = read_class_names(path)
    if known is None:
        return None
    place = {name: number for number, name in enumerate(known)}
    unknown = [name for label, name in enumerate(classes) if label in used and name not in place]
    if not unknown:
        return [place.get(name, -1) for name in classes]
    if not shards_stay:
        return None
    raise ShardError(
        f"{path} lists {len(known)} classes, and not SOURCE's {listed(unknown)} ({len(unknown)} such classes), whose "
        "labels would mean two things; pack the split that has all classes first, or choose another OUT folder"
    )


def read_source(source: Path) -> tuple[list[Entry], tuple[str, ...] | None]:
    """The images of a folder, zip or plain tar, and the class names (None without class folders).

    Raises ShardError for a source that does not exist, is compressed, damaged (data/sources/archives.py), holds no
    images, mixes the two layouts, or cannot be read through.
    """
    if source.is_dir():
        listing = list_folder(str(source), f"SOURCE {source}")
        check_separators(listing.names, f"SOURCE {source}")
        files = {name: partial(_read_file, source / name) for name in listing.names}
        return _entries(source, files, listing.left_out, listing.empty)
    if not source.is_file():
        raise ShardError(f"SOURCE {source} does not exist; name a folder, zip or tar of images")
    archive = open_archive(source, f"SOURCE {source}")
    names = {PurePosixPath(name): name for name in archive.files}
    beside = beside_images(filter(is_image, archive.files))
    images = {path: name for path, name in names.items() if is_image(name) and name not in beside}
    left_out = Counter(ending(name) for name in archive.files if not is_image(name) or name in beside)
    if not images:
        raise ShardError(f"SOURCE {source} holds no images ({no_image_named(left_out)})")
    folders = {PurePosixPath(name) for name in archive.folders if not is_hidden(name)}
    folders |= {path.parent for path, name in names.items() if not is_hidden(name)}
    while len({path.parts[0] for path in images}) == 1 and all(len(path.parts) > 1 for path in images):
        top = next(iter(images)).parts[:1]
        images = {PurePosixPath(*path.parts[1:]): name for path, name in images.items()}  # the archive's own folder
        folders = {PurePosixPath(*path.parts[1:]) for path in folders if path.parts[:1] == top}
    filled = {path.parts[0] for path in images if len(path.parts) > 1}
    empty = sorted({path.parts[0] for path in folders if path.parts} - filled)
    reads = {name: archive.files[images[PurePosixPath(name)]] for name in sorted(map(str, images))}
    return _entries(source, reads, left_out, empty)


def _entries(
    source: Path, images: Mapping[str, Read], left_out: Counter[str], empty: Sequence[str] = ()
) -> tuple[list[Entry], tuple[str, ...] | None]:
    if left_out:
        tell(say_left_out(left_out, str(source)))
    classes = class_names(images, f"SOURCE {source}", empty)
    if classes and empty:
        tell(empty_warning(str(source), empty))
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
