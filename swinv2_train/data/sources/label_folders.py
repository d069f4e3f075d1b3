"""Which label image belongs to which image, where both are files: beside it, or in a folder that mirrors the images'.

Beside it means KEY.jpg and KEY.seg.png.  A mirror is ADE20K's layout as it is downloaded, images/training/KEY.jpg and
annotations/training/KEY.png, or any two folders like these.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swinv2_train.data.class_names import CLASSES_NAME, canonical, read_class_names
from swinv2_train.data.sample import MEMBERS, SEGMENTATION, ShardError

BESIDE = f".{MEMBERS[SEGMENTATION].suffix}"
"""What the name of a label image beside its image ends in."""
MIRRORS = (".png", ".tif", ".tiff")
"""What the name of a label image in a folder of its own ends in, all alike."""
ADE20K_NAMES = "objectInfo150.txt"
"""In ADE20K's folder: a table of the classes, numbered from 1, their names in the last column."""
_NAMES_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class LabelImages:
    """The label images of a folder's images, kept compactly.  Picklable."""

    root: str
    """The folder from which on their paths are those of the images."""
    suffix: str
    """What their names end in, where those of the images have their ending."""
    sizes: np.ndarray
    """int64 (images,): bytes of each, in packing order; -1 where there is none."""

    def path(self, image_name: bytes, ending_bytes: int) -> bytes:
        """Of an image's label image.  ending_bytes: of the image's ending, with its dot."""
        return os.fsencode(self.root) + b"/" + image_name[: len(image_name) - ending_bytes] + self.suffix.encode()


def stem(name: str, image_member: str | None = None) -> str:
    """The name of an image without its ending: without .image_member, where that says how images are called."""
    return posixpath.splitext(name)[0] if image_member is None else name[: -len(image_member) - 1]


def pairs_beside(names: Iterable[str]) -> dict[str, str]:
    """The label image of each image that has one beside it, by their paths with / between folders."""
    names = list(names)
    labels = {name.removesuffix(BESIDE): name for name in names if name.endswith(BESIDE)}
    if not labels:
        return {}
    images = (name for name in names if not name.endswith(BESIDE))
    return {name: labels[stem(name)] for name in images if stem(name) in labels}


def pairs_of(images: Iterable[str], labels: Iterable[str]) -> dict[str, str]:
    """The label image of each image that has one of the same path, but for the ending, among `labels`."""
    known = {stem(name): name for name in sorted(labels, reverse=True) if name.endswith(MIRRORS)}  # PNG before TIFF
    return {name: known[stem(name)] for name in images if stem(name) in known}


def mirrored(path: str, folders: Sequence[str], key: str) -> str:
    """The folder of label images of a folder of images: the last of its parts that is called folders[0] is folders[1].

    key: the config key that named the images, for errors.  Raises ShardError where no part is called so, or there is no
    such folder.
    """
    parts = path.split("/")
    if folders[0] not in parts:
        raise ShardError(
            f"data.label_folders ({', '.join(folders)}): no part of {key} '{path}' is called '{folders[0]}'; name the "
            "folder of the images and that of the label images that lies beside it"
        )
    place = len(parts) - 1 - parts[::-1].index(folders[0])
    found = "/".join([*parts[:place], folders[1], *parts[place + 1 :]])
    if not Path(found).is_dir():
        raise ShardError(
            f"data.label_folders ({', '.join(folders)}): the label images of {key} '{path}' are looked for in {found}, "
            "which is no folder; mend either key"
        )
    return found


def pixel_class_names(folder: Path, levels: int = 3) -> tuple[str, ...] | None:
    """The names of the classes of pixels, of a classes.txt or ADE20K's table in the folder or one up to `levels` above.

    None where there is neither.  Raises ShardError for a file that cannot be such a list.
    """
    for place in (folder, *folder.parents)[: levels + 1]:
        names = read_class_names(place / CLASSES_NAME) or ade20k_names(place / ADE20K_NAMES)
        if names is not None:
            return names
    return None


def ade20k_names(path: Path) -> tuple[str, ...] | None:
    """The names in ADE20K's table, of class 1 first, each the first of its synonyms where these differ; None without.

    Raises ShardError where it is another file.
    """
    try:
        lines = path.read_bytes()[:_NAMES_BYTES].decode("utf-8", "replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}; mend or delete it") from error
    rows = [line.rstrip().split("\t") for line in lines[1:] if line.strip()]
    if not rows or any(row[0].strip() != str(number) or len(row) < 2 for number, row in enumerate(rows, 1)):
        raise ShardError(
            f"{path} is not ADE20K's table (a headline, then lines that begin with 1, 2, ... and end with a name, "
            f"separated by tabs); put a {CLASSES_NAME} there instead, a name a line"
        )
    full = [canonical(row[-1].strip()) for row in rows]
    short = [name.split(",")[0].strip() for name in full]
    return tuple(short if len(set(short)) == len(short) else full)
