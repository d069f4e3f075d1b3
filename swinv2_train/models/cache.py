"""Tables that follow from sizes alone (masks, coordinates, indices): made once, kept within bounds."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


class TableCache:
    """The tensors that were used last, at most max_bytes and max_entries of them.

    A table larger than max_bytes is made anew each time (at 1536 px and window 32 the mask of stage 1 takes 604 MB).
    """

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()  # recomputation runs in autograd's own threads

    def __len__(self) -> int:
        return len(self._tables)

    def tensors(self) -> list[Tensor]:
        """What is kept."""
        with self._lock:
            return list(self._tables.values())

    def get(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        """The table of this key, built where it is not kept.  Nobody may write into it."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        with torch.inference_mode(False):  # or a table made under inference mode would spoil later training
            table = build()
        if type(table) is not Tensor or torch._C._get_tracing_state() is not None:
            return table  # a fake or traced tensor is of no use to anybody else
        with self._lock:
            if table.nbytes <= self.max_bytes and key not in self._tables:
                self._tables[key] = table
                self.nbytes += table.nbytes
            while self.nbytes > self.max_bytes or len(self._tables) > self.max_entries:
                self.nbytes -= self._tables.popitem(last=False)[1].nbytes
        return table


TABLES = TableCache(max_bytes=256 * 2**20, max_entries=256)


def cached_table(build: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep the results of a function in TABLES.  Its arguments, device and dtype among them, are hashable.

    torch.compile computes the table where it is used, from its arguments.
    """

    @functools.wraps(build)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        key = (build, args, tuple(kwargs.items()))
        return TABLES.get(key, lambda: build(*args, **kwargs))

    return table
