"""The objects of a folder's images, from annotations as people keep them (data/annotations): nothing is packed.

They are read, put right by the packer's rules and counted once, at the start, and kept as the JSON that a shard has.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swinv2_train.data.annotations.form import Annotations, DrawnImage
from swinv2_train.data.annotations.reading import match, read_annotations
from swinv2_train.data.annotations.rules import BadBoxes, objects_of
from swinv2_train.data.class_names import CLASSES_NAME, listed, read_class_names
from swinv2_train.data.objects import objects_to_json
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.transforms.image_sizes import image_sizes

NAME = "{name}"
"""In data.annotations: the images' folder, by its own name."""
_HEADER_BYTES = 2**16
"""In which most files say how large their image is."""


@dataclass(frozen=True, eq=False)
class ObjectTexts:
    """The JSON of each image's objects, kept compactly.  Picklable."""

    content: bytes
    """All of them compressed, one after the other."""
    ends: np.ndarray
    """int64 (images,): where each ends."""

    def of(self, place: int) -> bytes:
        """Of the image at this place."""
        return zlib.decompress(self.content[self.ends[place - 1] if place else 0 : self.ends[place]])


def kept(texts: Sequence[bytes]) -> ObjectTexts:
    """In this order."""
    packed = [zlib.compress(each, 1) for each in texts]
    return ObjectTexts(b"".join(packed), np.cumsum([len(each) for each in packed], dtype="<i8"))


def annotations_path(folder: str, where: str) -> Path:
    """What data.annotations names for a folder of images: from that folder on, {name} being its own name."""
    return Path(folder, where.replace(NAME, Path(folder).name))


def folder_objects(
    folder: str, names: Sequence[str], where: str, key: str, progress: Callable[[str], None] | None
) -> tuple[dict[int, bytes], tuple[str, ...]]:
    """The JSON of the objects of each annotated image, by the image's place in names; and the names of the classes.

    names: paths of images, from the folder on.  where: data.annotations.  key: the config key that named the folder.
    The numbers of classes are those of a classes.txt beside the annotations or the images, or above either, where there
    is one.  progress is told what is wrong with them.  Raises ShardError where they cannot be read or fit none.
    """
    path = annotations_path(folder, where)
    found = read_annotations(path, "data.annotations")
    matched = match(found, names, f"{key} '{folder}'")
    bad = BadBoxes(f"data.annotations {path}")
    texts: dict[int, bytes] = {}
    classes, numbers = _classes(found, path, Path(folder))
    for place, (name, drawn) in enumerate(matched.images.items()):
        if drawn is None:
            continue
        try:
            size = drawn.size or _size(Path(folder, name))
            objects = objects_of(drawn, name.rpartition(".")[0], size, numbers, bad, place + 1)
        except SampleError as error:
            raise ShardError(f"{key}: {Path(folder, name)}: {error}; mend it, or move the image away") from error
        texts[place] = objects_to_json(objects)
    for note in (*matched.notes, *([bad.text()] if bad.counts else ())):
        if progress is not None and note is not None:
            progress(note)
    return texts, classes


def _classes(found: Annotations, path: Path, folder: Path) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """The names of the classes, and the number of each."""
    if not found.classes:
        raise ShardError(f"{found.origin}: no object has a class, so there is nothing to learn")
    beside = path.resolve() if path.is_dir() else path.resolve().parent
    for place in (beside, beside.parent, folder, folder.parent):
        known = read_class_names(place / CLASSES_NAME)
        if known is None:
            continue
        numbers = {name: number for number, name in enumerate(known)}
        if unknown := [name for name in _used(found.images) if name not in numbers and name in found.classes]:
            raise ShardError(
                f"{place / CLASSES_NAME} lists {len(known)} classes, and not {found.origin}'s {listed(unknown)}; add "
                "them at its end, or delete it"
            )
        return known, numbers
    return found.classes, {name: number for number, name in enumerate(found.classes)}


def _used(images: Mapping[str, DrawnImage]) -> list[str]:
    return sorted({str(each.category) for image in images.values() for each in image.objects})


def _size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, of whose beginning alone is read what is needed."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER_BYTES)
            sizes = image_sizes(data) or image_sizes(data + file.read())
    except OSError as error:
        raise SampleError(f"cannot be read: {error.strerror}") from error
    if not sizes:
        raise SampleError("its file does not say how many pixels it has")
    return sizes[0]
