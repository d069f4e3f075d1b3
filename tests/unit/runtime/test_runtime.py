"""Seeds, threads, stop signals and the record of a start."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_train.config import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR
from swinv2_train.runtime import (
    STOP_SIGNALS,
    RunDirLock,
    StopRequest,
    available_cores,
    environment,
    environment_record,
    keep_random_state,
    read_environment,
    record_environment,
    seed_everything,
    set_threads,
)
from swinv2_train.storage.atomic import replace_text
from tests.support.processes import finished, forked_code, printed_by


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_one_seed_and_rank_give_one_stream_in_python_numpy_and_torch() -> None:
    seed_everything(3, 1)
    first = draw()
    seed_everything(3, 1)
    assert draw() == first


@pytest.mark.parametrize(("seed", "rank"), [(3, 0), (4, 1), (1, 3)])
def test_another_seed_or_rank_gives_another_stream(seed: int, rank: int) -> None:
    """Ranks that share a stream would drop the same paths; (seed, rank) must not be their sum or product either."""
    seed_everything(3, 1)
    first = draw()
    seed_everything(seed, rank)
    assert all(a != b for a, b in zip(first, draw(), strict=True))


def test_threads_are_the_rank_s_cores_unless_given() -> None:
    cores = available_cores()
    assert 1 <= cores <= (os.cpu_count() or 1)

    def body() -> None:
        print(set_threads(None, cores), torch.get_num_threads(), set_threads(2, 64), torch.get_num_threads())

    assert printed_by(body).split() == [str(cores), str(cores), "2", "2"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stop_signal_only_sets_a_flag_also_the_second_time(name: str) -> None:
    """A second Ctrl-C during a save must not tear the checkpoint."""
    before = signal.getsignal(signal.Signals[name])
    with StopRequest() as stop:
        assert stop.requested is None
        for _ in range(2):
            os.kill(os.getpid(), signal.Signals[name])
            assert stop.requested == name
    try:
        os.kill(os.getpid(), signal.Signals[name])  # an impatient one on the way out
    finally:
        stop.uninstall()
    assert signal.getsignal(signal.Signals[name]) is before


def test_a_signal_is_heard_while_the_main_thread_computes() -> None:
    """A handler of Python's waits for the end of a backward pass, which may take minutes."""
    code = """
import hashlib, os, signal, threading
from swinv2_train.runtime import StopRequest
with StopRequest() as stop:
    stop.told = lambda name, again: print(name, again, flush=True)
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    threading.Timer(0.15, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    hashlib.pbkdf2_hmac("sha256", b"x" * 50, b"y", 3_000_000)  # without Python's lock, as torch computes
    print("computed", stop.requested, flush=True)
"""
    done = finished(forked_code(code, stdout=subprocess.PIPE))
    assert done.returncode == 0 and done.stdout.startswith("SIGTERM False\nSIGINT True\ncomputed SIG"), done.stdout


@pytest.mark.parametrize(("saved", "code"), [(True, 3), (False, 128 + signal.SIGTERM)])
def test_a_wait_whose_result_a_stop_drops_ends_at_once(saved: bool, code: int) -> None:
    """Listing a slow disk may take long; exit code 3 is for a run that has a checkpoint."""
    body = f"""
import os, signal, time
from swinv2_train.runtime import StopNow, StopRequest
with StopRequest() as stop:
    try:
        with stop.interrupting():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
    except StopNow as stopped:
        print("stopped by", stopped, flush=True)
        code = stopped.exit_code({saved})
os._exit(code)
"""
    done = finished(forked_code(body, stdout=subprocess.PIPE))
    assert done.returncode == code and done.stdout == "stopped by SIGTERM\n"


def test_random_states_are_put_back() -> None:
    put_back = keep_random_state(torch.device("cpu"))
    first = draw()
    put_back()
    assert draw() == first


def test_handlers_are_put_back_when_nobody_asked_to_stop() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_process_that_is_asked_to_stop_ends_in_its_own_way() -> None:
    """A real process and a real signal from outside."""
    code = """
import sys, time
from swinv2_train.config import EXIT_STOPPED
from swinv2_train.runtime import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while stop.requested is None: time.sleep(0.01)
    print("saved after", stop.requested, flush=True)
sys.exit(EXIT_STOPPED)
"""
    process = forked_code(code, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    assert (out, process.returncode) == ("saved after SIGTERM\n", 3)


def test_a_run_directory_holds_one_run_and_is_free_when_that_ends_however(tmp_path: Path) -> None:
    """A killed launcher may leave ranks that go on writing; two runs in a directory would remove each other's files."""
    code = """
import sys, time
from pathlib import Path
from swinv2_train.runtime import RunDirLock
lock = RunDirLock(Path(sys.argv[1]))
lock.acquire()
print("locked", flush=True)
time.sleep(60)
"""
    process = forked_code(code, str(tmp_path), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with RunDirLock(tmp_path, wait_sec=0.2) as lock:
        with pytest.raises(BlockingIOError, match="is in use by another run; end that first"):
            lock.acquire()
        process.kill()
        process.wait()
        assert lock.acquire()
        assert not lock.acquire()  # a second time is no harm
    assert list(tmp_path.iterdir()) == []
    nowhere = RunDirLock(tmp_path / "nowhere")
    nowhere.acquire()
    assert not (tmp_path / "nowhere").exists()


def test_exit_codes_are_the_contract() -> None:
    codes = (EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED)
    assert codes == (0, 1, 2, 3)


def test_environment_json_is_a_list_with_one_record_for_each_start(tmp_path: Path) -> None:
    record_environment(tmp_path / "run", world_size=2)
    record_environment(tmp_path / "run", world_size=4)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["world_size"] for start in starts] == [2, 4]
    assert torch.__version__.startswith(starts[0]["versions"]["torch"])  # a wheel may leave the build out: 2.14.1+cu130
    assert starts[0]["argv"] == sys.argv and starts[0]["cpu_cores"] >= 1 and starts[0]["memory_gib"] > 0
    assert starts == read_environment(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["environment.json"]


def test_a_damaged_environment_file_is_kept_aside_and_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('[{"torn')
    assert read_environment(tmp_path) == []
    record_environment(tmp_path, world_size=1)
    assert len(read_environment(tmp_path)) == 1
    assert (tmp_path / "environment.json.damaged").read_text() == '[{"torn'


@pytest.mark.slow
def test_versions_are_looked_up_without_importing_the_packages() -> None:
    """Importing deepspeed or wandb for its version would cost seconds of every start."""
    code = """
import sys
from swinv2_train.runtime import environment_record
versions = environment_record(1)["versions"]
assert versions["deepspeed"] and versions["wandb"], versions
assert not {"deepspeed", "wandb", "webdataset", "fairscale"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_record_names_the_commit_of_the_code_not_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(other), *command], check=True)
    commit = subprocess.run(
        ["git", "-C", str(other), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    monkeypatch.chdir(other)
    git = environment_record(1)["git"]
    assert git is None or git["commit"] != commit
    # and for code that is tracked, the commit and whether it was changed
    (other / "tracked.py").write_text("tracked")
    subprocess.run(["git", "-C", str(other), "add", "tracked.py"], check=True)
    subprocess.run(["git", "-C", str(other), *identity, "commit", "-q", "-m", "y"], check=True)
    monkeypatch.setattr(environment, "__file__", str(other / "tracked.py"))
    clean = environment.git_commit()
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (other / "tracked.py").write_text("changed")
    assert environment.git_commit() == {"commit": clean["commit"], "dirty": True}


def test_replace_text_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"
