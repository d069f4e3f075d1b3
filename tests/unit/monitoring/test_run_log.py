"""What a run writes down: metrics.jsonl and its resume, pictures, the wandb run file, the console and its log."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from swinv2_train.config import LogConfig
from swinv2_train.config.shown import NOTES
from swinv2_train.monitoring.console import Progress, counted, duration_text, open_console, ticking, tracked
from swinv2_train.monitoring.run_log import RunLog, read_metrics
from swinv2_train.runtime import git_commit
from tests.support.processes import finished, forked_code

PRELUDE = """
import os, sys, time, warnings, logging
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from swinv2_train.config import LogConfig
from swinv2_train.monitoring.console import open_console
from swinv2_train.monitoring.run_log import RunLog
run_dir = Path(sys.argv[1])
def log_config(wandb="disabled", progress="none"):
    return LogConfig(
        wandb=wandb, wandb_project="test", wandb_name=None, wandb_artifacts=[], tensorboard=False, progress=progress
    )
"""


class QuietConsole:
    """The part of a console that RunLog uses, kept in memory."""

    is_terminal = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def make_log(run_dir: Path, wandb: str = "disabled", is_main: bool = True, progress: str = "none", run_config=None):
    config = LogConfig(
        wandb=wandb,
        wandb_project="swinv2-test",
        wandb_name=None,
        wandb_artifacts=[],
        tensorboard=False,
        progress=progress,
    )
    return RunLog(run_dir, config, QuietConsole(), is_main, run_config)  # type: ignore[arg-type]


def run_script(body: str, run_dir: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run PRELUDE and body in a fork; more: variables of its environment."""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return finished(forked_code(PRELUDE + body, str(run_dir), environment=more, **pipes))


# --- metrics.jsonl


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_named_once(tmp_path):
    """The system does not say which file was too large, and closing must not raise over what was said."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = make_log(tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        log.metrics(1, 64, {"train/loss": 1.0})
    log.close(1)


def test_every_line_is_strict_json_with_step_and_images_seen(tmp_path: Path) -> None:
    """Other people's tools read the file; NaN is no JSON."""
    log = make_log(tmp_path)
    log.metrics(1, 64, {"train/loss": 2.5, "train/grad_norm": float("nan"), "perf/mfu": None, "train/lr": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()  # flushed before close

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "step": 1, "images_seen": 64, "train/loss": 2.5, "train/grad_norm": None, "perf/mfu": None, "train/lr": None,
    }  # fmt: skip
    log.close()


def test_lines_of_one_step_are_merged_and_the_later_value_wins(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.metrics(2, 128, {"train/loss": 1.0})
    log.metrics(1, 64, {"train/loss": 3.0})
    log.metrics(2, 128, {"val/top1": 50.0, "train/loss": 0.5})
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "images_seen": 64, "train/loss": 3.0},
        {"step": 2, "images_seen": 128, "train/loss": 0.5, "val/top1": 50.0},
    ]


def test_resume_drops_the_steps_that_run_again_and_a_torn_last_line(tmp_path: Path) -> None:
    """A killed run may leave half a line and steps after its last checkpoint."""
    log = make_log(tmp_path)
    for step in range(1, 6):
        log.metrics(step, step * 64, {"train/loss": float(step)})
    log.metrics(3, 192, {"val/loss": 9.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "images_se')
    log = make_log(tmp_path)
    log.resume_at(3)
    log.metrics(4, 256, {"train/loss": 44.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4]
    assert read_metrics(tmp_path)[-1] == {"step": 4, "images_seen": 256, "train/loss": 44.0}
    assert read_metrics(tmp_path)[-2]["val/loss"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file stays


def test_a_line_after_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    """Appending to half a line would spoil both."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "images_seen": 64}\n{"step": 2, "ima')
    log = make_log(tmp_path)
    log.metrics(3, 192, {"train/loss": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = make_log(tmp_path / "run", wandb="offline", is_main=False, progress="lines")
    log.resume_at(0)
    log.metrics(1, 64, {"train/loss": 1.0})
    assert log.picture("reconstruction", 1, np.zeros((8, 8, 3), np.uint8)) is None
    log.progress(1, 2, 1.0, 10.0)
    log.say("hello")
    log.close()
    assert not (tmp_path / "run").exists()
    assert log.console.lines == []  # type: ignore[attr-defined]


def test_picture_is_a_png_of_the_very_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    log = make_log(tmp_path)
    path = log.picture("reconstruction", 40, pixels)
    log.close()
    assert path == tmp_path / "pictures" / "reconstruction_00000040.png"
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert len(list((tmp_path / "pictures").iterdir())) == 1


# --- wandb


def read_wandb_records(path: Path) -> Iterator:
    """Records of a .wandb file: a LevelDB log (32 KiB blocks of crc32, length, type) of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            position += left
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_history(path: Path) -> list[dict]:
    rows = []
    for record in read_wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_offline_wandb_run_holds_history_config_and_picture_and_a_resume_keeps_its_id(tmp_path: Path) -> None:
    """Read back from the written files, for that is what `wandb sync` will send."""
    body = """
log = RunLog(run_dir, log_config("offline"), open_console(run_dir, 0), True, {"seed": 7, "optim": {"lr": 0.5}})
for step in range(1, 4):
    log.metrics(step, step * 64, {"train/loss": 1.0 / step, "train/grad_norm": float("nan")})
picture = log.picture("reconstruction", 3, np.full((8, 8, 3), 200, np.uint8))
log.artifact("pictures", [picture]); log.artifact("weights", [])
log.close()
"""
    for _ in range(2):
        done = run_script(body, tmp_path)
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == ("", "")  # no word of wandb on the console
        time.sleep(1.1)  # wandb names its folders by the second
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    for path in files:
        assert path.name == f"run-{run_id}.wandb"
        rows = wandb_history(path)
        losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        assert losses == {1: 1.0, 2: 0.5, 3: 1 / 3}
        assert all("train/grad_norm" not in row for row in rows)
        run = next(r.run for r in read_wandb_records(path) if r.WhichOneof("record_type") == "run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (config["seed"], config["optim"], config["git"]) == (7, {"lr": 0.5}, git_commit())
        assert (run.project, run.run_id, run.display_name) == ("test", run_id, tmp_path.name)
        records = list(read_wandb_records(path))
        artifacts = [record.artifact for record in records if record.HasField("artifact")]
        assert [(each.name, each.type) for each in artifacts] == [(f"{run_id}-pictures", "pictures")]
        files = [(entry.path, entry.local_path) for entry in artifacts[0].manifest.contents]
        assert files == [("reconstruction_00000003.png", str(tmp_path / "pictures" / "reconstruction_00000003.png"))]
        assert any(record.HasField("stats") for record in records)  # of the system: CPU, memory, GPUs
        images = list((path.parent / "files" / "media" / "images").rglob("*.png"))
        assert len(images) == 1
        assert np.asarray(Image.open(images[0]).convert("RGB"))[0, 0].tolist() == [200, 200, 200]


def test_disabled_wandb_writes_nothing_and_is_not_imported(tmp_path: Path) -> None:
    body = """
log = RunLog(run_dir, log_config("disabled"), open_console(run_dir, 0), True, {})
log.metrics(1, 64, {"train/loss": 1.0})
log.close()
assert "wandb" not in sys.modules
"""
    command = [sys.executable, "-c", PRELUDE + body, str(tmp_path)]  # a new interpreter: this one has imported wandb
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "wandb").exists()


@pytest.mark.timeout(60)
def test_a_failing_wandb_warns_once_and_the_run_goes_on(tmp_path: Path) -> None:
    """wandb is a mirror; here its folder is a file, so it cannot write."""
    (tmp_path / "wandb").write_text("in the way")
    log = make_log(tmp_path, wandb="offline")
    for step in range(1, 4):
        log.metrics(step, step, {"train/loss": 1.0})
    log.close()
    assert len(read_metrics(tmp_path)) == 3
    warnings = log.console.lines  # type: ignore[attr-defined]
    assert len(warnings) == 1 and warnings[0].startswith("warning: wandb stopped (FileExistsError")


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_without_a_server_an_online_run_writes_offline_files_and_the_run_goes_on(tmp_path: Path) -> None:
    """A node without network: said once, and nothing is lost."""
    body = """
import swinv2_train.monitoring.wandb_sink
swinv2_train.monitoring.wandb_sink._INIT_SEC = 2.0
log = RunLog(run_dir, log_config("online"), open_console(run_dir, 0), True, {})
for step in range(1, 4):
    start = time.perf_counter()
    log.metrics(step, step, {"train/loss": 1.0 / step})
    assert time.perf_counter() - start < 1.5
log.close()
"""
    closed_port = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    done = run_script(body, tmp_path, **closed_port)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: wandb is not online ("), lines
    assert lines[0].endswith(f"it writes offline files: wandb sync {tmp_path / 'wandb'}/offline-run-*")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert [row["train/loss"] for row in wandb_history(file)] == [1.0, 0.5, 1 / 3]
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_wandb_service_that_dies_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    body = """
import signal
log = RunLog(run_dir, log_config("offline"), open_console(run_dir, 0), True, {})
log.metrics(1, 1, {"train/loss": 1.0})
while not list((run_dir / "wandb").glob("offline-run-*/*.wandb")):
    time.sleep(0.05)
children = {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}
assert children
for pid in children:
    os.kill(int(pid), signal.SIGKILL)
time.sleep(0.5)
for step in range(2, 200):
    log.metrics(step, step, {"train/loss": 1.0})
    time.sleep(0.005)
log.close()
log.console.say("end")
"""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel does not list children in /proc")
    done = run_script(body, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read_metrics(tmp_path)) == 199
    warnings = done.stdout.splitlines()
    assert len(warnings) == 2 and warnings[0].startswith("warning: wandb stopped (") and warnings[1] == "end", warnings


@pytest.mark.slow
def test_metrics_do_not_wait_for_wandb(tmp_path: Path) -> None:
    """Its start takes a second or more, which the first steps must not pay."""
    body = """
log = RunLog(run_dir, log_config("offline"), open_console(run_dir, 0), True, {})
start = time.perf_counter()
log.metrics(1, 64, {"train/loss": 1.0})
took = time.perf_counter() - start
assert took < 0.5, took  # import and init alone take 1 s
log.close()
assert "wandb.sdk.wandb_run" in sys.modules
"""
    done = run_script(body, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(60)
def test_a_killed_run_leaves_no_wandb_service_behind(tmp_path: Path) -> None:
    body = """
import signal, subprocess
log = RunLog(run_dir, log_config("offline"), open_console(run_dir, 0), True, {})
log.metrics(1, 64, {"train/loss": 1.0})
while not list((run_dir / "wandb").glob("offline-run-*/*.wandb")):
    time.sleep(0.05)
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
threads = [Path(p).read_text().split() for p in map(str, Path("/proc/self/task").glob("*/children"))]
(run_dir / "children").write_text(" ".join(sorted({pid for pids in threads for pid in pids})))
os.kill(os.getpid(), signal.SIGKILL)
"""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel does not list children in /proc")
    done = run_script(body, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert children, "wandb's service was not seen"
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    """Alive, and not a zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- console


def test_only_our_lines_reach_the_console_and_everything_else_the_log(tmp_path: Path) -> None:
    """DeepSpeed, torch and child processes print as they like; a person reads our lines."""
    body = """
console = open_console(run_dir, 0)
print("library to stdout"); warnings.warn("library warning"); logging.warning("library log")
os.system("echo child process; echo child error >&2")
console.say("our line")
console.close()
print("back again")
"""
    done = run_script(body, tmp_path)
    assert (done.stdout, done.stderr) == ("our line\nback again\n", "")
    text = (tmp_path / "logs" / "rank_00000.log").read_text()
    for expected in ("library to stdout", "library warning", "library log", "child process", "child error"):
        assert expected in text
    assert "back again" not in text


def test_other_ranks_are_silent_but_say_in_one_line_that_they_failed(tmp_path: Path) -> None:
    body = """
console = open_console(run_dir, 3)
console.say("not to be seen")
raise RuntimeError("the disk is full\\nsecond line")
"""
    done = run_script(body, tmp_path)
    log_path = tmp_path / "logs" / "rank_00003.log"
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"rank 3 failed: RuntimeError: the disk is full (traceback in {log_path})\n"
    assert "Traceback (most recent call last)" in log_path.read_text()
    assert "raise RuntimeError" in log_path.read_text() or "the disk is full\nsecond line" in log_path.read_text()


def test_a_second_start_appends_to_the_log(tmp_path: Path) -> None:
    for word in ("first", "second"):
        assert run_script(f"open_console(run_dir, 0); print('{word}')", tmp_path).returncode == 0
    text = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert text.index("first") < text.index("second")
    assert text.count(" rank 0 pid ") == 2


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path) -> None:
    """`train | head -1`, or a lost ssh session behind tee."""
    body = """
console = open_console(run_dir, 0)
for number in range(200):
    console.say("line %d" % number); time.sleep(0.005)
(run_dir / "finished").write_text("yes")
"""
    process = forked_code(PRELUDE + body, str(tmp_path), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    process.wait(timeout=240)
    assert (tmp_path / "finished").exists()
    assert "console lost" in (tmp_path / "logs" / "rank_00000.log").read_text()


def test_console_is_restored_inside_a_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hooks = sys.excepthook, sys.breakpointhook
    with open_console(tmp_path, 0) as console:
        assert sys.excepthook != hooks[0]
        os.write(1, b"to the log\n")
        console.say("to the console")
    os.write(1, b"after\n")
    assert (sys.excepthook, sys.breakpointhook) == hooks
    out = capfd.readouterr().out
    assert "to the console\n" in out and "after\n" in out and "to the log" not in out


def test_what_was_noted_of_images_reaches_console_and_log(tmp_path: Path) -> None:
    """It stood in the log alone: that pixels of no data count as measured, that animated files have one frame used."""
    body = """
console = open_console(run_dir, 0)
logging.getLogger(NOTES).warning("some files hold several frames")
console.close()
logging.getLogger(NOTES).warning("later")
"""
    done = run_script(f"NOTES = {NOTES!r}\n{body}", tmp_path)
    assert (done.stdout, done.stderr) == ("note: some files hold several frames\n", "later\n")
    assert "note: some files hold several frames\n" in (tmp_path / "logs" / "rank_00000.log").read_text()


def test_a_breakpoint_talks_to_the_terminal(tmp_path: Path) -> None:
    """Under `engine=local` a debugger must not vanish in the log."""
    body = "console = open_console(run_dir, 0)\nanswer = 42\nbreakpoint()\nconsole.say('went on')"
    command = [sys.executable, "-c", PRELUDE + body, str(tmp_path)]
    done = subprocess.run(command, check=False, input="p answer\nc\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "(Pdb) 42\n" in done.stdout and done.stdout.endswith("went on\n")


def test_usr2_writes_the_stacks_to_the_log(tmp_path: Path) -> None:
    """How a rank that hangs is asked where it hangs, without any tool (docs/debugging.md)."""
    body = """
import signal
open_console(run_dir, 0)
def a_place_to_find(): os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.1)
a_place_to_find()
"""
    assert run_script(body, tmp_path).returncode == 0
    assert "a_place_to_find" in (tmp_path / "logs" / "rank_00000.log").read_text()


# --- progress


def test_progress_lines_without_a_terminal_hold_step_loss_speed_and_time_left(tmp_path: Path) -> None:
    body = """
log = RunLog(run_dir, log_config(progress="auto"), open_console(run_dir, 0), True)
log.progress(1, 100, 2.5, 812.3)
for step in range(2, 101):
    time.sleep(0.002)
    log.progress(step, 100, 1.25 if step == 90 else None)
log.progress(100, 100)
log.close()
"""
    done = run_script(body, tmp_path)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines == ["step 1/100  loss 2.5000  812 images/s", "step 100/100  812 images/s  0:00 left"]


def test_a_long_step_shows_its_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 16 micro-batches that takes two hours was silent for two hours."""
    said: list[str] = []
    progress = Progress("lines", SimpleNamespace(say=said.append))
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + next(clock))
    for number in range(1, 4):
        progress.within(0, 30, number, 16, 450.0 * number)
    assert said[0] == "step 0/30  micro-batch 1/16  450 s each, 2:00:00 a step  2 days 11 h left"
    assert len(said) == 2 and "micro-batch 3/16" in said[1]  # not more often than every few seconds
    progress.within(0, 30, 1, 16, 0.1)
    assert len(said) == 2, "short steps have their own lines"


def test_a_long_pass_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    assert list(counted(range(5), 5, "evaluating: batch", said.append)) == list(range(5))
    assert said == ["evaluating: batch 1 of 5, 0:24 left", "evaluating: batch 3 of 5, 0:08 left"]


@pytest.mark.parametrize(("mode", "shown"), [("bar", "counting"), ("auto", ""), ("none", "")])
def test_a_command_without_a_console_has_a_bar_where_it_is_watched(mode: str, shown: str, capsys) -> None:
    """pytest's stderr is no terminal, so auto means lines, of which a short pass has none."""
    assert list(tracked(range(3), 3, "counting", "part", mode, print)) == [0, 1, 2]
    told = capsys.readouterr()
    assert told.out == "" and (shown in told.err and "3/3" in told.err if shown else told.err == "")


def test_work_of_unknown_length_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    tick = ticking("probing: batch", said.append)
    for _ in range(4):
        tick()
    assert said == ["probing: batch 2", "probing: batch 4"]


def test_progress_bar_on_a_terminal_and_lines_above_it(tmp_path: Path) -> None:
    """In a real pseudo terminal; a line must not run into the bar."""
    pty = pytest.importorskip("pty")
    body = """
log = RunLog(run_dir, log_config(progress="auto"), open_console(run_dir, 0), True)
for step in range(11, 21):
    log.progress(step, 20, 0.5, 100.0); time.sleep(0.05)
    if step == 15: log.say("a line")
log.close()
"""
    master, slave = pty.openpty()
    process = forked_code(PRELUDE + body, str(tmp_path), stdout=slave, stderr=slave)
    os.close(slave)
    chunks: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    assert process.wait(timeout=240) == 0
    reader.join(timeout=10)
    os.close(master)
    text = b"".join(chunks).decode()
    assert "20/20  loss 0.5000  100 images/s  0:00 left" in text
    assert "\ra line\r\n" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (245.4, "4:05"), (3723, "1:02:03"), (3 * 86400 + 4 * 3600, "3 days 4 h")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
