"""What every source yields, and the ways in which it can be wrong: the shard, the sample, or the machine.

A sample is a key, the bytes of an image, and typed targets by name.  A new kind of target is a field of Targets and an
entry of MEMBERS.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np

from swinv2_train.config import ConfigError, MachineError, OutageError
from swinv2_train.data.clips.frame_times import FrameTimes


class ShardError(ConfigError):
    """A shard, or the pattern that names shards, is wrong; never swallowed by the policy for damaged samples."""


class ShardOutageError(ShardError, OutageError):
    """A shard cannot be fetched for now: its server or the network does not answer, or says that it is busy."""


class SampleError(ConfigError):
    """One sample is damaged; data.on_bad_sample decides what follows.

    cause: what is wrong with it; shard and key: which one, where that is known already.
    """

    def __init__(self, cause: str, shard: str = "", key: str = "") -> None:
        super().__init__(f"{shard}: sample '{key}': {cause}" if shard else cause)
        self.cause, self.shard, self.key = cause, shard, key

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleError, (self.cause, self.shard, self.key)


_OF_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL
}  # fmt: skip
"""What the system says of a file that is gone, or is none any more."""
_REMEDIES = {
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "close what holds files on this machine",
    errno.EACCES: "give this user the permission to read it",
    errno.EPERM: "give this user the permission to read it",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room on the disk",
    errno.ENOMEM: "give the run more memory, or lower data.num_workers or train.micro_batch_size",
}
_PAUSES_SEC = (0.1, 0.3, 1.0)
_NO_MEMORY = ("out of memory", "insufficient memory", "memory allocation", "allocate memory", "not enough memory")


def lacking(error: BaseException) -> str | None:
    """What the machine lacked, and the remedy, where that is why something failed; None where the bytes or the file
    themselves were the reason.

    Decoders report a lack of memory by exceptions of their own, in words.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or (number is None and any(word in str(error).lower() for word in _NO_MEMORY)):
        return f"no memory is left; {_REMEDIES[errno.ENOMEM]}"
    if number is None or number in _OF_THE_FILE:
        return None
    return f"{os.strerror(number)}; {_REMEDIES.get(number, 'look to the disk or the network behind it')}"


def again(read: Callable[[], bytes]) -> bytes:
    """What read gives, tried again after pauses where the machine could not just now (too many open files, a network
    file system that does not answer); its last OSError where that does not help.
    """
    for pause_sec in _PAUSES_SEC:
        try:
            return read()
        except OSError as error:
            if lacking(error) is None or error.errno in (errno.EACCES, errno.EPERM):
                raise
        time.sleep(pause_sec)
    return read()


def unreadable(error: OSError, path: str, otherwise: Exception) -> Exception:
    """What to raise for a file that could not be opened or read: the machine's fault where it was one."""
    fault = lacking(error)
    return otherwise if fault is None else MachineError(f"{path} cannot be read: {fault}")


class Targets(TypedDict, total=False):
    """What is known of an image by name; a name is absent where the sample does not have it, or not readably."""

    label: int
    """The image's class, 0 or more."""
    labels: np.ndarray
    """int32 (n,): the classes that apply, and -1 - c for each class c that is not known to; all others do not."""
    values: np.ndarray
    """float64 (K,): numbers that belong to the image, nan where one is not known."""
    segmentation: bytes
    """The label image, a PNG file as it was packed: the class of each pixel (transforms/label_image.py reads it)."""
    objects: bytes
    """The JSON of its objects, with their boxes, classes and masks (data/objects.py reads it)."""


LABEL = "label"
"""The name of the one integer that sorts an image into a class."""
LABELS = "labels"
"""The name of the classes of which several may apply to an image."""
VALUES = "values"
"""The name of the numbers that belong to an image."""
SEGMENTATION = "segmentation"
"""The name of the image whose pixels are classes."""
OBJECTS = "objects"
"""The name of the JSON of an image's objects."""


class Member(NamedTuple):
    """How a member of a webdataset sample (KEY.suffix) gives a target."""

    suffix: str
    read: Callable[[bytes], Any]
    """From the member's bytes to the target; None where they are none."""
    example: Any
    """Any value: a transform makes of it, and of an image of EXAMPLE_PX x EXAMPLE_PX, a row of the shape that all rows
    have.
    """


EXAMPLE_PX = 64
"""The sides of the images that targets' examples belong to."""
LABEL_BYTES = 64
"""A longer .cls member is no number."""


def read_label(content: bytes) -> int | None:
    """The non-negative integer that a .cls member holds; None where it holds something else."""
    if len(content) > LABEL_BYTES or not content.strip().isdigit():
        return None
    label = int(content)
    return label if label < 2**63 else None


_EXAMPLE_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000004000000040010000000082124c730000000f4944415478da63601805a3807c"
    "000002400001e04d1d440000000049454e44ae426082"
)
"""A label image of EXAMPLE_PX x EXAMPLE_PX pixels of value 0."""

MEMBERS: Mapping[str, Member] = {
    LABEL: Member("cls", read_label, example=0),
    SEGMENTATION: Member("seg.png", lambda content: content or None, example=_EXAMPLE_PNG),
    OBJECTS: Member(
        "json", lambda content: content or None, example=b'{"size":[%d,%d],"objects":[]}' % (EXAMPLE_PX, EXAMPLE_PX)
    ),
}
"""The member of each target."""


def read_targets(members: Mapping[str, bytes]) -> Targets:
    """The targets among the members of a sample, given by suffix."""
    found = {name: m.read(members[m.suffix]) for name, m in MEMBERS.items() if m.suffix in members}
    return cast(Targets, {name: value for name, value in found.items() if value is not None})


def labelled(label: int) -> Targets:
    """The targets of an image that has a class alone; a negative label stands for none."""
    return {"label": label} if label >= 0 else {}


_EXAMPLES = {LABELS: np.empty(0, np.int32), VALUES: np.array(0.0)}
"""Of targets that no member of their own gives (sources/labelled.py); a number without an axis is as many as asked."""
OF_LABELS = (LABEL, *_EXAMPLES)
"""What Source.unlabelled counts the lack of."""


def example_targets(names: Collection[str]) -> Targets:
    """Targets of these names, for a transform that is to show the shape of its rows."""
    found = {name: _EXAMPLES[name] if name in _EXAMPLES else MEMBERS[name].example for name in names}
    return cast(Targets, found)


@dataclass(frozen=True)
class Sample:
    """One undecoded sample: the bytes of the image or clip as they were packed, and its targets."""

    key: str
    image: bytes
    """Of a clip, the file with all of its frames."""
    extension: str
    """One of SAMPLE_EXTENSIONS (shards/tar_index.py), or what a saved data set names its images."""
    targets: Targets
    shard: str
    times: FrameTimes | None = None
    """When the frames of a video are shown, where the shard's index knows it."""
