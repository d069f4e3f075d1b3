"""Ranks that are told to stop at different moments stop before the same micro-batch, without a collective."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from swinv2_train import train
from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config import Config
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED
from swinv2_train.distributed import World, all_reduce_max
from swinv2_train.distributed.front import Front
from swinv2_train.engine.deepspeed.engine import ZeroEngine
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.commands import SMALL
from tests.support.configs import composed
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

    found = run_distributed(count, 3)
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

    assert run_distributed(twice, 2) == [[True, False, True]] * 2


def test_without_its_store_all_go_on_to_the_agreement_at_the_end_of_the_step() -> None:
    """kill -9 of torchrun, which holds it, must not end the ranks without a checkpoint."""

    def lose(world: World) -> list[bool]:
        front = Front()
        found = [front.may_begin(False)]
        all_reduce_max(0)

        class Gone:
            def compare_set(self, *arguments: str) -> bytes:
                raise DistNetworkError("Connection reset by peer")

        front._store = Gone()  # type: ignore[assignment]
        return [*found, front.may_begin(True), front.may_begin(True)]

    assert run_distributed(lose, 2) == [[True, True, True]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_stop_in_the_middle_of_a_step_loses_nothing(engine: str, shards: tuple[str, str], tmp_path: Path) -> None:
    """One rank of two is told while gradients are being exchanged: both leave, and go on bit for bit."""
    whole, stopped = (
        composed([
            "experiment=cifar10_simmim", f"run_dir={tmp_path / name}", *SMALL, *shards, f"engine={engine}",
            "train.max_steps=4", "train.micro_batch_size=2", "model.drop_path_rate=0.3", "log.progress=none",
        ])
        for name in ("whole", "stopped")
    )  # fmt: skip

    def run(config: Config, stop_at: int) -> list[int]:
        def command(world: World) -> int:
            backward, calls = ZeroEngine.backward, []

            def counting(self: ZeroEngine, loss: Any) -> None:
                backward(self, loss)
                calls.append(1)
                if os.environ["RANK"] == "1" and len(calls) == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)

            ZeroEngine.backward = counting  # type: ignore[method-assign]  # a fork's own
            return guarded(lambda: train.train(config))

        return run_distributed(command, 2, init=False)

    assert run(whole, 0) == [EXIT_DONE] * 2
    assert run(stopped, 10) == [EXIT_STOPPED] * 2  # of four micro-batches a step
    newest = newest_checkpoint(tmp_path / "stopped")
    # Without an exchange in each micro-batch the other rank may be at the end of step 3 already: then it is taken.
    assert newest is not None and newest.name in ("step_00000002", "step_00000003")
    assert run(stopped, 0) == [EXIT_DONE] * 2
    first, second = (read_metrics(tmp_path / name) for name in ("whole", "stopped"))
    for name in ("train/loss", "train/grad_norm"):
        assert [line[name] for line in first if name in line] == [line[name] for line in second if name in line]
