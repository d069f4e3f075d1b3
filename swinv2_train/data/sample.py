"""What every source yields, and the two ways in which it can be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swinv2_train.config import ConfigError


class ShardError(ConfigError):
    """A shard, or the pattern that names shards, is wrong; never swallowed by the policy for damaged samples."""


class SampleError(ConfigError):
    """One sample is damaged; data.on_bad_sample decides what follows.

    cause: what is wrong with it; shard and key: which one, where that is known already.
    """

    def __init__(self, cause: str, shard: str = "", key: str = "") -> None:
        super().__init__(f"{shard}: sample '{key}': {cause}" if shard else cause)
        self.cause, self.shard, self.key = cause, shard, key

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleError, (self.cause, self.shard, self.key)


@dataclass(frozen=True)
class Sample:
    """One undecoded sample: the bytes of the image file as they were packed."""

    key: str
    image: bytes
    extension: str
    """jpg, jpeg, png or webp."""
    label: int | None
    """None where the shard has no .cls for the key, or one that is not a non-negative integer."""
    shard: str
