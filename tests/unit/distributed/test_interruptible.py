"""What rank 0 does alone for all of them ends with a stop, on every rank and without a hang."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from swinv2_train.distributed import World, on_main
from swinv2_train.distributed.interruptible import StopOfAnyRank, on_main_unless_stopped, unless_stopped
from swinv2_train.runtime import StopNow, StopRequest
from tests.support.harness import run_distributed


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_of_rank_0_ends_its_work_on_every_rank(ranks: int) -> None:
    """The others wait in a collective meanwhile, and would wait for ever in one that rank 0 never enters."""

    def ask(world: World) -> tuple[str, int, str]:
        def listing() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

        with StopRequest() as stop:
            try:
                on_main_unless_stopped(world, stop, listing)
            except StopNow as stopped:
                return str(stopped), stopped.exit_code(saved=False), on_main(world, lambda: "still together")
        return "went on", 0, ""

    assert run_distributed(ask, ranks) == [("SIGTERM", 143, "still together")] * ranks


def test_without_a_stop_the_result_reaches_every_rank() -> None:
    def ask(world: World) -> str:
        with StopRequest() as stop:
            found: str = on_main_unless_stopped(world, stop, lambda: "images")
            return found

    assert run_distributed(ask, 2) == ["images"] * 2


@pytest.mark.parametrize(("told", "words"), [(0, "SIGTERM"), (1, "SIGTERM"), (None, "the time limit")])
def test_a_stop_of_any_rank_ends_what_rank_0_does_alone(told: int | None, words: str) -> None:
    """One host may be told to go and not the others, and its ranks wait in a collective; a time limit tells nobody."""

    def ask(world: World) -> str:
        with StopRequest(after_sec=1 if told is None else None) as stop, StopOfAnyRank(stop) as stops:
            stops.listen()
            if world.rank == told:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            try:
                on_main_unless_stopped(world, stop, lambda: time.sleep(600))
            except StopNow as stopped:
                return str(stopped)
        return "went on"

    assert run_distributed(ask, 2) == [words] * 2


def test_a_stop_ends_what_each_rank_does_on_its_own() -> None:
    def ask(world: World) -> tuple[int, str, str]:
        with StopRequest() as stop, StopOfAnyRank(stop) as stops:
            stops.listen()
            rank = unless_stopped(stop, lambda: world.rank)
            if world.rank == 1:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            try:
                unless_stopped(stop, lambda: time.sleep(600 if world.rank == 0 else 0))
            except StopNow as stopped:
                return rank, str(stopped), on_main(world, lambda: "still together")
        return rank, "went on", ""

    found = run_distributed(ask, 2)
    assert found == [(rank, "SIGTERM", "still together") for rank in range(2)]
