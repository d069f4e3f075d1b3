"""Named tensors that are read when they are asked for, so that nobody holds a whole model to pass it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class LazyTensor(NamedTuple):
    """A tensor that is known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Gives the tensor on the CPU; every call reads anew."""


class LazyTensors(Mapping[str, Tensor]):
    """A mapping from names to tensors that reads one at each access and keeps none.

    ``tensors[name]`` reads; ``tensors.entries[name]`` tells shape and dtype without reading.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries
