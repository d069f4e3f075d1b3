"""What becomes of a fused kernel that fails while it serves, and which cases have.

Nobody else is told in the middle of a step: the other ranks may be waiting in a collective.  So a failing forward pass
gives the reference's result, and a failing backward pass gradients that are not finite, which no engine takes a step
with; whoever trains asks :func:`pending` before each backward pass, lets all ranks agree, and repeats the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from swinv2_train.models.windows import WindowGrid


class Case(NamedTuple):
    """What a kernel is compiled for: the smallest map that asks it of the kernel."""

    dtype: torch.dtype
    grid: WindowGrid
    """Of one or two windows per axis, the last as full and as shifted as those of the map at hand."""
    head_dim: int

    def __str__(self) -> str:
        words = [f"windows of {'x'.join(map(str, self.grid.window))}", f"head dim {self.head_dim}"]
        words += ["shifted"] * self.grid.shifted + ["padded"] * (self.grid.padded != self.grid.size)
        return f"{', '.join(words)}, {str(self.dtype).removeprefix('torch.')}"


def case_of(dtype: torch.dtype, grid: WindowGrid, head_dim: int) -> Case:
    """The case of a map with this grid."""
    size = tuple(
        n if n <= w else w + (n - 1) % w + 1 for n, w in zip(grid.size, grid.window, strict=True)
    )  # as many tokens in the last window
    return Case(dtype, grid._replace(size=size), head_dim)


MOST_OF_A_CAUSE = 300
Told = Callable[[Case, str], None]

_failed: dict[Case, str] = {}
_pending: dict[Case, str] = {}
_watchers: list[Told] = []


@contextlib.contextmanager
def surviving(tell: Told) -> Iterator[None]:
    """Inside, a kernel's failure is told, as it happens and once a case, and got over; outside it is raised.

    tell: called with the case and the cause, on the thread that computes.  Afterwards nothing is remembered.
    """
    _watchers.append(tell)
    try:
        yield
    finally:
        _watchers.remove(tell)
        if not _watchers:
            _failed.clear()
            _pending.clear()


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, failures are raised on every thread, whoever survives them: for trials."""
    watchers = _watchers.copy()
    _watchers.clear()
    try:
        yield
    finally:
        _watchers.extend(watchers)


def failed(case: Case) -> bool:
    """Whether the kernels have failed at this case, so that they no longer serve it."""
    return case in _failed


def pending() -> dict[Case, str]:
    """The failures that not all ranks know of yet, and their causes."""
    return dict(_pending)


def agreed() -> None:
    """All ranks know of what is pending."""
    _pending.clear()


def cause_of(error: Exception) -> str:
    """An error in one line: a compiler's may be pages."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= MOST_OF_A_CAUSE else f"{text[: MOST_OF_A_CAUSE - 3]}..."


def lost_device(error: BaseException) -> RuntimeError | None:
    """What to say of an error after which a process cannot use its device any more; None for any other.

    Kernels run behind the host's back, so that an illegal address, say, is met at whatever waits for the device next.
    """
    if not isinstance(error, torch.AcceleratorError):
        return None
    told = RuntimeError(
        f"{cause_of(error)}: this process has lost its device, so the step cannot be taken again; the same command "
        "goes on from the newest checkpoint, with model.attention=reference if the fused attention kernels did it "
        "(CUDA_LAUNCH_BLOCKING=1 shows where)"
    )
    told.__cause__ = error
    return told


def text(rank: int, case: Case, cause: str) -> str:
    """What is told of a failure as it happens."""
    return f"the fused attention kernel failed on rank {rank} ({case}): {cause}; the reference stands in"


def got_over(case: Case, error: Exception, device: torch.device) -> None:
    """Remember a failure and tell it; raises it where nobody survives it, or nothing can.

    Too little memory is no failure of a kernel, and the reference takes more.  A CUDA error that stays (an illegal
    address, say) takes the process's whole context with it: RuntimeError with the remedy.
    """
    if not _watchers or isinstance(error, torch.OutOfMemoryError | MemoryError):
        raise error
    cause = cause_of(error)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error_that_stays:
            raise (lost_device(error_that_stays) or error_that_stays) from error
    if case not in _failed:
        _failed[case] = _pending[case] = cause
        for tell in _watchers:
            tell(case, cause)
