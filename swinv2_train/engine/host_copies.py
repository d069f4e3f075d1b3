"""CPU memory that an accelerator copies to and from while it computes."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor


def page_locked(nbytes: int) -> Tensor:
    """Page-locked CPU memory of the size that was asked for, uint8 (nbytes,), until nothing uses it any more.

    torch's own comes in powers of two, up to twice as much.  Whoever lets go of it must know that no copy is under way.
    """
    pages = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.empty(pages + mmap.PAGESIZE, dtype=np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE  # whole pages, because one page cannot be locked twice
    used = memory[start : start + nbytes]  # torch keeps this array as long as anything uses its memory
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if nbytes and int(runtime.cudaHostRegister(memory.ctypes.data + start, pages, 0)) == 0:
        weakref.finalize(used, _unlock, runtime, memory, start).atexit = False  # the driver may have gone by then
    # Else (a limit of locked memory) a copy takes longer and is as right.
    return torch.from_numpy(used)


def _unlock(runtime: Any, memory: np.ndarray, start: int) -> None:
    runtime.cudaHostUnregister(memory.ctypes.data + start)


class _Kept:
    """A tensor in CPU memory, on its way there, or on its way back."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host, self.device = host, device
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


class HostCopies:
    """Tensors that autograd saves, in CPU memory between the passes: keep() and fetch() are its hooks.

    On CUDA a stream of its own copies both ways, beside the passes.  Whoever fetches a tensor has the one that was kept
    before it sent as well, because a backward pass asks for them in reverse order.  Memory is used again in the next
    step.  On a CPU the same without streams.
    """

    def __init__(self) -> None:
        self._order: list[weakref.ref[_Kept]] = []
        self._free: defaultdict[tuple[bool, int], list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, x: Tensor) -> _Kept:
        """Send x to CPU memory; nobody may write into it until the copy is made."""
        free = self._free[x.is_cuda, x.nbytes]
        memory = (
            free.pop() if free else page_locked(x.nbytes) if x.is_cuda else torch.empty(x.nbytes, dtype=torch.uint8)
        )
        kept = _Kept(memory.view(x.dtype).view(x.shape), x.device)
        weakref.finalize(kept, free.append, memory)  # used or not: an error may have dropped the graph
        with self._beside(x.device) as stream:
            kept.host.copy_(x.detach(), non_blocking=True)
            if stream is not None:
                x.record_stream(stream)
        self._order = [each for each in self._order if each() is not None]
        self._order.append(weakref.ref(kept))
        return kept

    def fetch(self, kept: _Kept) -> Tensor:
        """The tensor on its device again; the one that was kept before it follows while this one is used."""
        self._send(kept)
        at = next((i for i, each in enumerate(self._order) if each() is kept), 0)
        before = self._order[at - 1]() if at > 0 else None
        if before is not None and before.device == kept.device:
            self._send(before)
        back, kept.back = kept.back, None
        assert back is not None, "it was sent"
        if kept.arrived is not None:
            current = torch.cuda.current_stream(kept.device)
            current.wait_event(kept.arrived)
            back.record_stream(current)
        return back

    def _send(self, kept: _Kept) -> None:
        if kept.back is None:
            with self._beside(kept.device) as stream:
                kept.back = kept.host.to(kept.device, non_blocking=True, copy=True)
                kept.arrived = None if stream is None else stream.record_event()

    @contextlib.contextmanager
    def _beside(self, device: torch.device) -> Any:
        """What is begun inside waits for what is under way, and is waited for by nothing; yields the stream, if any."""
        if device.type != "cuda":
            yield None
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream
