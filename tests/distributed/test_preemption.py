"""Stops of every kind of real runs: impatient signals, awkward moments, a time limit, a rank that dies alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from swinv2_train.monitoring.signs import read_ranks
from tests.support.commands import (
    alone,
    command,
    finish,
    finish_ranks,
    losses,
    ranks_of,
    start,
    start_ranks,
    wait_for_step,
)
from tests.support.shard_files import ten_class_shards
from tests.support.shard_server import serve
from tests.support.warm_python import warm_python

pytestmark = pytest.mark.slow
NOTICES_WITHIN_SEC = 60  # measured 1.1 (torchrun killed) and 0.6 (a rank killed) with two cores that six tasks share
DIES_WITHIN_SEC = 60  # torchrun asks its ranks every 0.1 s whether they live, then gives the others 30 s to leave


def test_a_second_signal_changes_nothing(shards, tmp_path):
    """An impatient Ctrl-C, also while the checkpoint is written, tears nothing: one whole checkpoint, exit code 3.

    At several gaps between the signals; each start goes on from what the one before has left.
    """
    step, resumes = 0, ""
    for gap_sec in (0.0, 0.01, 0.2):
        process = alone(tmp_path, *shards, "train.max_steps=100000")
        wait_for_step(tmp_path, step + 2, process)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(gap_sec)
        code, output = finish(process)
        assert code == EXIT_STOPPED and resumes in output, output
        checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint is not None and "stopped by SIG" in output
        step, resumes = int(checkpoint.name.removeprefix("step_")), f"resuming from {checkpoint}"
        assert max(losses(tmp_path)) == step
    code, output = finish(alone(tmp_path, *shards, f"train.max_steps={step + 2}"))
    assert code == EXIT_DONE and resumes in output, output


def test_a_signal_before_the_first_step_leaves_something_to_resume_or_nothing(shards, tmp_path):
    """At any moment of a start, among imports and after them: the command ends by itself, and the next start finds what
    it leaves in order.
    """
    for interpreter, delay_sec in ((True, 0.3), (True, 1.5), (False, 0.2), (False, 0.8)):
        process = alone(tmp_path, *shards, "train.max_steps=100000", "data.num_workers=1", interpreter=interpreter)
        time.sleep(delay_sec)
        process.send_signal(signal.SIGTERM)
        code, output = finish(process)
        assert code in (EXIT_STOPPED, -signal.SIGTERM, 128 + signal.SIGTERM), output
        checkpoint = newest_checkpoint(tmp_path)
        assert code != EXIT_STOPPED or checkpoint is not None, output
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))
    code, output = finish(alone(tmp_path, *shards, f"train.max_steps={step + 2}"))
    assert code == EXIT_DONE and (checkpoint is None or f"resuming from {checkpoint}" in output), output


def test_a_time_limit_saves_and_the_same_command_goes_on(shards, tmp_path):
    code, output = finish(alone(tmp_path, *shards, "train.max_steps=100000", "runtime.stop_after_sec=4"))
    assert code == EXIT_STOPPED and "stopped by the time limit" in output, output
    reached = newest_checkpoint(tmp_path)
    assert reached is not None
    steps = int(reached.name.removeprefix("step_"))
    code, output = finish(alone(tmp_path, *shards, f"train.max_steps={steps + 2}"))
    assert code == EXIT_DONE and f"resuming from {reached}" in output, output


def test_a_rank_that_dies_alone_brings_the_others_down(shards, tmp_path):
    process = start(*command(tmp_path, "train.max_steps=100000"), *shards)
    wait_for_step(tmp_path, 5, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    killed_at = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    code, output = finish(process, timeout_sec=DIES_WITHIN_SEC)
    assert code == 1 and time.monotonic() - killed_at < DIES_WITHIN_SEC, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert newest_checkpoint(tmp_path) is not None


def test_torchrun_starts_the_ranks_again_and_they_resume_by_themselves(shards, tmp_path):
    """--max-restarts: the same processes' command, the newest checkpoint, the same losses as without the kill."""
    overrides = ("train.max_steps=12", "train.checkpoint_every_steps=2")
    disturbed, quiet = tmp_path / "disturbed", tmp_path / "quiet"
    server = warm_python(tmp_path / "warm")  # forks of the agent that end would end its store with them
    try:
        python, restarts = str(tmp_path / "warm" / "python"), ("--max-restarts", "2")
        process = start(*command(disturbed, *overrides), *shards, torchrun=restarts, interpreter=python)
        wait_for_step(disturbed, 5, process)
        os.kill(read_ranks(disturbed)[0]["pid"], signal.SIGKILL)
        code, output = finish(process)
    finally:
        server.kill()
        server.wait()
    assert code == EXIT_DONE and "resuming from" in output, output
    code, output = finish_ranks(*command(quiet, *overrides), *shards)
    assert code == EXIT_DONE and "resuming from" not in output, output
    assert losses(disturbed) == losses(quiet)


def test_ranks_whose_torchrun_is_killed_save_and_leave(shards, tmp_path):
    """kill -9 of the launcher alone: nobody is left to end them, and two runs must not share a directory."""
    overrides = command(tmp_path, "train.max_steps=100000", "train.checkpoint_every_steps=100000")
    process = start(*overrides, *shards)
    wait_for_step(tmp_path, 5, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    killed_at = time.monotonic()
    wait_for_end(ranks, NOTICES_WITHIN_SEC)
    print(f"all ranks had left {time.monotonic() - killed_at:.1f} s after torchrun was killed")
    output, _ = process.communicate(timeout=10)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None and "stopped by the death of torchrun" in output, output
    step = int(checkpoint.name.removeprefix("step_"))
    code, output = finish_ranks(*command(tmp_path, f"train.max_steps={step + 1}"), *shards)
    assert code == EXIT_DONE and f"resuming from {checkpoint}" in output, output


def test_a_run_without_torchrun_outlives_its_parent(shards, tmp_path):
    """nohup, setsid, a shell that ends: only torchrun's death means anything."""
    script = """
import pathlib, subprocess, sys, time
run = subprocess.Popen(sys.argv[2:], stdout=sys.stderr)
while not pathlib.Path(sys.argv[1]).exists() and run.poll() is None:
    time.sleep(0.05)
print(run.pid)
"""
    overrides = command(tmp_path, "train.max_steps=60", "train.checkpoint_every_steps=60")
    arguments = [tmp_path / "metrics.jsonl", sys.executable, "-m", "swinv2_train.train", *overrides, *shards]
    log = tmp_path.with_suffix(".log")
    with open(log, "w") as file:
        parent = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=file,
            check=True,
            text=True,
        )
    wait_for_end([int(parent.stdout.split()[-1])], 120)
    assert max(losses(tmp_path)) == 60, log.read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_without_a_launcher_brings_the_other_down(victim, shards, tmp_path):
    """srun without --kill-on-bad-exit: the survivor's next collective fails, long before its time limit."""
    ranks = start_ranks(*command(tmp_path, "train.max_steps=100000", "runtime.process_group_timeout_sec=600"), *shards)
    wait_for_step(tmp_path, 5, ranks[0])
    ranks[victim].kill()
    killed_at = time.monotonic()
    code, output = finish(ranks[1 - victim], timeout_sec=NOTICES_WITHIN_SEC)
    print(f"the other rank had left {time.monotonic() - killed_at:.1f} s later")
    ranks[victim].communicate()
    assert code == EXIT_FAILED and f"rank {1 - victim} failed" in output, output
    assert newest_checkpoint(tmp_path) is not None


def wait_for_end(pids: list[int], timeout_sec: float) -> None:
    """Until none of the processes runs; those of a dead parent may stay as zombies."""
    deadline = time.monotonic() + timeout_sec
    while any(running(pid) for pid in pids):
        if time.monotonic() > deadline:
            left = [pid for pid in pids if running(pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"still running: {left}")
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stop_of_one_rank_ends_the_first_downloads_of_all(tmp_path):
    """The other waits for a server that is busy for ten minutes, and nobody has told it to stop."""
    ten_class_shards(tmp_path / "served")
    with serve(tmp_path / "served") as server:
        for number in range(3):
            server.faults[f"train-{number:06d}.tar"] = ["always 503"]
        arguments = command(
            tmp_path / "run", f"data.shards='{server.url}/train-{{000000..000002}}.tar'", "data.eval_shards=null",
            f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1",
        )  # fmt: skip
        ranks = start_ranks(*arguments)
        while not server.gets["train-000000.tar"]:
            assert ranks[0].poll() is None, ranks[0].communicate()
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGTERM)
        ended = [finish(rank) for rank in ranks]
        assert [code for code, _ in ended] == [EXIT_STOPPED] * 2, ended
        output = ended[0][1]
        assert "SIGTERM: stopping the wait for data" in output and "stopped by SIGTERM after step 0" in output, output
