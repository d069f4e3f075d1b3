"""The next step's micro-batches, made ready while the accelerator still computes the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from swinv2_train.config import ConfigError
from swinv2_train.distributed import all_reduce_max, raise_together
from swinv2_train.evaluation.scoring import Batch, next_batches
from swinv2_train.monitoring.activity import RANK_WAIT, RankActivity
from swinv2_train.runtime import StopNow, StopRequest

GO, STOP, FAILED = 0, 1, 2


class PreparedStep(NamedTuple):
    """A step that all ranks are to take, or why they are not."""

    state: int
    """GO, STOP or FAILED, the same on every rank."""
    micro_batches: list[Batch]
    """As the loader made them, in CPU memory."""
    copies: Iterator[Batch]
    """The micro-batches with their tensors on the device, each to be asked for when the one before is computed."""
    problem: ConfigError | None
    """What is wrong with this rank's data."""


class StepPrefetcher:
    """Fetches the micro-batches of one step after the other, and asks all ranks whether to take it.

    prepare() belongs between a step's last backward pass and its optimizer, where the host waits for the device in
    any case: the gradient norm decides whether the step is taken.  So asking the ranks costs no wait of its own, and
    loading and copying hide behind the backward pass.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        accumulation_steps: int,
        device: torch.device,
        stop: StopRequest,
        activity: RankActivity,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """waiting: a context for the time in which the loader is waited for."""
        self._batches, self._accumulation_steps = batches, accumulation_steps
        self._device, self._stop, self._activity, self._waiting = device, stop, activity, waiting
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: PreparedStep | None = None

    def prepare(self) -> None:
        """Make the next step ready, where it is not.  Collective."""
        if self._ready is not None:
            return
        with self._waiting():
            micro_batches, problem = self._next_batches()
        copies = self.copies(micro_batches)
        with self._activity.doing(RANK_WAIT):
            state = all_reduce_max(FAILED if problem else STOP if self._stop.requested else GO)
        self._ready = PreparedStep(state, micro_batches, copies, problem)

    def copies(self, micro_batches: list[Batch]) -> Iterator[Batch]:
        """Micro-batches on the device, each to be asked for when the one before is computed."""
        return iter(micro_batches) if self._stream is None else Copies(micro_batches, self._device, self._stream)

    def _next_batches(self) -> tuple[list[Batch], ConfigError | None]:
        """The step's batches; none where a stop is asked for, which need not wait for data that may never come."""
        try:
            with self._stop.interrupting():
                return next_batches(self._batches, self._accumulation_steps)
        except StopNow:
            return [], None

    def take(self) -> PreparedStep:
        """The step that is ready; where none is, it is made so.  Every rank must have prepared equally often.

        Raises on every rank what is wrong with the data of any.
        """
        if self._ready is None:
            self.prepare()
        assert self._ready is not None
        ready, self._ready = self._ready, None
        if ready.state == FAILED:
            raise_together(ready.problem)
        return ready

    def recheck_stop(self) -> None:
        """Let a stop that came after the next step was made ready come before it.  Collective."""
        if (
            self._ready is not None
            and self._ready.state == GO
            and all_reduce_max(int(self._stop.requested is not None))
        ):
            self._ready = self._ready._replace(state=STOP)


class Copies(Iterator[Batch]):
    """Batches on an accelerator.  Each is copied by a stream of its own while the one before is computed.

    The batches should lie in page-locked memory, as those of worker processes do; else the host waits for the copy.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, stream: torch.cuda.Stream) -> None:
        self._rest, self._device, self._stream = iter(batches), device, stream
        self._ahead = self._begin()

    def __next__(self) -> Batch:
        if self._ahead is None:
            raise StopIteration
        batch, current = self._ahead, torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.record_stream(current)  # its memory belongs to the other stream, which must not reuse it yet
        self._ahead = self._begin()
        return batch

    def _begin(self) -> Batch | None:
        batch = next(self._rest, None)
        if batch is None:
            return None
        with torch.cuda.stream(self._stream):
            return {
                name: value.to(self._device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
