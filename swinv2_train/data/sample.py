"""What every source yields, and the two ways in which it can be wrong.

A sample is a key, the bytes of an image, and typed targets by name.  A new kind of target is a field of Targets and an
entry of MEMBERS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, cast

from swinv2_train.config import ConfigError, OutageError


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


class Targets(TypedDict, total=False):
    """What is known of an image by name; a name is absent where the sample does not have it, or not readably."""

    label: int
    """The image's class, 0 or more."""


LABEL = "label"
"""The name of the one integer that sorts an image into a class."""


class Member(NamedTuple):
    """How a member of a webdataset sample (KEY.suffix) gives a target."""

    suffix: str
    read: Callable[[bytes], Any]
    """From the member's bytes to the target; None where they are none."""
    example: Any
    """Any value: a transform makes of it a row of the shape that all rows have."""


LABEL_BYTES = 64
"""A longer .cls member is no number."""


def read_label(content: bytes) -> int | None:
    """The non-negative integer that a .cls member holds; None where it holds something else."""
    if len(content) > LABEL_BYTES or not content.strip().isdigit():
        return None
    label = int(content)
    return label if label < 2**63 else None


MEMBERS: Mapping[str, Member] = {LABEL: Member("cls", read_label, example=0)}
"""The member of each target."""


def read_targets(members: Mapping[str, bytes]) -> Targets:
    """The targets among the members of a sample, given by suffix."""
    found = {name: m.read(members[m.suffix]) for name, m in MEMBERS.items() if m.suffix in members}
    return cast(Targets, {name: value for name, value in found.items() if value is not None})


def labelled(label: int) -> Targets:
    """The targets of an image that has a class alone; a negative label stands for none."""
    return {"label": label} if label >= 0 else {}


def example_targets(names: Collection[str]) -> Targets:
    """Targets of these names, for a transform that is to show the shape of its rows."""
    return cast(Targets, {name: MEMBERS[name].example for name in names})


@dataclass(frozen=True)
class Sample:
    """One undecoded sample: the bytes of the image file as they were packed, and its targets."""

    key: str
    image: bytes
    extension: str
    """jpg, jpeg, png or webp."""
    targets: Targets
    shard: str
