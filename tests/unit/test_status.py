"""swinv2-status: of runs that go on, ended, failed, were killed, and of what is no run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from swinv2_train.monitoring.signs import STATUS
from swinv2_train.runtime import record_environment
from swinv2_train.status import read_status, status_text
from tests.support.small_run import run_alone
from tests.unit.monitoring.test_watchdog import start, wait_for

FIGURES = (
    "activity.step_done(40); activity.publish(total_steps=100, loss=2.5, images_per_sec=812.3, seconds_left=75.0)\n"
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "swinv2_train.status", *arguments], check=False, capture_output=True, text=True
    )


def wait_for_state(run_dir: Path, state: str) -> None:
    deadline = time.monotonic() + 30
    while read_status(run_dir)["state"] != state:
        assert time.monotonic() < deadline, read_status(run_dir)
        time.sleep(0.05)


def test_it_says_whether_blocks_are_compiled_and_why(tmp_path):
    """Of the newest start; a start of an earlier version has nothing to say."""
    start(tmp_path, "heartbeat.close(0, None)", timeout_sec=60).communicate(timeout=240)
    record_environment(tmp_path, 1, {"precision": "bf16"})
    assert read_status(tmp_path)["compile"] is None and "compiled" not in status_text(read_status(tmp_path))
    record_environment(tmp_path, 1, {"precision": "bf16", "compile": "blocks (auto: CUDA)"})
    assert "\ncompiled: blocks (auto: CUDA)" in status_text(read_status(tmp_path))


@pytest.mark.timeout(60)
def test_of_a_run_that_waits_for_data_and_is_then_killed(tmp_path):
    """What it does, for how long; and without it, what it did last.  Nothing can write the status of a killed run."""
    body = (
        FIGURES
        + "activity.enter('waiting for data'); activity.publish(checkpoint_step=30, norm=float('nan')); time.sleep(600)"
    )
    process = start(tmp_path, body, timeout_sec=100)
    wait_for(tmp_path / STATUS, process)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = read_status(tmp_path)
        if status["doing"] == "waiting for data" and "checkpoint_step" in status:
            break
        time.sleep(0.05)
    assert "NaN" not in (tmp_path / STATUS).read_text()  # which is no JSON
    text = status_text(read_status(tmp_path))
    where = f"(1 ranks, rank 0 is pid {process.pid} on "
    assert text.startswith(f"running: waiting for data {where}"), text
    assert "step 40 of 100 (40.0 %)  loss 2.5000  812.3 images/s  1:15 left\nlast complete checkpoint: step 30" in text
    process.kill()
    process.wait()
    status = read_status(tmp_path)
    assert status["state"] == "lost"
    text = status_text(status)
    assert text.startswith("no sign of life for ") and "s; then it was waiting for data (1 ranks" in text
    assert "left" not in text.splitlines()[1]


@pytest.mark.timeout(60)
def test_of_a_process_that_is_stopped(tmp_path):
    """It is there, but writes no more: only the age of its last sign tells."""
    process = start(tmp_path, "time.sleep(600)", timeout_sec=1.2)  # starting, which has no limit
    wait_for(tmp_path / STATUS, process)
    assert read_status(tmp_path)["state"] == "running"
    process.send_signal(signal.SIGSTOP)
    wait_for_state(tmp_path, "lost")
    assert read_status(tmp_path)["silent_sec"] > 4 * 0.3
    process.kill()
    process.wait()


def test_ranks_that_are_elsewhere_than_rank_0_have_a_line(tmp_path):
    now = time.time()
    common = {"host": "elsewhere", "state": "running", "reason": None, "doing": "training", "doing_since": now}
    signs = [
        common | {"updated_at": now},
        common | {"updated_at": now},
        common | {"updated_at": now, "doing": "waiting for data", "doing_since": now - 35},
        common | {"updated_at": now - 70},
        common | {"updated_at": now, "state": "failed", "reason": "ShardError: torn\nsecond line"},
    ]
    (tmp_path / "health").mkdir()
    for rank, sign in enumerate(signs):
        line = json.dumps(sign | {"rank": rank, "pid": 100 + rank, "step": 5, "moves": 9, "place": None})
        (tmp_path / "health" / f"rank_{rank:05d}.json").write_text(line)
    status = signs[0] | {"pid": 100, "step": 5, "world_size": 5, "heartbeat_sec": 10.0}
    status["slowest_rank"] = {"rank": 2, "own_sec": 3.0, "median_sec": 1.0, "data_wait_sec": 2.0}
    (tmp_path / STATUS).write_text(json.dumps(status))
    assert status_text(read_status(tmp_path)).splitlines()[1:] == [
        "slowest rank: 2, 3 s of its own a step, 2 of them waiting for data (median of all 1)",
        "rank 2 (pid 102 on elsewhere): waiting for data for 35 s",
        "rank 3 (pid 103 on elsewhere): no sign of life for 70 s; then it was training",
        "rank 4 (pid 104 on elsewhere): failed: ShardError: torn",
    ]


@pytest.mark.slow
def test_the_command_on_a_finished_run_and_on_what_is_none(settings, tmp_path):
    """The figures are those of the run; the exit code and one line say what is wrong with the input."""
    assert run_alone(settings("train.max_steps=3")) == EXIT_DONE
    done = command(str(tmp_path / "run"), "--json")
    status = json.loads(done.stdout)
    assert (done.returncode, done.stderr, status["state"], status["reason"]) == (0, "", "done", None)
    assert [status[name] for name in ("step", "total_steps", "checkpoint_step", "images_seen")] == [3, 3, 3, 24]
    assert status["loss"] > 0 and status["images_per_sec"] > 0 and [rank["rank"] for rank in status["ranks"]] == [0]
    text = status_text(status)
    assert text.startswith("done 0:0") and "step 3 of 3 (100.0 %)" in text and "no sign" not in text
    for arguments, message in (
        ([str(tmp_path)], f"error: run_dir ({tmp_path}) holds no status.json: no run has started there yet; name"),
        ([str(tmp_path / "none")], "is no directory; name the directory of a run"),
        ([], "error: name one run directory"),
    ):
        done = command(*arguments)
        assert done.returncode == EXIT_USER_ERROR and message in done.stderr and not done.stdout


def test_a_damaged_status_is_named(tmp_path):
    (tmp_path / STATUS).write_text("{")
    with pytest.raises(ConfigError, match=r"status.json: cannot be read"):
        read_status(tmp_path)


def test_a_failed_run_says_why(settings, tmp_path):
    """A loss that is not finite, as on the console."""
    config = settings("train.max_steps=3", "optim.lr=1e38", "optim.schedule.warmup_lr=1e38", "optim.clip_grad_norm=0")
    assert run_alone(config) == 1
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and "BadStepError: step" in status["reason"]
    assert status_text(status).startswith("failed 0:0") and "ago: BadStepError: step" in status_text(status)


def test_of_a_fine_tuning_that_is_done(tmp_path):
    """Its top-1 is what the run was for; the newest scores count, not a cut short evaluation's mark."""
    run = tmp_path / "run"
    run.mkdir()
    now = time.time()
    status = {
        "host": "h", "pid": 1, "state": "done", "reason": None, "doing": "ending", "doing_since": now, "step": 20,
        "updated_at": now, "total_steps": 20, "loss": 0.5, "checkpoint_step": 20, "world_size": 1,
        "heartbeat_sec": 10.0, "started_at": now,
    }  # fmt: skip
    (run / STATUS).write_text(json.dumps(status))
    lines = [
        {"step": 10, "images_seen": 1, "val/top1": 50.0},
        {"step": 20, "images_seen": 2, "val/loss": 0.25, "val/top1": 87.654, "val_ema/top1": 88.0, "val/unfinished": 0},
        {"step": 20, "images_seen": 2, "checkpoint/stall_sec": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = status_text(read_status(run))
    assert "scores at step 20: loss 0.25, top-1 87.65 %, top-1 of averaged weights 88 %" in text, text
