"""What rank 0 does alone for all of them ends with a stop, on every rank and without a hang."""

from __future__ import annotations

import os
import signal
import time

import pytest

from swinv2_train.distributed import World, on_main
from swinv2_train.distributed.interruptible import on_main_unless_stopped
from swinv2_train.runtime import StopNow, StopRequest
from tests.support.harness import run_distributed


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_of_rank_0_ends_its_work_on_every_rank(ranks: int) -> None:
    """The others wait in a collective meanwhile, and would wait for ever in one that rank 0 never enters."""

    def ask(world: World) -> tuple[str, int, str]:
        def listing() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

        with StopRequest() as stop:
            try:
                on_main_unless_stopped(world, stop, listing)
            except StopNow as stopped:
                return str(stopped), stopped.exit_code(saved=False), on_main(world, lambda: "still together")
        return "went on", 0, ""

    assert run_distributed(ask, ranks, timeout_sec=30) == [("SIGTERM", 143, "still together")] * ranks


def test_without_a_stop_the_result_reaches_every_rank() -> None:
    def ask(world: World) -> str:
        with StopRequest() as stop:
            found: str = on_main_unless_stopped(world, stop, lambda: "images")
            return found

    assert run_distributed(ask, 2, timeout_sec=30) == ["images"] * 2
