"""Pack images into webdataset shards with an index and checksums.

    python scripts/make_shards.py SOURCE OUT              # images/ or images.zip -> OUT-000000.tar, OUT-000001.tar, ...
    python scripts/make_shards.py --reindex 'DIR/*.tar'   # make index and manifest of existing shards again
    python scripts/make_shards.py --verify 'DIR/*.tar'    # read everything, compare with the manifest's checksums

SOURCE is a folder, zip or plain tar of images.  With class folders (SOURCE/<class>/...) the labels are the classes'
places in sorted order, kept in classes.txt beside the shards; images directly in SOURCE get no labels.  Image files are
copied byte for byte, in an order shuffled once.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from swinv2_train.config.command_line import stoppable
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown, tell
from swinv2_train.config.standard_streams import hold_standard_streams
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_index import IMAGE_EXTENSIONS
from swinv2_train.data.shards.tar_reader import Manifest, reindex, shard_files, verify_shards, write_shards
from swinv2_train.data.sources.folder import class_names, is_image, list_folder
from swinv2_train.data.sources.virtual_shards import PACKING_SEED, SAMPLES_PER_SHARD, packing_order

CLASSES_NAME = "classes.txt"


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

    Raises ShardError when shards of that prefix exist, or when the folder's classes.txt speaks of other classes.
    """
    if classes is not None:
        _write_classes(Path(out_prefix).parent / CLASSES_NAME, classes)
    order = [entries[number] for number in packing_order(len(entries), seed)]
    return write_shards(_read_with_progress(order, out_prefix), out_prefix, samples_per_shard)


def _read_with_progress(entries: list[Entry], out_prefix: str) -> Iterator[tuple[str, bytes, str, int | None]]:
    shown = time.monotonic()
    for number, entry in enumerate(entries, 1):
        yield entry.key, entry.read(), entry.extension, entry.label
        if time.monotonic() - shown > 5 or number == len(entries):
            shown = time.monotonic()
            tell(f"{out_prefix}: {number} of {len(entries)} images packed")


def _write_classes(path: Path, classes: Sequence[str]) -> None:
    text = "".join(f"{name}\n" for name in classes)
    known_text = path.read_text("utf-8", "surrogateescape") if path.is_file() else text  # names may be any bytes
    if known_text != text:
        known = known_text.splitlines()
        differ = sorted(set(known) ^ set(classes))[:5] or ["their order"]
        raise ShardError(
            f"{path} lists {len(known)} classes, SOURCE has {len(classes)} (they differ in: {', '.join(differ)}), so "
            "the same label would mean two things; give SOURCE the same class folders, or choose another OUT folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8", "surrogateescape")


def read_source(source: Path) -> tuple[list[Entry], list[str] | None]:
    """The images of a folder, zip or plain tar, and the class names (None without class folders).

    Raises ShardError for a source that does not exist, is compressed, holds no images, mixes the two layouts, has a
    class folder without images, or cannot be read through.
    """
    if source.is_dir():
        listing = list_folder(str(source), f"SOURCE {source}")
        return _entries(source, {name: partial(_read_file, source / name) for name in listing.names}, listing.left_out)
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


def _archive_entries(source: Path, files: dict[str, Callable[[], bytes]]) -> tuple[list[Entry], list[str] | None]:
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
    source: Path, images: dict[str, Callable[[], bytes]], left_out: int
) -> tuple[list[Entry], list[str] | None]:
    if left_out:
        print(f"{left_out} files and hidden folders of {shown(source)} are not images and are left out")
    classes = class_names(images, f"SOURCE {source}")
    label_of = {name: label for label, name in enumerate(classes or [])}
    entries, taken = [], set()
    for name, read in images.items():
        path = PurePosixPath(name)
        key = str(path.with_name(path.name[: -len(path.suffix)].replace(".", "_")))  # webdataset cuts at the first dot
        while key in taken:  # cat.1.jpg beside cat_1.jpg, or 1.jpg beside 1.png
            key += "_"
        taken.add(key)
        entries.append(Entry(key, path.suffix[1:].lower(), label_of[path.parts[0]] if classes else None, read))
    return entries, classes


def _read_file(path: Path) -> bytes:
    return path.read_bytes()


def _read_slice(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (2: wrong input, with one message)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder, zip or tar of images; a shard pattern with --reindex")
    parser.add_argument("out", metavar="OUT", nargs="?", help="prefix of the shards, e.g. data/my/train")
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="aim at 100 to 500 MB each (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=PACKING_SEED, help="of the shuffle (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="delete shards of that prefix first")
    parser.add_argument("--reindex", action="store_true", help="make index and manifest of existing shards again")
    parser.add_argument("--verify", action="store_true", help="compare existing shards with their checksums")
    hold_standard_streams()
    options = parser.parse_args(arguments)
    if options.samples_per_shard < 1:
        parser.error(f"--samples-per-shard ({options.samples_per_shard}) must be at least 1")
    try:
        if options.reindex:
            manifest = reindex(options.source, tell)
        elif options.verify:
            verify_shards(options.source, tell)
            return 0
        else:
            if options.out is None:
                parser.error("OUT is missing: the prefix of the shards, e.g. data/my/train")
            entries, classes = read_source(Path(options.source))
            if options.overwrite:
                for path in shard_files(options.out):
                    path.unlink()
            manifest = pack(entries, options.out, options.samples_per_shard, options.seed, classes)
            print(f"{len(classes)} classes, see {CLASSES_NAME}" if classes else "no class folders, so no labels")
    except (ShardError, OSError) as error:
        print(f"make_shards: {shown(error, MESSAGE_CHARACTERS)}", file=sys.stderr)
        return 2
    size = sum(manifest.sizes) / 1e6
    tell(f"{manifest.num_samples} images in {len(manifest.paths)} shards, {size:.1f} MB; {manifest.paths[0]} ...")
    return 0


if __name__ == "__main__":
    sys.exit(stoppable(main))
