"""A start that an outage ends says so where launch files look."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError, MachineError, OutageError
from swinv2_train.config.exit_codes import EXIT_FAILED
from swinv2_train.monitoring.outage import outage_recorded
from swinv2_train.monitoring.signs import STATUS
from swinv2_train.runtime import RunDirLock
from swinv2_train.status import read_status, status_text
from tests.support.commands import OWN_SESSION, command, finish
from tests.support.processes import finished, forked, forked_command
from tests.support.shard_server import serve
from tests.unit.data.loading.test_loader import make_shards


def fail(run_dir: Path, error: Exception) -> None:
    """A start that ends with this error."""
    with RunDirLock(run_dir, wait_sec=0.2) as lock, pytest.raises(type(error)), outage_recorded(run_dir, lock):
        raise error


def test_a_server_that_is_away_before_the_first_step_is_an_outage(tmp_path):
    """The command itself: exit code 1, and status.json by which train.sbatch tells it from a crash."""
    make_shards(tmp_path / "served", 4)
    (tmp_path / "run").mkdir()  # train.sbatch keeps its code there
    with serve(tmp_path / "served") as server:
        for path in (tmp_path / "served").iterdir():
            server.faults[path.name] = ["always 503"]
        run = command(
            tmp_path / "run", f"data.shards={server.url}/t-000000.tar", f"data.cache_dir={tmp_path / 'cache'}",
            "data.fetch_give_up_sec=1", "data.eval_shards=null", "engine=local", "engine.precision=fp32",
        )  # fmt: skip
        code, output = finish(forked_command("swinv2_train.train", *run, **OWN_SESSION))
    assert code == EXIT_FAILED and "HTTP 503" in output, output
    status = read_status(tmp_path / "run")
    assert (status["state"], status["outage"], status["step"], status["world_size"]) == ("failed", True, 0, 1)
    assert '"outage": true' in (tmp_path / "run" / STATUS).read_text()
    text = status_text(status)
    assert text.startswith("failed ") and "by an outage, after which the same command goes on: " in text


def test_what_was_known_of_the_run_stays(tmp_path, monkeypatch):
    """A resume that fails knows nothing newer of the steps."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = {
        "host": "h", "pid": 1, "state": "stopped", "reason": "SIGTERM", "doing": "training", "doing_since": 1.0,
        "step": 20, "updated_at": 1.0, "total_steps": 40, "checkpoint_step": 20, "world_size": 1,
        "heartbeat_sec": 10.0, "started_at": 1.0,
    }  # fmt: skip
    (tmp_path / STATUS).write_text(json.dumps(before))
    fail(tmp_path, OutageError("2 ranks did not come"))
    status = read_status(tmp_path)
    assert (status["state"], status["reason"], status["outage"]) == ("failed", "2 ranks did not come", True)
    assert (status["step"], status["total_steps"], status["checkpoint_step"], status["world_size"]) == (20, 40, 20, 2)


@pytest.mark.parametrize("error", [ConfigError("wrong"), RuntimeError("a bug")])
def test_no_other_error_is_one(error, tmp_path):
    fail(tmp_path, error)
    assert not (tmp_path / STATUS).exists()


def test_rank_0_alone_writes_and_only_where_nobody_else_runs(tmp_path, monkeypatch):
    """Ranks that did not meet hold no lock; the status may be that of a run that lives."""
    fail(tmp_path / "gone", MachineError("away"))
    assert not (tmp_path / "gone").exists()
    monkeypatch.setenv("RANK", "1")
    fail(tmp_path, MachineError("away"))
    assert not (tmp_path / STATUS).exists()
    monkeypatch.setenv("RANK", "0")

    def hold() -> None:
        assert RunDirLock(tmp_path).acquire()
        print("held", flush=True)
        input()

    holder = forked(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    fail(tmp_path, MachineError("away"))
    assert not (tmp_path / STATUS).exists()
    assert finished(holder, "\n").returncode == 0
    fail(tmp_path, MachineError("away"))
    assert json.loads((tmp_path / STATUS).read_text())["reason"] == "away"
