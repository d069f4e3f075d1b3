"""Runs of two real ranks of which one is slow and then hangs: named, with everybody's stacks, and ended."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swinv2_train import train
from swinv2_train.config.exit_codes import EXIT_FAILED
from swinv2_train.distributed import World
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.monitoring.signs import STATUS, read_ranks
from swinv2_train.training import loop, prefetch
from tests.support.commands import SMALL
from tests.support.configs import composed
from tests.support.harness import run_distributed

pytestmark = [pytest.mark.slow, pytest.mark.serial]
HANG_SEC = 4.0
SLOW_SEC = 0.3


def kill_when_reported(run_dir: Path, rank: int) -> threading.Thread:
    """What a launcher does to a rank that cannot end by itself, after the others have ended."""

    def work() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (run_dir / STATUS).exists() and status_of(run_dir)["state"] == "failed":
                break
            time.sleep(0.1)
        os.kill(read_ranks(run_dir)[rank]["pid"], signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def status_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / STATUS).read_text())


def run(run_dir: Path, shards: tuple[str, ...], around: Any) -> None:
    """Two ranks of the train command; around(world) prepares each."""
    config = composed(
        ["experiment=cifar10_simmim", f"run_dir={run_dir}", "train.max_steps=100", "log.progress=none",
         *SMALL, "train.checkpoint_every_steps=100", *shards]
    )  # fmt: skip
    config.runtime.hang_timeout_sec = HANG_SEC

    def command(world: World) -> int:
        around(world)
        return train.train(config)

    ended = run_distributed(command, 2, init=False, timeout_sec=140, may_die=True)
    # by its own watchdog, or by the end of the other, whose watchdog was a little earlier
    assert all(code in (None, EXIT_FAILED) for code in ended), ended


@pytest.mark.timeout(150)
def test_a_slow_rank_and_then_a_stopped_one_are_named_and_the_run_ends(shards, tmp_path):
    """Under ZeRO-3, where every layer makes the ranks wait for each other.  Rank 1 stops like a host that freezes."""

    def around(world: World) -> None:
        if world.rank == 0:
            return
        take_step = loop.take_step

        def slow(run: loop.Run, *more: Any) -> Any:
            time.sleep(SLOW_SEC)
            if run.position.step == 6:
                os.kill(os.getpid(), signal.SIGSTOP)
            return take_step(run, *more)

        loop.take_step = slow

    killer = kill_when_reported(tmp_path, 1)
    run(tmp_path, shards, around)
    killer.join()
    lines = [line for line in read_metrics(tmp_path) if line["step"] >= 2]
    assert sum(line["perf/slowest_rank"] == 1 for line in lines) >= len(lines) - 1 == 4  # a busy machine holds one up
    assert all(line["perf/own_step_sec"] > SLOW_SEC for line in lines)
    status = status_of(tmp_path)
    slowest = status["slowest_rank"]
    assert slowest["median_sec"] < slowest["own_sec"] - 0.3 * SLOW_SEC
    pid = read_ranks(tmp_path)[1]["pid"]
    assert f"rank 1 (pid {pid} on " in status["reason"] and "(it is stopped)" in status["reason"], status["reason"]
    assert "rank 0 (pid" not in status["reason"]
    assert (status["step"], status["total_steps"], status["checkpoint_step"]) == (6, 100, None)
    stacks = (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "take_step" in stacks or "all_reduce_max" in stacks
    assert not (tmp_path / "stacks" / "rank_00001.txt").exists()  # it cannot


@pytest.mark.timeout(150)
def test_a_rank_whose_data_never_come_is_named_and_all_ranks_end_by_themselves(shards, tmp_path):
    def around(world: World) -> None:
        if world.rank == 0:
            return
        fetch = prefetch.next_batches

        def waiting(batches: Any, count: int) -> Any:
            if next(counter) == 3:
                threading.Event().wait()
            return fetch(batches, count)

        counter = iter(range(99))
        prefetch.next_batches = waiting

    run(tmp_path, shards, around)
    reason = status_of(tmp_path)["reason"]
    assert "rank 1 (pid" in reason and "is behind: waiting for data for" in reason, reason
    assert "rank 0 (pid" not in reason
    for rank, place in enumerate(("all_reduce_max", "waiting")):
        assert place in (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
