"""The image files below a folder: which files are images, which folders are classes, and what is left out."""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from swinv2_train.config import MachineError
from swinv2_train.config.pixels import CLIP_EXTENSIONS
from swinv2_train.data.class_names import canonical, in_order, is_left_out, listed
from swinv2_train.data.sample import ShardError, lacking
from swinv2_train.data.shards.manifest import INDEX_SUFFIX
from swinv2_train.data.shards.tar_index import LABEL_MISSING, SAMPLE_EXTENSIONS

_THREADS = 16
"""How many folders are listed at a time: on a network file system every file's size is a question to the server."""
_SAY_SEC = 10.0
_ARRAYS = (".npy", ".npz")
_NO_ENDING = "without an ending"
_ENDING_CHARS, _ENDINGS_LISTED = 12, 8


@dataclass(frozen=True)
class Listing:
    """The images below a folder."""

    names: list[str]
    """Paths from the folder on, sorted."""
    sizes: list[int]
    """Bytes of each image."""
    left_out: Counter[str]
    """Files that are no images, by the ending of their names, and hidden files and folders."""
    empty: list[str]
    """Class folders without an image, sorted."""


def is_image(name: str, image_member: str | None = None) -> bool:
    """By extension; what is hidden, or a system adds of itself, is no image, nor is a shard's index.

    name: with / between folders.  image_member: as open_folder's.
    """
    if is_hidden(name) or name.endswith(INDEX_SUFFIX):
        return False
    if image_member is not None:
        return name.lower().endswith(f".{image_member}")
    return os.path.splitext(name)[1][1:].lower() in SAMPLE_EXTENSIONS


def beside_images(names: Iterable[str]) -> set[str]:
    """The arrays among the images, where there are others: they are something about these, such as masks; and the clips
    where there is any image.
    """
    names = list(names)
    clips = {name for name in names if is_clip(name)}
    if len(clips) == len(names):
        return set()
    arrays = {name for name in names if name.lower().endswith(_ARRAYS)}
    return clips | arrays if len(arrays) + len(clips) < len(names) else clips


def is_clip(name: str) -> bool:
    """Whether a file holds many frames, by its ending."""
    return os.path.splitext(name)[1][1:].lower() in CLIP_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether the file or a folder above it is, or was added by a system of itself.  name: with / between folders."""
    return any(map(is_left_out, name.split("/")))


def ending(name: str) -> str:
    """What tells of which kind a file is that is no image; name: as is_image's."""
    return "hidden" if is_hidden(name) else os.path.splitext(name)[1].lower()[:_ENDING_CHARS] or _NO_ENDING


def say_left_out(left_out: Counter[str], source: str) -> str:
    """A line that names what is no image, by ending and count."""
    return (
        f"{left_out.total()} files and hidden folders of {source} are not images and are left out ({_listed(left_out)})"
    )


def no_image_named(left_out: Counter[str]) -> str:
    """What there is where there are no images."""
    wanted = sorted(SAMPLE_EXTENSIONS, key=lambda each: (each != "jpg", each))
    found = f": {_listed(left_out)};" if left_out else ","
    return f"{left_out.total()} files{found} none named *.{', *.'.join(wanted)}"


def _listed(left_out: Counter[str]) -> str:
    common = left_out.most_common(_ENDINGS_LISTED)
    rest = left_out.total() - sum(count for _, count in common)
    return ", ".join([*(f"{count} {name}" for name, count in common), *([f"{rest} others"] if rest else [])])


def check_separators(names: Sequence[str], source: str) -> None:
    """Raises ShardError for Windows' folders in the names of files, which would all be one folder without classes."""
    wrong = [name for name in names if "\\" in name]
    if wrong and not any("/" in name for name in names):
        raise ShardError(
            f"{source}: {len(wrong)} file names hold backslashes (e.g. {wrong[0]}): whatever unpacked them made no "
            "folders of them; unpack the archive by unzip, or give swinv2-make-shards the zip itself"
        )


def class_names(names: Iterable[str], source: str, empty: Iterable[str] = ()) -> tuple[str, ...] | None:
    """The classes of images by their paths: the uppermost folders, in order; None when there are none.

    source: what errors call the place.  empty: class folders without an image, which are classes too.  Raises
    ShardError when some images are in such a folder and others are not.
    """
    names = list(names)
    loose = [name for name in names if "/" not in name]
    if loose and len(loose) < len(names):
        raise ShardError(
            f"{source} holds {len(names) - len(loose)} images in class folders and {len(loose)} outside of them (e.g. "
            f"{loose[0]}); move them into their classes, or keep them apart"
        )
    return None if loose else in_order((*(name.partition("/")[0] for name in names), *empty))


def label_numbers(classes: Sequence[str]) -> Callable[[str], int]:
    """The label of an image by its path: its class's place, LABEL_MISSING without a class."""
    number = {name: label for label, name in enumerate(classes)}
    known: dict[str, int] = {}  # canonical() for each folder and not for each image

    def label_of(path: str) -> int:
        folder, slash, _ = path.partition("/")
        if folder not in known:
            known[folder] = number.get(canonical(folder), LABEL_MISSING) if slash else LABEL_MISSING
        return known[folder]

    return label_of


def empty_warning(path: str, empty: Sequence[str]) -> str:
    """What is said of class folders without an image."""
    return (
        f"warning: {path}: no image in the class folders {listed(empty)}; they count as classes (the model never sees "
        "one of them): fill or delete them"
    )


def list_folder(
    path: str, source: str, progress: Callable[[str], None] | None = None, image_member: str | None = None
) -> Listing:
    """Every image below `path`, links followed.  source: what errors call it.  image_member: as open_folder's.

    Raises ShardError when there is none, or a folder or file cannot be looked at: a link to nothing, or one that leads
    back to a folder above it; MachineError where the machine cannot list them.
    """
    found, said = _Found(), time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = [_Open("", ())]
        while waiting:
            level, waiting = waiting, []
            for part in pool.map(lambda folder: _scan(path, folder, image_member), level):
                found.add(part)
                waiting += part.folders
                if progress is not None and time.monotonic() - said > _SAY_SEC:
                    said = time.monotonic()
                    progress(f"{path}: {len(found.images)} images found so far")
    if found.problems:
        raise ShardError(f"{found.problems[0]} ({len(found.problems)} such problems); mend or delete it")
    if image_member is None:
        beside = beside_images(name for name, _ in found.images)
        for name in beside:
            found.leave_out(name)
        found.images = [(name, size) for name, size in found.images if name not in beside]
    if not found.images:
        raise ShardError(f"{source} holds no images ({_what_instead(path, found)})")
    found.images.sort()
    filled = {name.partition("/")[0] for name, _ in found.images}
    empty = sorted({folder.name.partition("/")[0] for folder in found.folders} - filled)
    names, sizes = [name for name, _ in found.images], [size for _, size in found.images]
    return Listing(names, sizes, found.left_out, empty)


@dataclass(frozen=True)
class _Open:
    """A folder to look into."""

    name: str
    """Its path from the uppermost folder on, with a slash at its end; "" is that folder itself."""
    above: tuple[tuple[int, int], ...]
    """Device and inode of the folders on the way to it."""


@dataclass
class _Found:
    images: list[tuple[str, int]] = field(default_factory=list)
    folders: list[_Open] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, other: _Found) -> None:
        self.images += other.images
        self.folders += other.folders
        self.left_out.update(other.left_out)
        self.problems += other.problems

    def leave_out(self, name: str) -> None:
        self.left_out[ending(name)] += 1


def _scan(root: str, folder: _Open, image_member: str | None) -> _Found:
    """What lies directly in one folder."""
    found, path = _Found(), os.path.join(root, folder.name)
    try:
        status = os.stat(path)
        mine = (status.st_dev, status.st_ino)
        if mine in folder.above:
            found.problems.append(f"{path}: a link back to a folder above it")
            return found
        with os.scandir(path) as entries:
            for entry in entries:
                name = folder.name + entry.name
                if is_left_out(entry.name):
                    found.leave_out(entry.name)
                elif entry.is_dir():
                    found.folders.append(_Open(f"{name}/", (*folder.above, mine)))
                elif (
                    is_image(entry.name, image_member) or entry.is_symlink()
                ):  # a link to nothing may have been to a class
                    _look_at(entry, name, found, image_member)
                else:
                    found.leave_out(entry.name)
    except OSError as error:
        _check_machine(error, path)
        found.problems.append(f"{error.filename or path} cannot be listed: {error.strerror}")
    return found


def _look_at(entry: os.DirEntry[str], name: str, found: _Found, image_member: str | None) -> None:
    try:
        status = entry.stat()
    except OSError as error:
        _check_machine(error, entry.path)
        link = "a link to nothing" if entry.is_symlink() else f"cannot be looked at: {error.strerror}"
        found.problems.append(f"{entry.path}: {link}")
        return
    if is_image(entry.name, image_member) and stat.S_ISREG(status.st_mode):
        found.images.append((name, status.st_size))
    else:  # opening a pipe would wait for ever
        found.leave_out(entry.name)


def _check_machine(error: OSError, path: str) -> None:
    """Raises MachineError where nothing of the folder is to be mended; a permission is, by its owner."""
    fault = lacking(error)
    if fault is not None and not isinstance(error, PermissionError):
        raise MachineError(f"{path} cannot be listed: {fault}") from error


def _what_instead(path: str, found: _Found) -> str:
    if ".tar" in found.left_out:
        return f"it holds shards: name them, {os.path.join(path, '*.tar')}"
    if ".arrow" in found.left_out:
        return "but Arrow files: have `datasets` save them by save_to_disk, and name that directory"
    return no_image_named(found.left_out)
