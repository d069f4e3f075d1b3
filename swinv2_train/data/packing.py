"""Packing images and clips into webdataset shards: which of them a folder, zip, tar or list holds, their labels, their
order.

Files are copied byte for byte, in an order shuffled once; clips may be encoded anew.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from swinv2_train.config.shown import shown, tell
from swinv2_train.data.annotations.form import DrawnImage
from swinv2_train.data.annotations.reading import match, read_annotations
from swinv2_train.data.class_names import CLASSES_NAME, class_names_text, listed, read_class_names
from swinv2_train.data.clips.encoding import ClipEncoder
from swinv2_train.data.label_checks import LabelImageChecks
from swinv2_train.data.object_checks import ObjectChecks
from swinv2_train.data.sample import OBJECTS, SEGMENTATION, ShardError
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.shards.tar_writer import Written, shard_files, write_shards
from swinv2_train.data.sources.archives import Read, open_archive
from swinv2_train.data.sources.label_folders import BESIDE, pairs_beside, pairs_of
from swinv2_train.data.sources.list_file import is_list, read_list
from swinv2_train.data.sources.listing import (
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
from swinv2_train.data.transforms.label_image import as_png


@dataclass(frozen=True)
class Entry:
    """One image to pack, not yet read."""

    key: str
    extension: str
    label: int | None
    read: Callable[[], bytes]
    read_labels: Callable[[], bytes] | None = None
    """The label image, of an image that has one."""
    drawn: DrawnImage | None = None
    """The objects, of an image whose annotations are packed with it."""
    image_id: int = 0
    """Of the image in a set of annotations, where these have no number for it."""


def pack(
    entries: Sequence[Entry],
    out_prefix: str,
    samples_per_shard: int,
    seed: int,
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
    checks: LabelImageChecks | ObjectChecks | None = None,
    encoder: ClipEncoder | None = None,
) -> Manifest:
    """Write `entries`, shuffled by `seed`, to ``<out_prefix>-*.tar`` with index, manifest and, if given, classes.txt.

    checks: what looks at every pair of an image and its label image or its objects, where there are any.  encoder:
    encodes the clips anew, all of which the entries are then; None = they are copied.

    Where the folder has a classes.txt already, its classes' numbers are taken for those of the same names.  Raises
    ShardError when shards of that prefix exist (overwrite: they are replaced, once all images are packed), or when that
    classes.txt lacks one of the classes and speaks of shards that stay.
    """
    if encoder is not None:
        for extension, entry in {entry.extension: entry for entry in entries}.items():
            encoder.check(entry.key, extension)
    order = [entries[number] for number in packing_order(len(entries), seed)]
    path = Path(out_prefix).parent / CLASSES_NAME

    def write() -> Manifest:
        samples = _read_with_progress(order, out_prefix, checks, encoder)
        manifest = write_shards(samples, out_prefix, samples_per_shard, overwrite)
        labels = checks.label_images if isinstance(checks, ObjectChecks) else checks
        if labels is not None:
            labels.keep(manifest)
        return manifest

    if classes is None:
        _check_listed_labels(path, [entry.label for entry in entries if entry.label is not None])
        return write()
    stay = not {*map(str, path.parent.glob("*.tar"))} <= {*map(str, shard_files(out_prefix) if overwrite else ())}
    numbers = _numbers_there(path, classes, _used(entries, classes, checks), stay)
    if isinstance(checks, ObjectChecks):
        checks.numbers = numbers
    if isinstance(checks, LabelImageChecks) and numbers is not None and numbers != [*range(len(classes))]:
        raise ShardError(
            f"{path} lists the classes of pixels in another order than SOURCE's, and label images are packed as they "
            "are; choose another OUT folder, or mend either list"
        )
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


def _check_listed_labels(path: Path, labels: Sequence[int]) -> None:
    """Say that labels without names are counted in the folder's classes.txt, where there is one.

    Raises ShardError where it has too few.
    """
    known = read_class_names(path) if labels else None
    if known is None:
        return
    if max(labels) >= len(known):
        raise ShardError(
            f"{path} lists {len(known)} classes, and SOURCE a label {max(labels)}; choose another OUT folder, or mend "
            "either list"
        )
    tell(f"{path}: its {len(known)} names are taken for those of SOURCE's labels, 0 = {shown(known[0], 40)}")


def _used(entries: Sequence[Entry], classes: Sequence[str], checks: LabelImageChecks | ObjectChecks | None) -> set[int]:
    """The labels that images, pixels or objects have."""
    if isinstance(checks, LabelImageChecks):
        return {*range(len(classes))}
    if isinstance(checks, ObjectChecks):
        drawn = [each.category for entry in entries if entry.drawn is not None for each in entry.drawn.objects]
        named = {each for each in drawn if isinstance(each, str)}
        return {number for number, name in enumerate(classes) if name in named}
    return {entry.label for entry in entries if entry.label is not None}


def _write_classes(path: Path, classes: Sequence[str]) -> None:
    path.write_text(class_names_text(classes), "utf-8", "surrogateescape")


def _read_with_progress(
    entries: list[Entry],
    out_prefix: str,
    checks: LabelImageChecks | ObjectChecks | None,
    encoder: ClipEncoder | None,
) -> Iterator[Written]:
    told = time.monotonic()
    for number, entry in enumerate(entries, 1):
        content, extension = entry.read(), entry.extension
        image: bytes | None = content
        if encoder is not None:
            image, extension = encoder.encode(entry.key, content, extension), encoder.form
        targets = None if image is None else _targets(entry, image, checks)
        if image is not None and targets is not None:
            yield entry.key, image, extension, entry.label, targets
        if time.monotonic() - told > 5 or number == len(entries):
            told = time.monotonic()
            what = "images" if encoder is None else "clips"
            tell(f"{out_prefix}: {number} of {len(entries)} {what} packed")
    if encoder is not None:
        encoder.finish()
    if checks is not None:
        checks.finish()


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


def _targets(entry: Entry, image: bytes, checks: LabelImageChecks | ObjectChecks | None) -> Mapping[str, bytes] | None:
    """What is packed beside an image and its label; None for an image that is to be left out."""
    targets: dict[str, bytes] = {}
    if isinstance(checks, ObjectChecks):
        assert entry.drawn is not None, entry.key
        content = checks.look(entry.key, image, entry.extension, entry.drawn, entry.image_id)
        if content is None:
            return None
        targets[OBJECTS] = content
        checks_of_labels = checks.label_images
    else:
        checks_of_labels = checks
    if entry.read_labels is not None:
        labels = entry.read_labels()
        if checks_of_labels is not None:
            checks_of_labels.look(entry.key, image, entry.extension, labels)
        targets[SEGMENTATION] = as_png(labels)
    return targets


def read_annotated(source: Path, annotations: Path, labels: Path | None = None) -> tuple[list[Entry], tuple[str, ...]]:
    """The annotated images of a folder, zip or plain tar, and the names of the classes of objects.

    annotations: a COCO json, or a folder, zip or tar of Pascal VOC xml, YOLO txt or labelme json files.  labels: where
    the label images of these images are, as read_source's; None = beside them, if anywhere.  Raises ShardError as
    read_source does, and for annotations that cannot be read or are of none of the images.
    """
    files, found = _list_files(source, "SOURCE"), read_annotations(annotations, "--annotations")
    beside = {*pairs_beside(files.reads).values()}
    images = replace(files, reads={name: read for name, read in files.reads.items() if name not in beside})
    matched = match(found, images.reads, f"SOURCE {source}")
    for note in matched.notes:
        tell(note)
    if not found.classes:
        raise ShardError(f"{found.origin}: no object has a class, so there is nothing to learn")
    wanted = [name for name, drawn in matched.images.items() if drawn is not None]
    pixels = _label_reads(source, files, labels, wanted) or {}
    entries, _ = _entries(source, images, classes=False)
    kept = []
    for number, (entry, (name, drawn)) in enumerate(zip(entries, matched.images.items(), strict=True), 1):
        if drawn is not None:
            kept.append(replace(entry, drawn=drawn, image_id=number, read_labels=pixels.get(name)))
    return kept, found.classes


def read_source(source: Path, labels: Path | None = None) -> tuple[list[Entry], tuple[str, ...] | None]:
    """The images of a folder, zip, plain tar or list file, and the class names (None without class folders).

    An image is packed with its label image, which is KEY.seg.png beside it or, with labels, another folder, zip or tar,
    the PNG or TIFF file of the same path there; then folders are no classes.

    Raises ShardError for a source that does not exist, is compressed, damaged (data/sources/archives.py), holds no
    images, mixes the two layouts, or cannot be read through, and for images of which some have label images and others
    have not.
    """
    if is_list(str(source)):
        if labels is not None:
            raise ShardError(
                f"SOURCE {source} lists a label for each file, so there are no label images; drop --labels"
            )
        return _listed_entries(source), None
    images = _list_files(source, "SOURCE")
    if images.left_out:
        tell(say_left_out(images.left_out, str(source)))
    reads = _label_reads(source, images, labels)
    if reads is None:
        return _entries(source, images)
    entries, _ = _entries(source, replace(images, reads={name: images.reads[name] for name in reads}), classes=False)
    return [replace(entry, read_labels=read) for entry, read in zip(entries, reads.values(), strict=True)], None


def _label_reads(
    source: Path, images: _Files, labels: Path | None, wanted: Iterable[str] | None = None
) -> dict[str, Read] | None:
    """The label image of each image of a source, by the image's path; None where there is none.

    labels: as read_source's.  wanted: the images that must have one; None = all.
    """
    beside = pairs_beside(images.reads)
    if labels is None and not beside:
        return None
    if labels is not None and beside:
        raise ShardError(
            f"SOURCE {source} holds label images (*{BESIDE}) itself, such as {next(iter(beside.values()))}; leave out "
            "--labels, or keep them apart"
        )
    found = images.reads if labels is None else _list_files(labels, "--labels").reads
    paired = beside if labels is None else pairs_of(images.reads, found)
    label_names = set(paired.values())
    wanted = [*(images.reads if wanted is None else wanted)]
    alone = [name for name in wanted if name not in paired and (labels is not None or name not in label_names)]
    if alone:
        raise ShardError(
            f"SOURCE {source}: {len(alone)} of {len(paired) + len(alone)} images have no label image in "
            f"{source if labels is None else labels} ({listed(alone)}); add a PNG or TIFF file of the same path and "
            "name for each, or move these images away"
        )
    extra = [name for name in found if name not in label_names] if labels is not None else []
    if extra:
        tell(f"warning: {len(extra)} label images have no image and are left out ({listed(extra)})")
    return {name: found[label] for name, label in paired.items()}


@dataclass(frozen=True)
class _Files:
    """The images of a source; their paths begin below an archive's own folder."""

    reads: Mapping[str, Read]
    left_out: Counter[str]
    empty: Sequence[str]
    """Class folders without images."""


def _list_files(source: Path, what: str) -> _Files:
    """what: how the command line names it."""
    if source.is_dir():
        listing = list_folder(str(source), f"{what} {source}")
        check_separators(listing.names, f"{what} {source}")
        return _Files(
            {name: partial(_read_file, source / name) for name in listing.names}, listing.left_out, listing.empty
        )
    if not source.is_file():
        raise ShardError(f"{what} {source} does not exist; name a folder, zip or tar of images, or a list")
    archive = open_archive(source, f"{what} {source}")
    names = {PurePosixPath(name): name for name in archive.files}
    beside = beside_images(filter(is_image, archive.files))
    images = {path: name for path, name in names.items() if is_image(name) and name not in beside}
    left_out = Counter(ending(name) for name in archive.files if not is_image(name) or name in beside)
    if not images:
        raise ShardError(f"{what} {source} holds no images ({no_image_named(left_out)})")
    folders = {PurePosixPath(name) for name in archive.folders if not is_hidden(name)}
    folders |= {path.parent for path, name in names.items() if not is_hidden(name)}
    while len({path.parts[0] for path in images}) == 1 and all(len(path.parts) > 1 for path in images):
        top = next(iter(images)).parts[:1]
        images = {PurePosixPath(*path.parts[1:]): name for path, name in images.items()}  # the archive's own folder
        folders = {PurePosixPath(*path.parts[1:]) for path in folders if path.parts[:1] == top}
    filled = {path.parts[0] for path in images if len(path.parts) > 1}
    empty = sorted({path.parts[0] for path in folders if path.parts} - filled)
    reads = {name: archive.files[images[PurePosixPath(name)]] for name in sorted(map(str, images))}
    return _Files(reads, left_out, empty)


def _entries(source: Path, files: _Files, classes: bool = True) -> tuple[list[Entry], tuple[str, ...] | None]:
    """classes: whether folders are any."""
    names = class_names(files.reads, f"SOURCE {source}", files.empty) if classes else None
    if names and files.empty:
        tell(empty_warning(str(source), files.empty))
    label_of = label_numbers(names or ())
    return _with_keys(files.reads, (label_of if names else lambda _: None)), names


def _listed_entries(source: Path) -> list[Entry]:
    """The files of a list that are there, with its labels."""
    files = read_list(str(source), "SOURCE")
    there = [number for number, size in enumerate(files.sizes) if size >= 0]
    if missing := [name for name, size in zip(files.names, files.sizes, strict=True) if size < 0]:
        tell(
            f"warning: SOURCE {source}: {len(missing)} of its {len(files.names)} files are not there and are left out "
            f"({listed(missing)})"
        )
    label_of = {files.names[number]: files.labels[number] for number in there}
    return _with_keys({name: partial(_read_file, Path(files.root) / name) for name in label_of}, label_of.__getitem__)


def _with_keys(reads: Mapping[str, Read], label_of: Callable[[str], int | None]) -> list[Entry]:
    """An entry for each path."""
    entries, taken = list[Entry](), set[str]()
    for name, read in reads.items():
        path = PurePosixPath(name)
        key = str(path.with_name(path.name[: -len(path.suffix)].replace(".", "_")))  # webdataset cuts at the first dot
        while key in taken:  # cat.1.jpg beside cat_1.jpg, or 1.jpg beside 1.png
            key += "_"
        taken.add(key)
        entries.append(Entry(key, path.suffix[1:].lower(), label_of(name), read))
    return entries


def _read_file(path: Path) -> bytes:
    return path.read_bytes()
