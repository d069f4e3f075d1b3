"""Work at a run's start that a stop may end on every rank: nothing is lost with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch.distributed as dist

from swinv2_train.config import ConfigError
from swinv2_train.distributed.collectives import (
    World,
    any_rank,
    broadcast_object,
    gather_objects,
    on_main,
    raise_together,
)
from swinv2_train.runtime import StopNow, StopRequest

Result = TypeVar("Result")
_KEY = "stop"
_EVERY_SEC = 0.5
_PATIENCE_SEC = 5.0
"""For the store to answer, at the end."""


class StopOfAnyRank:
    """Makes a stop that one rank hears one of every rank, half a second later: a host may be told alone to go.

    A rank that waits for others in a collective cannot tell them there, and who lists images or waits for a server is
    in no collective.  So a thread of each rank puts its stop into the store at which the ranks met, and looks for
    theirs; it also ends a wait at the time limit.

        with StopRequest() as stop, StopOfAnyRank(stop) as stops:
            world = init_distributed(...)
            stops.listen()
    """

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def listen(self) -> None:
        """From now on, until the end of the with block.  The process group must be up."""
        self._thread = threading.Thread(target=self._listen, name="stop of any rank", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        store = None if alone else dist.distributed_c10d._get_default_store()
        while not self._closed.wait(_EVERY_SEC):
            reason = self._stop.requested
            try:
                if store is not None and reason is not None:
                    store.set(_KEY, reason)
                elif store is not None and store.check([_KEY]):
                    reason = store.get(_KEY).decode()
            except dist.DistError:  # the store is gone, with torchrun or rank 0
                store = None
            if reason is not None:
                self._stop.interrupt(reason)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SEC)


def on_main_unless_stopped(world: World, stop: StopRequest | None, function: Callable[[], Any]) -> Any:
    """on_main, which a stop ends at once: StopNow on every rank.

    Only what rank 0 does meanwhile is ended, never the exchange with the other ranks, which wait in it.
    """
    result, stopped_by = on_main(world, lambda: _attempt(stop, function))
    if stopped_by is not None:
        raise StopNow(stopped_by)
    return result


def unless_stopped(stop: StopRequest | None, function: Callable[[], Result]) -> Result:
    """This rank's result of what every rank does on its own, and which a stop ends at once: StopNow on every rank.

    Collective where there is something that stops, but the function must not be.  What it raises is raised on this
    rank alone.
    """
    if stop is None:
        return function()
    result, stopped_by = _attempt(stop, function)
    reasons = [reason for reason in gather_objects(stopped_by) if reason is not None]
    if reasons:
        raise StopNow(reasons[0])
    return result


def main_alone(world: World, stop: StopRequest | None, function: Callable[[], Result]) -> Result | None:
    """A function of rank 0, whose result stays there (others have None), and which a stop ends at once: StopNow on
    every rank.  A ConfigError of it is raised on every rank.
    """
    result, reason, error = None, None, None
    if world.is_main:
        try:
            result, reason = _attempt(stop, function)
        except ConfigError as caught:
            error = caught
    if any_rank(reason is not None or error is not None):
        raise_together(error)
        raise StopNow(broadcast_object(reason))
    return result


def _attempt(stop: StopRequest | None, function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What the function returns, or what stopped it."""
    try:
        with contextlib.nullcontext() if stop is None else stop.interrupting():
            return function(), None
    except StopNow as stopped:
        return None, str(stopped)
