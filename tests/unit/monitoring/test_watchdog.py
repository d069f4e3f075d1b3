"""Signs of life and the watchdog: real processes that hang, stop and end.  Ranks: tests/distributed/test_hang.py."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.monitoring.activity import RankActivity
from swinv2_train.monitoring.console import open_console
from swinv2_train.monitoring.signs import STATUS, diagnose_hang, rank_file, read_ranks, silent_ranks
from swinv2_train.monitoring.watchdog import Heartbeat, timeout_warning
from tests.support.configs import composed, make_config
from tests.support.processes import forked_code

pytestmark = pytest.mark.slow

PRELUDE = """
import ctypes, os, sys, time
from pathlib import Path
from tests.support.configs import make_config
from swinv2_train.monitoring.console import open_console
from swinv2_train.monitoring.activity import FIRST_STEP, TRAINING, RankActivity
from swinv2_train.monitoring.watchdog import Heartbeat
run_dir, timeout = Path(sys.argv[1]), float(sys.argv[2])
config = make_config(runtime={"hang_timeout_sec": timeout, "process_group_timeout_sec": 3 * timeout}).runtime
console, activity = open_console(run_dir, 0), RankActivity()
came = [0]
heartbeat = Heartbeat(activity, run_dir, 0, 1, config, console, lambda: came[0] and f"fetching {came[0]}").start()
"""


def start(run_dir: Path, body: str, timeout_sec: float = 1.0) -> subprocess.Popen[str]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return forked_code(PRELUDE + body, str(run_dir), str(timeout_sec), **pipes)


def status_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / STATUS).read_text())


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.timeout(60)
def test_a_main_thread_that_hangs_ends_with_its_stacks_and_exit_code_1(tmp_path):
    """In a call into C that gives Python's lock away, as a collective does."""
    body = """
def a_place_to_find(): ctypes.CDLL(None).sleep(600)
activity.step_done(7)
a_place_to_find()
"""
    process = start(tmp_path, body)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "rank 0 failed: HangError: nothing has moved for" in error and "after step 7" in error
    stacks = (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "a_place_to_find" in stacks and "training, step 7" in stacks
    status = status_of(tmp_path)
    assert status["state"] == "failed" and "a_place_to_find" in status["reason"] and status["step"] == 7


@pytest.mark.timeout(60)
def test_a_call_that_never_gives_pythons_lock_back_ends_too(tmp_path):
    """No Python thread runs any more; the stacks are in the log."""
    body = """
def a_place_to_find(): ctypes.PyDLL(None).sleep(600)  # PyDLL: keeps the lock
activity.step_done(7)
time.sleep(0.5)
a_place_to_find()
"""
    process = start(tmp_path, body)
    process.communicate(timeout=240)
    assert process.returncode == 1
    assert "a_place_to_find" in (tmp_path / "logs" / "rank_00000.log").read_text()


@pytest.mark.timeout(60)
def test_what_may_take_long_is_not_taken_for_a_hang(tmp_path):
    """A start has no limit; a first step and a checkpoint have that of the process group; and each move counts."""
    body = """
time.sleep(2)  # starting
activity.enter(FIRST_STEP)
time.sleep(0.9)
activity.step_done(1)
with activity.doing("saving"):
    time.sleep(0.9)
for _ in range(8):
    time.sleep(0.1)
    activity.mark_progress()
heartbeat.close(0)
console.say("done")
"""
    process = start(tmp_path, body, timeout_sec=0.6)
    output, error = process.communicate(timeout=240)
    assert (process.returncode, output) == (0, "done\n"), error
    assert status_of(tmp_path)["state"] == "done" and not (tmp_path / "stacks").exists()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_time_in_which_the_process_was_stopped_or_debugged_does_not_count(tmp_path):
    """Ctrl-Z and fg; a scheduler that suspends; a person at a breakpoint."""
    body = """
activity.step_done(1)
(run_dir / "stop me").touch()
os.read(0, 1)
activity.mark_progress()
(run_dir / "went on").touch()
breakpoint()
heartbeat.close(0)
"""
    process = start(tmp_path, body, timeout_sec=2.0)
    assert process.stdin is not None
    wait_for(tmp_path / "stop me", process)
    time.sleep(0.6)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.25)  # the watchdog has looked, and nothing has moved yet
    process.stdin.write("x")
    process.stdin.flush()
    wait_for(tmp_path / "went on", process)
    time.sleep(3.75)
    _, error = process.communicate("c\n", timeout=30)
    assert process.returncode == 0 and not (tmp_path / "stacks").exists(), error


@pytest.mark.timeout(60)
def test_a_disk_that_takes_no_signs_of_life_does_not_end_the_run(tmp_path):
    body = """
import shutil
shutil.rmtree(run_dir / "health"); (run_dir / "health").write_text("in the way")
(run_dir / "status.json").unlink(missing_ok=True); (run_dir / "status.json").mkdir()
activity.publish(loss=1.0)
time.sleep(0.5)
heartbeat.close(0)
"""
    process = start(tmp_path, body)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert "no sign of life could be written" in (tmp_path / "logs" / "rank_00000.log").read_text()


def sign(rank: int, moves: int = 9, place: str = "gloo.py:1 wait", age_sec: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "rank": rank, "host": "elsewhere", "pid": 100 + rank, "doing": "training", "doing_since": 900.0, "moves": moves,
        "place": place, "updated_at": 1000.0 - age_sec, "state": "running", "reason": None, "step": 0,
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        (
            [sign(0), sign(1), sign(2, age_sec=80)],
            "rank 2 (pid 102 on elsewhere) has given no sign of life for 80 s; then it was training",
        ),
        ([sign(0), sign(2)], "rank 1 gave no sign of life at all"),
        (
            [sign(0), sign(1, moves=8, doing="waiting for data"), sign(2)],
            "rank 1 (pid 101 on elsewhere) is behind: waiting for data for 100 s, in gloo.py:1 wait",
        ),
        (
            [sign(0), sign(1), sign(2, place="io.py:5 read")],
            "rank 2 (pid 102 on elsewhere) is behind: training for 100 s, in io.py:5 read",
        ),
        (
            [sign(0), sign(1), sign(2)],
            "rank 0 (pid 100 on elsewhere) is training for 100 s, in gloo.py:1 wait",
        ),
        (
            [sign(0, place="a"), sign(1, place="b"), sign(2, place="b"), sign(3, place="a")],
            "rank 0 (pid 100 on elsewhere) is training for 100 s, in a; "
            "rank 1 (pid 101 on elsewhere) is training for 100 s, in b",
        ),
    ],
)
def test_the_rank_that_is_waited_for_is_named(signs, expected):
    """Silent ones before those that have done less, before those that are elsewhere; else where all are."""
    world_size = max(each["rank"] for each in signs) + 1
    assert diagnose_hang({each["rank"]: each for each in signs}, world_size, now=1000.0, silent_sec=50.0) == expected


def test_silence_is_counted_from_the_last_sign():
    signs = {0: sign(0), 1: sign(1, age_sec=10)}
    assert silent_ranks(signs, 3, 1000.0, 9.0) == [1, 2] and silent_ranks(signs, 2, 1000.0, 11.0) == []


def test_pulse_knows_what_is_done_and_how_long_the_rest_takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    activity = RankActivity()
    assert activity.seconds_left(100) is None
    for step in range(1, 4):
        now[0] += 2.0
        activity.step_done(step)
    assert activity.seconds_left(10) == 14.0 and activity.step == 3
    progress = activity.progress_count
    with activity.doing("evaluating"):
        assert activity.current == "evaluating"
        with pytest.raises(ZeroDivisionError), activity.doing("saving"):
            _ = 1 / 0
        assert activity.current == "evaluating"
    assert activity.current == "training" and activity.progress_count > progress
    activity.step_done(1)  # back to a checkpoint
    assert activity.seconds_left(10) is None


def test_a_torn_sign_of_life_is_left_out(tmp_path):
    (tmp_path / "health").mkdir()
    (tmp_path / "health" / "rank_00000.json").write_text(json.dumps(sign(0)))
    (tmp_path / "health" / "rank_00001.json").write_text('{"rank": 1, "ho')
    assert list(read_ranks(tmp_path)) == [0]


def test_a_sign_of_life_is_whole_at_every_moment(tmp_path):
    """A rank that is stopped while it writes (SIGSTOP, a host that freezes) is the one whose sign is asked for."""
    (tmp_path / "health").mkdir()
    heartbeat = Heartbeat(RankActivity(), tmp_path, 1, 2, make_config().runtime, open_console(tmp_path, 1))
    heartbeat._write("running", None)
    writer = threading.Thread(target=lambda: [heartbeat._write("running", None) for _ in range(300)])
    writer.start()
    while writer.is_alive():
        assert json.loads(rank_file(tmp_path, 1).read_text())["rank"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime.hang_timeout_sec=0"], r"runtime.hang_timeout_sec \(0.0\) must be at least 1"),
        (
            ["runtime.hang_timeout_sec=600", "data.shards='https://host/train-{00..11}.tar'"],
            r"hang_timeout_sec \(600\) must be more than data.fetch_give_up_sec \(600\), .* lower the other",
        ),
    ],
)
def test_a_limit_that_would_end_a_healthy_run_is_refused(overrides, message):
    """A shard at an address may take its time, and local ones need no such room."""
    with pytest.raises(ConfigError, match=message):
        composed(["run_dir=r", "data.shards=s.tar", *overrides])
    composed(["run_dir=r", "data.shards=s.tar", "runtime.hang_timeout_sec=600"])
    composed(["run_dir=r", "data.shards='s3://b/s.tar'", "runtime.hang_timeout_sec=null"])


WAITING = """
activity.step_done(1)
activity.enter("waiting for data")
deadline = time.monotonic() + 2.5
while time.monotonic() < deadline:
    time.sleep(0.05)
    came[0] += MOVES
os._exit(0)
"""


@pytest.mark.parametrize(("moves", "code"), [("1", 0), ("0", 1)])
def test_a_download_that_moves_is_no_hang_and_one_that_stands_still_is(moves, code, tmp_path):
    """A large shard on a slow line takes longer than runtime.hang_timeout_sec; main only waits for it meanwhile."""
    process = start(tmp_path, WAITING.replace("MOVES", moves), timeout_sec=0.8)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == code, out
    assert ("waiting for data: fetching " in out) == (moves == "1"), out


@pytest.mark.parametrize(("doing", "code"), [("waiting for data", 0), ("training", 1)])
def test_a_rank_waits_for_another_whose_download_moves(doing, code, tmp_path):
    """It sees the other's moves in its signs of life, as long as that one says that it waits for data."""
    body = WAITING.replace("waiting for data", "training").replace(
        "came[0] += MOVES",
        "other['moves'] += 1; (run_dir / 'health' / 'rank_00001.json').write_text(json.dumps(other))",
    )
    sign = {
        "rank": 1, "moves": 0, "doing": doing, "doing_since": 0.0, "updated_at": time.time() + 100, "step": 1,
        "host": "other", "pid": 1, "state": "running", "reason": None, "place": None,
    }  # fmt: skip
    other = f"import json\nother = {sign!r}\n"
    process = start(tmp_path, other + body, timeout_sec=0.8)
    out, error = process.communicate(timeout=240)
    assert process.returncode == code, (out, error)


@pytest.mark.parametrize(
    ("hang_sec", "group_sec", "ranks", "warns"),
    [(900, 1800, 8, False), (900, 900, 8, True), (900, 600, 8, True), (900, 600, 1, False), (None, 600, 8, False)],
)
def test_a_process_group_that_gives_up_before_a_hang_is_named_is_a_warning(hang_sec, group_sec, ranks, warns):
    """NCCL aborts the process then, with a trace of C++ alone."""
    runtime = {"hang_timeout_sec": hang_sec, "process_group_timeout_sec": group_sec}
    said = timeout_warning(make_config(runtime=runtime).runtime, ranks)
    assert (said is not None) is warns
    assert said is None or f"runtime.process_group_timeout_sec ({group_sec})" in said
