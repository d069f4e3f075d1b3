"""Annotations at a path: which of the four formats they are, and which image each of them is of."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from swinv2_train.data.annotations.coco import is_coco, parse_coco_json, read_coco
from swinv2_train.data.annotations.form import Annotations, DrawnImage, Read
from swinv2_train.data.annotations.labelme import is_labelme, read_labelme
from swinv2_train.data.annotations.voc import read_voc
from swinv2_train.data.annotations.yolo import NAMES, read_yolo, yolo_names
from swinv2_train.data.class_names import canonical, is_left_out, listed
from swinv2_train.data.sample import ShardError
from swinv2_train.data.sources.archives import open_archive

_ENDINGS = (".json", ".xml", ".txt")
_NONE = "name a COCO json, or a folder, zip or tar of Pascal VOC xml, YOLO txt or labelme json files"


def read_annotations(path: Path, what: str) -> Annotations:
    """What a COCO file, or a folder, zip or tar of files of one of the other formats says.

    what: how the command line or configuration names it, for errors.  Raises ShardError.
    """
    return _of_plain_names(_read(path, what))


def _of_plain_names(found: Annotations) -> Annotations:
    """The same with names of classes that a list of names (classes.txt) gives back: a line each, in one form."""
    for name in found.classes:
        if name.splitlines() != [name]:
            raise ShardError(
                f"{found.origin}: the class {json.dumps(name)[:100]} has a name of several lines, which a list of "
                "names (classes.txt) cannot hold; write it in one"
            )
    names = {name: canonical(name) for name in found.classes}
    if all(name == plain for name, plain in names.items()):
        return found
    if len({*names.values()}) < len(names):
        raise ShardError(f"{found.origin}: two classes have names that differ in the form of their letters alone "
                         "(Unicode's NFC and NFD); write one of them otherwise")  # fmt: skip
    for image in found.images.values():
        for each in image.objects:
            if isinstance(each.category, str):
                each.category = canonical(each.category)
    return replace(found, classes=tuple(names.values()))


def _read(path: Path, what: str) -> Annotations:
    origin = f"{what} {path}"
    if path.is_file() and path.suffix.lower() == ".json":
        value = parse_coco_json(path.read_bytes(), origin)
        if not is_coco(value):
            also = "; for labelme, name the folder of its files" if is_labelme(value) else ""
            raise ShardError(f"{origin} is no COCO json (images, annotations, categories){also}; {_NONE}")
        return read_coco(value, origin)
    files = _files(path, origin)
    kinds = Counter(PurePosixPath(name).suffix.lower() for name in files if _is_annotation(name))
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise ShardError(
            f"{origin} holds files of several formats ({found}); keep those of one in a folder of their own"
        )
    if not kinds:
        raise ShardError(f"{origin} holds no annotations; {_NONE}")
    kind = next(iter(kinds))
    mine = {name: read for name, read in sorted(files.items()) if _is_annotation(name)}
    if kind == ".xml":
        return read_voc(mine, origin)
    if kind == ".txt":
        return read_yolo(mine, _names(path, files, origin), origin)
    read = read_labelme(mine, origin)
    if not read.images:
        only = next(iter(mine))
        if len(mine) == 1 and is_coco(value := parse_coco_json(mine[only](), f"{origin}: {only}")):
            return read_coco(value, origin)
        raise ShardError(f"{origin}: none of its {len(mine)} .json files is labelme's (with shapes); {_NONE}")
    return read


def _is_annotation(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in _ENDINGS and path.name not in NAMES and not any(map(is_left_out, path.parts))


def _files(path: Path, origin: str) -> Mapping[str, Read]:
    """By path from the folder on, with / between folders."""
    if not path.exists():
        raise ShardError(f"{origin} does not exist; {_NONE}")
    if path.is_file():
        return open_archive(path, origin).files
    found: dict[str, Read] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if file.is_file():
                found[file.relative_to(path).as_posix()] = partial(_content, file, origin)
    return found


def _content(file: Path, origin: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ShardError(f"{origin}: {file} cannot be read: {error.strerror}; mend or delete it") from error


def _names(path: Path, files: Mapping[str, Read], origin: str) -> tuple[str, ...] | None:
    """The names of YOLO's classes, beside the annotations or up to two folders above; None where nothing has them."""
    for wanted in NAMES:
        inside = min((name for name in files if PurePosixPath(name).name == wanted), key=len, default=None)
        if inside is not None:
            return yolo_names(wanted, files[inside](), f"{origin}: {inside}")
    for folder in path.resolve().parents[:2] if path.is_dir() else ():
        for wanted in NAMES:
            if (folder / wanted).is_file():
                return yolo_names(wanted, _content(folder / wanted, origin), str(folder / wanted))
    return None


# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matched:
    """The annotations of images, by the images' paths; None for an image that nobody looked at."""

    images: Mapping[str, DrawnImage | None]
    notes: tuple[str, ...]
    """What is to be said."""


def match(annotations: Annotations, names: Iterable[str], source: str) -> Matched:
    """Which annotations are of which images: of the same path, or else of the same name where that is the only one.

    names: the images' paths from their folder on.  source: what errors call them.  Raises ShardError where none fits.
    """
    names = list(names)
    whole = {canonical(_key(name, annotations.by_stem)): name for name in annotations.images}
    short: dict[str, list[str]] = {}
    for name in annotations.images:
        short.setdefault(PurePosixPath(canonical(_key(name, annotations.by_stem))).name, []).append(name)
    own = Counter(PurePosixPath(canonical(_stem(name) if annotations.by_stem else name)).name for name in names)
    found: dict[str, DrawnImage | None] = {}
    used: set[str] = set()
    for name in names:
        key = canonical(_stem(name) if annotations.by_stem else name)
        base = PurePosixPath(key).name
        known = whole.get(key)
        if known is None and len(short.get(base, ())) == 1 and own[base] == 1:
            known = short[base][0]
        if known is not None:
            used.add(known)
        found[name] = annotations.images[known] if known is not None else _absent(annotations)
    if not used:
        raise ShardError(
            f"{annotations.origin}: none of its {len(annotations.images)} images is in {source} (it has "
            f"{listed(list(annotations.images))}; there are {listed(names)}); name the folder that holds them"
        )
    notes = list(annotations.notes)
    if unseen := [name for name in names if found[name] is None]:
        notes.append(
            f"warning: {len(unseen)} of {len(names)} images have no {annotations.kind} annotations and are left out "
            f"({listed(unseen)})"
        )
    if gone := [name for name in annotations.images if name not in used]:
        notes.append(
            f"warning: {len(gone)} images of {annotations.origin} are not in {source} ({listed(gone)}); their "
            "annotations are left out"
        )
    return Matched(found, tuple(notes))


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix else name


def _key(name: str, is_stem: bool) -> str:
    return name if is_stem else str(PurePosixPath(name))


def _absent(annotations: Annotations) -> DrawnImage | None:
    return DrawnImage() if annotations.absent_is_empty else None
