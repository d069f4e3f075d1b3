"""Which rank the others wait for in every step: time of its own, without the time that it waits for them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup, Work

_COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "gather", "scatter", "alltoall",
    "alltoall_base", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base",
    "reduce_scatter", "reduce_scatter_tensor_coalesced", "_reduce_scatter_base", "_end_coalescing",
    "all_gather_single", "all_gather_single_coalesced", "all_to_all_single", "gather_single",
    "reduce_scatter_single", "reduce_scatter_single_coalesced",
)  # fmt: skip
"""What torch.distributed asks of a group, by the names of every version that is supported."""

STRAGGLER_RATIO = 1.25
"""A rank whose own time is more than this many times the median of all ranks is a straggler."""
STREAK_LENGTH = 3
"""Consecutive steps before it is reported: one step measures the noise of the host, too."""


class ComputeTimer:
    """What a rank spends in a piece of work apart from waiting in collectives.

    A wait is what its stream (on CUDA) or its thread (on a CPU) spends in a collective of a process group, or waiting
    for one that was begun: NCCL runs one that nobody asked to be asynchronous on the stream that computes, without a
    Work to wait for.  On CUDA, collectives that overlap with the computation count as waits too, so there the numbers
    compare ranks with each other and are no shares of the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._whole: list[Any] = []
        self._waits: list[Any] = []
        self._is_waiting = False

    @contextmanager
    def measured(self, wanted: bool = True) -> Iterator[None]:
        """What happens inside counts, where it is wanted, and nothing before it."""
        self._whole, self._waits = [], []
        if not wanted:
            yield
            return
        places = [(ProcessGroup, name) for name in _COLLECTIVES if name in vars(ProcessGroup)] + [(Work, "wait")]
        plain = [(owner, name, vars(owner)[name]) for owner, name in places]  # getattr would bind them to nothing
        for owner, name in places:
            setattr(owner, name, self._waiting(getattr(owner, name)))
        try:
            with self._span(self._whole):
                yield
        finally:
            for owner, name, method in plain:
                setattr(owner, name, method)

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """What happens inside does not count."""
        self._is_waiting = True
        try:
            with self._span(self._waits):
                yield
        finally:
            self._is_waiting = False

    def read(self) -> float:
        """Its own seconds in the last measured piece, 0 where it was not wanted.  On CUDA this waits for the device."""
        whole, waits = (sum(map(self._seconds, spans)) for spans in (self._whole, self._waits))
        return max(0.0, whole - waits)

    def _waiting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if self._is_waiting:  # a wait within a wait counts once
                return method(*arguments, **more)
            with self.excluded():
                return method(*arguments, **more)

        return call

    @contextmanager
    def _span(self, spans: list[Any]) -> Iterator[None]:
        begun = self._mark()
        try:
            yield
        finally:
            spans.append((begun, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, span: tuple[Any, Any]) -> float:
        if self.device.type != "cuda":
            return float(span[1] - span[0])
        span[1].synchronize()
        return float(span[0].elapsed_time(span[1])) / 1000


class Slowest(NamedTuple):
    """The rank with the most time of its own in a step."""

    rank: int
    own_sec: float
    median_sec: float
    """The median of all ranks."""
    data_wait_sec: float
    """The part of own_sec in which it waited for data."""

    @property
    def lags(self) -> bool:
        """True when the others wait for it."""
        return self.own_sec > STRAGGLER_RATIO * self.median_sec

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is the slowest: {self.own_sec:.3g} s of its own a step, {self.data_wait_sec:.3g} of "
            f"them waiting for data; the median of all ranks is {self.median_sec:.3g} s"
        )


def slowest(own_sec: Sequence[float], data_wait_sec: Sequence[float]) -> Slowest:
    """The slowest rank, by the ranks' seconds a step without waiting for data (own_sec) and waiting for data
    (data_wait_sec).
    """
    totals = [own + wait for own, wait in zip(own_sec, data_wait_sec, strict=True)]
    rank = max(range(len(totals)), key=totals.__getitem__)
    low = statistics.median_low(totals)  # of two ranks the faster, or no rank of two could ever stand out
    return Slowest(rank, totals[rank], low, data_wait_sec[rank])


class StragglerStreak:
    """Says when the same rank has been waited for again and again."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._times = 0

    def add(self, found: Slowest) -> bool:
        """True once in a streak of STREAK_LENGTH steps or more in which the same rank lags."""
        rank = found.rank if found.lags else None
        self._times = self._times + 1 if rank == self._rank else 1
        self._rank = rank
        return rank is not None and self._times == STREAK_LENGTH
