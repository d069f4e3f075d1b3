"""A folder of image files as it is: which of them are images, what their classes are, and reading one by position.

The layout is ImageNet's, as torchvision's ImageFolder reads it: ``FOLDER/<class>/.../<image>``, labels 0, 1, ... for
the classes in sorted order (numbers by their value); images directly in the folder have no labels.  make_shards packs
by the same rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from swinv2_train.data.class_names import listed
from swinv2_train.data.sample import (
    MEMBERS,
    SEGMENTATION,
    Sample,
    SampleError,
    ShardError,
    Targets,
    again,
    labelled,
    unreadable,
)
from swinv2_train.data.shards.tar_index import LABEL_MISSING
from swinv2_train.data.sources.annotated_folder import ObjectTexts, folder_objects, kept
from swinv2_train.data.sources.label_folders import (
    BESIDE,
    MIRRORS,
    LabelImages,
    mirrored,
    pairs_beside,
    pixel_class_names,
    stem,
)
from swinv2_train.data.sources.listing import (
    Listing,
    check_separators,
    class_names,
    empty_warning,
    is_clip,
    label_numbers,
    list_folder,
    say_left_out,
)
from swinv2_train.data.sources.virtual_shards import VirtualShards, VirtualShardsReader, packed_index, packing_order


@dataclass(frozen=True, eq=False)
class Folder(VirtualShards):
    """The images of a folder, kept compactly: the 1.28 million of ImageNet are 64 MiB.  Picklable."""

    names: bytes
    """All paths from the folder on, one after the other."""
    ends: np.ndarray
    """int64 (images,): where each path ends in `names`."""
    sizes: np.ndarray
    """int64 (images,): bytes of each file; -1 of one that was not there."""
    image_member: str | None = None
    """What follows KEY. in the names of images; None = any ending."""
    label_images: LabelImages | None = None
    objects: ObjectTexts | None = None
    """Of all images, where their annotations are named (data.annotations)."""
    keyed_by_name: bool = False
    """Keys are paths with their endings."""
    labels_from = "its class folder"

    @cached_property
    def unsegmented(self) -> tuple[int, ...]:
        """Images per shard without a label image."""
        if self.label_images is None:
            return self.counts
        ends = np.cumsum(self.counts)
        return tuple(int((shard < 0).sum()) for shard in np.split(self.label_images.sizes, ends[:-1]))

    @cached_property
    def clips(self) -> tuple[int, ...]:
        """Clips per shard: all are, or none."""
        clips = len(self.ends) > 0 and is_clip(os.fsdecode(self.image_name(0)))
        return self.counts if clips else (0,) * len(self.counts)

    @property
    def unannotated(self) -> tuple[int, ...]:
        """Images per shard without objects: all, or none, for others than the annotated ones are left out."""
        return self.counts if self.objects is None else (0,) * len(self.counts)

    def image_name(self, place: int) -> bytes:
        """The path, from the folder on, of the image at this place of the packing order."""
        return self.names[self.ends[place - 1] if place else 0 : self.ends[place]]

    def open_reader(self, max_open: int = 64) -> FolderReader:
        """max_open: of no meaning here, for a file is open only while it is read."""
        return FolderReader(self)


def open_folder(
    path: str,
    key: str = "data.shards",
    progress: Callable[[str], None] | None = None,
    image_member: str | None = None,
    label_folders: Sequence[str] | None = None,
    annotations: str | None = None,
) -> Folder:
    """List the images below `path`, with the size of each file, and their label images.

    key: the config key that error messages name.  progress: receives a line now and then.  image_member: what follows
    KEY. in the names of images (input.npy); None = one of IMAGE_EXTENSIONS.  label_folders: where the label images are
    (label_folders.py); None = beside the images, if anywhere.  Folders are no classes where there are label images or
    objects.  annotations: where the images' objects are, as data.annotations says; images without are left out.
    Raises ShardError for a folder without images, that cannot be read through, or with two files of one name.
    """
    path = os.path.abspath(path)
    listing = list_folder(path, f"{key} '{path}'", progress, image_member)
    if listing.left_out and progress is not None:
        progress(say_left_out(listing.left_out, path))
    check_separators(listing.names, f"{key} '{path}'")
    listing, label_images = _label_images(path, listing, key, progress, image_member, label_folders)
    texts: list[bytes] | None = None
    if annotations is not None:
        found, names_of_classes = folder_objects(path, listing.names, annotations, key, progress)
        listing = replace(
            listing, names=[listing.names[place] for place in found], sizes=[listing.sizes[place] for place in found]
        )
        texts = [*found.values()]
        if label_images is not None:
            label_images = replace(label_images, sizes=label_images.sizes[[*found]])
    plain = label_images is None and texts is None
    classes = None if not plain else class_names(listing.names, f"{key} '{path}'", listing.empty)
    if classes and listing.empty and progress is not None:
        progress(empty_warning(path, listing.empty))
    check_unique(listing.names, f"{key} '{path}'")
    label_of = label_numbers(classes or ())
    order = packing_order(len(listing.names))
    ordered = [listing.names[number] for number in order]
    labels = np.array([label_of(name) for name in ordered], "<i8")
    encoded = [name.encode("utf-8", "surrogateescape") for name in ordered]
    names, ends = b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype="<i8")
    sizes = np.array(listing.sizes, "<i8")[order]
    digest = hashlib.sha256(b"folder\0")
    for part in (names, ends.tobytes(), sizes.tobytes()):
        digest.update(part)
    if label_images is not None:
        label_images = replace(label_images, sizes=label_images.sizes[order])
        digest.update(label_images.sizes.tobytes())
        classes = pixel_class_names(Path(label_images.root))
    objects = None
    if texts is not None:
        objects, classes = kept([texts[number] for number in order]), names_of_classes
        digest.update(objects.content)
        digest.update("\n".join(names_of_classes).encode("utf-8", "surrogateescape"))
    return Folder(path, labels, classes, digest.hexdigest(), names, ends, sizes, image_member, label_images, objects)


def list_images(
    path: str, key: str, progress: Callable[[str], None] | None = None, image_member: str | None = None
) -> Folder:
    """The images below `path`, or one image file, by their paths: without labels, label images and order of packing.

    Arguments and errors as open_folder's, but names may differ in the ending alone.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        listing = list_folder(path, f"{key} '{path}'", progress, image_member)
        if listing.left_out and progress is not None:
            progress(say_left_out(listing.left_out, path))
        check_separators(listing.names, f"{key} '{path}'")
        listing, _ = _label_images(path, listing, key, progress, image_member, None)
    else:
        path, name = os.path.split(path)
        listing = Listing([name], [os.path.getsize(os.path.join(path, name))], Counter(), [])
    encoded = [name.encode("utf-8", "surrogateescape") for name in listing.names]
    names, ends = b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype="<i8")
    sizes = np.array(listing.sizes, "<i8")
    digest = hashlib.sha256(b"images\0")
    for part in (names, ends.tobytes(), sizes.tobytes()):
        digest.update(part)
    labels = np.full(len(encoded), LABEL_MISSING, "<i8")
    return Folder(path, labels, None, digest.hexdigest(), names, ends, sizes, image_member, keyed_by_name=True)


def _label_images(
    path: str,
    images: Listing,
    key: str,
    progress: Callable[[str], None] | None,
    image_member: str | None,
    label_folders: Sequence[str] | None,
) -> tuple[Listing, LabelImages | None]:
    """The images, without label images beside them, and the label images of these, in their order; None without."""
    if label_folders is not None:
        root = mirrored(path, label_folders, key)
        found, suffix = _listed_labels(root, f"the label images of {key} '{path}', {root},", progress)
    else:
        root, suffix = path, BESIDE
        if image_member is None:
            beside = set(pairs_beside(images.names).values())
            mine = [(name, size) for name, size in zip(images.names, images.sizes, strict=True) if name not in beside]
            theirs = [(name, size) for name, size in zip(images.names, images.sizes, strict=True) if name in beside]
        else:
            mine, theirs = [*zip(images.names, images.sizes, strict=True)], _listed_beside(path, key)
        if not theirs:
            return images, None
        images = replace(images, names=[name for name, _ in mine], sizes=[size for _, size in mine])
        found = replace(images, names=[name for name, _ in theirs], sizes=[size for _, size in theirs])
    size_of = dict(zip(found.names, found.sizes, strict=True))
    names = [stem(name, image_member) + suffix for name in images.names]
    extra = sorted(size_of.keys() - set(names))
    if extra and progress is not None:
        progress(f"warning: {len(extra)} label images below {root} have no image in {path} ({listed(extra)})")
    return images, LabelImages(root, suffix, np.array([size_of.get(name, -1) for name in names], "<i8"))


def _listed_labels(root: str, what: str, progress: Callable[[str], None] | None) -> tuple[Listing, str]:
    """The label images in a folder of their own, and what their names end in: the first of MIRRORS that any has."""
    for suffix in MIRRORS[:-1]:
        with contextlib.suppress(ShardError):  # none of these: said of the last
            return list_folder(root, what, progress, suffix[1:]), suffix
    return list_folder(root, what, progress, MIRRORS[-1][1:]), MIRRORS[-1]


def _listed_beside(path: str, key: str) -> list[tuple[str, int]]:
    """The label images in a folder whose images are called by data.image_member."""
    try:
        found = list_folder(path, f"{key} '{path}'", None, BESIDE[1:])
    except ShardError:  # none
        return []
    return [*zip(found.names, found.sizes, strict=True)]


def check_unique(names: Sequence[str], source: str) -> None:
    """Raises ShardError where two samples would have one key.  source: what errors call the place."""
    seen: set[str] = set()
    for name in names:
        key = _key_of(name)
        if key in seen:
            raise ShardError(
                f"{source}: two images have the name {key} and differ in the extension alone (one is {name}); rename "
                "one, for the name without extension is the sample's key"
            )
        seen.add(key)


def _key_of(name: str) -> str:
    return name.rpartition(".")[0]


# --------------------------------------------------------------------------------------------------------------------


class FolderReader(VirtualShardsReader):
    """Any image of a folder by (shard, index).  Picklable; has no position."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._root = os.fsencode(folder.path) + b"/"

    def read(self, shard: int, index: int) -> Sample:
        """The file's bytes.  Raises SampleError where it is gone, no file any more or of another size than listed,
        MachineError where the machine cannot read it.
        """
        place = packed_index(shard, index)
        name, size, label = self.folder.image_name(place), int(self.folder.sizes[place]), int(self.folder.labels[place])
        key, extension = self.key(shard, index), name.decode("utf-8", "surrogateescape").rpartition(".")[2]
        if size == 0:
            raise SampleError("an empty image", self.folder.path, key)
        if size < 0:
            raise SampleError("no such file", self.folder.path, key)
        image = self._content(self._root + name, size, key)
        targets: Targets = labelled(label)
        labels = self.folder.label_images
        if labels is not None and labels.sizes[place] >= 0:
            member = self.folder.image_member or extension
            content = self._content(
                labels.path(name, len(member) + 1), int(labels.sizes[place]), key, "its label image: "
            )
            if (value := MEMBERS[SEGMENTATION].read(content)) is not None:
                targets = {**targets, "segmentation": value}
        if self.folder.objects is not None:
            targets = {**targets, "objects": self.folder.objects.of(place)}
        return Sample(key, image, extension.lower(), targets, self.folder.path)

    def _content(self, path: bytes, size: int, key: str, what: str = "") -> bytes:
        """A file of just this size.  what: begins what errors say."""
        try:
            content = again(lambda: _read(path, size))
        except OSError as error:
            gone = SampleError(f"{what}cannot be read: {error.strerror}", self.folder.path, key)
            raise unreadable(error, os.fsdecode(path), gone) from error
        if len(content) != size:
            found = f"more than {size}" if len(content) > size else str(len(content))
            raise SampleError(f"{what}{found} bytes, but {size} when the run started", self.folder.path, key)
        return content

    def key(self, shard: int, index: int) -> str:
        """The path from the folder on, without the extension unless it is a part of keys here."""
        name = self.folder.image_name(packed_index(shard, index)).decode("utf-8", "surrogateescape")
        return name if self.folder.keyed_by_name else _key_of(name)


def _read(path: bytes, size: int) -> bytes:
    """The file's bytes, at most one more than `size`."""
    with open(path, "rb", buffering=0) as file:
        image = file.read(size + 1)
        while 0 < len(image) < size and (more := file.read(size + 1 - len(image))):
            image += more  # some network file systems give less than they are asked for
    return image
