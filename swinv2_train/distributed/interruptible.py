"""Work of rank 0 alone that a stop may end on every rank: nothing is lost with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swinv2_train.distributed.collectives import World, on_main
from swinv2_train.runtime import StopNow, StopRequest


def on_main_unless_stopped(world: World, stop: StopRequest | None, function: Callable[[], Any]) -> Any:
    """on_main, which a stop signal to rank 0 ends at once: StopNow on every rank.

    Only what rank 0 does meanwhile is ended, never the exchange with the other ranks, which wait in it.
    """
    if stop is None:
        return on_main(world, function)

    def attempt() -> tuple[Any, str | None]:
        try:
            with stop.interrupting():
                return function(), None
        except StopNow as stopped:
            return None, str(stopped)

    result, stopped_by = on_main(world, attempt)
    if stopped_by is not None:
        raise StopNow(stopped_by)
    return result
