"""Ranks that are told to stop at different moments stop before the same micro-batch, without a collective."""

from __future__ import annotations

import random
import time

import pytest

from swinv2_train.distributed import World, all_reduce_max
from swinv2_train.distributed.front import Front
from tests.support.harness import run_distributed


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize("told", [(0,), (2,), (0, 1, 2)])
def test_all_ranks_stop_before_the_same_micro_batch(told: tuple[int, ...], collective: bool) -> None:
    """However far apart they are: also where a micro-batch holds a collective, as under ZeRO-3, which hangs unless all
    enter it."""

    def count(world: World) -> tuple[int, int]:
        dice, front, begun, at = random.Random(world.rank), Front(), 0, 5 + 3 * world.rank
        while front.may_begin(world.rank in told and begun >= at):
            begun += 1
            if collective:
                all_reduce_max(begun)
            time.sleep(dice.random() * 0.004)
            assert begun < 200
        return begun, at

    found = run_distributed(count, 3, timeout_sec=30)
    assert len({begun for begun, _ in found}) == 1
    assert found[0][0] >= min(found[rank][1] for rank in told)


def test_a_run_alone_asks_itself() -> None:
    front = Front()
    assert front.may_begin(False) and not front.may_begin(True)


def test_each_front_is_its_own() -> None:
    """A second run in one process group begins anew."""

    def twice(world: World) -> list[bool]:
        first = Front()
        found = [first.may_begin(False), first.may_begin(True)]
        all_reduce_max(0)
        return [*found, Front().may_begin(False)]

    assert run_distributed(twice, 2, timeout_sec=30) == [[True, False, True]] * 2
