"""Shared memory for the batches that worker processes make, used again and again.

Asking the system for shared memory anew for every batch costs a worker more than copying the images into it (a page
fault for each 4 kB), and passing it on costs the training process a connection and a mapping.
"""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Any]

_ALIGNED = 64  # bytes; any dtype may begin there
_numbers = itertools.count()
_memories: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()


class BatchMemory:
    """Memory for `slots` batches of `rows` rows like `row`, shared with the processes that are forked after this.

    The training process hands slots out (take) and a worker fills them (tensors, placed).  A slot is free again when
    nobody has any of its batch's tensors any more.  Pages that were never written take no memory.
    """

    def __init__(self, row: Mapping[str, Tensor], rows: int, slots: int) -> None:
        self._layout: dict[str, tuple[slice, torch.dtype, tuple[int, ...]]] = {}
        size = 0
        for name, tensor in row.items():
            num_bytes = rows * tensor.numel() * tensor.element_size()
            self._layout[name] = (slice(size, size + num_bytes), tensor.dtype, (rows, *tensor.shape))
            size += -(-num_bytes // _ALIGNED) * _ALIGNED
        self._slots = [np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8) for _ in range(slots)]
        self._free = deque(range(slots))
        self._number = next(_numbers)
        _memories[self._number] = self

    def take(self) -> int | None:
        """A free slot, the one in use last if possible; None when there is none."""
        return self._free.pop() if self._free else None

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Name -> (rows, ...), to be written."""
        return self._views(torch.from_numpy(self._slots[slot]))

    def placed(self, slot: int, rest: Batch) -> PlacedBatch:
        """What a worker sends when the slot's tensors are written.  rest: what else is in the batch."""
        return PlacedBatch(self._number, slot, rest)

    def received(self, slot: int) -> dict[str, Tensor]:
        """The tensors of a batch that came.  The slot becomes free when the last one is gone, with all its views."""
        lease = self._slots[slot][:]  # torch keeps the array as long as anything uses its memory
        weakref.finalize(lease, self._free.append, slot).atexit = False
        return self._views(torch.from_numpy(lease))

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: flat[part].view(dtype).view(shape) for name, (part, dtype, shape) in self._layout.items()}


class PlacedBatch:
    """A batch whose tensors lie in a slot; pickled as the numbers of both, it arrives as the batch itself."""

    def __init__(self, memory: int, slot: int, rest: Batch) -> None:
        self._content = (memory, slot, rest)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, self._content


class SentBatch:
    """A batch that has no slot; pickled as plain arrays, for torch would ask for shared memory of its own, in a thread
    whose errors nobody hears.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        tensors = {name: value.numpy() for name, value in self._batch.items() if isinstance(value, Tensor)}
        return _sent, (tensors, {name: value for name, value in self._batch.items() if name not in tensors})


def _sent(arrays: dict[str, np.ndarray], rest: Batch) -> Batch:
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, **rest}


def _arrived(memory: int, slot: int, rest: Batch) -> Batch:
    there = _memories.get(memory)  # None when the loader was closed meanwhile
    return rest if there is None else {**there.received(slot), **rest}


def fits(tensors: Mapping[str, Tensor], row: Mapping[str, Tensor], rows: int) -> bool:
    """Whether `rows` rows like `row` make tensors of exactly these names, shapes and dtypes."""
    return tensors.keys() == row.keys() and all(
        tensors[name].shape == (rows, *tensor.shape) and tensors[name].dtype == tensor.dtype
        for name, tensor in row.items()
    )
