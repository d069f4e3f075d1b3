"""One run in a directory, also where the kernel's locks do not reach: the other host's run is a file here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swinv2_train.runtime.run_dir_lock import LOCK_NAME, RunDirLock
from tests.support.processes import forked_code

ELSEWHERE = {"machine": "another kernel", "host": "node7", "pid": 4711, "token": "0"}


@contextmanager
def other_host(run_dir: Path, alive: bool) -> Iterator[None]:
    """A run of another host, which flock does not see here; alive: it touches its file."""
    path, stop = run_dir / LOCK_NAME, threading.Event()
    path.write_text(json.dumps(ELSEWHERE))

    def touch() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    if alive:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if alive:
            thread.join()


@pytest.mark.slow
def test_a_living_run_of_another_host_is_not_joined(tmp_path: Path) -> None:
    """flock of many network file systems excludes processes of one host alone; two runs would remove each other's."""
    with other_host(tmp_path, alive=True), RunDirLock(tmp_path, wait_sec=0.3) as lock:
        with pytest.raises(BlockingIOError, match=r"in use by a run on node7 \(process 4711\); end that first"):
            lock.acquire()
        assert json.loads((tmp_path / LOCK_NAME).read_text()) == ELSEWHERE
    with RunDirLock(tmp_path, wait_sec=0.2) as lock:
        assert lock.acquire(), "and the kernel's lock is free again"


def test_a_run_of_another_host_that_was_killed_gives_way(tmp_path: Path) -> None:
    with other_host(tmp_path, alive=False), RunDirLock(tmp_path, wait_sec=0.2) as lock:
        assert lock.acquire()
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00" * 10_000])
def test_a_torn_lock_file_is_nobodys(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with RunDirLock(tmp_path, wait_sec=0.2) as lock:
        assert lock.acquire()


@pytest.mark.timeout(20)
def test_what_is_no_lock_file_holds_nobody_up(tmp_path: Path) -> None:
    """A run directory may be a stranger's: a pipe is not waited for, and what a link leads to stays as it is."""
    (tmp_path / "theirs").write_text("theirs")
    before = os.stat(tmp_path / "theirs").st_mtime_ns
    for number, plant in enumerate((os.mkfifo, lambda path: os.symlink("../theirs", path))):
        (tmp_path / str(number)).mkdir()
        plant(tmp_path / str(number) / LOCK_NAME)
        with RunDirLock(tmp_path / str(number), wait_sec=0.2, beat_sec=0.05) as lock:
            assert lock.acquire()
            time.sleep(0.2)
    assert (tmp_path / "theirs").read_text() == "theirs" and os.stat(tmp_path / "theirs").st_mtime_ns == before


def test_a_run_that_was_taken_for_dead_ends_before_it_writes_more(tmp_path: Path) -> None:
    """A suspended host wakes up: another one has gone on with its run."""
    code = """
import sys, time
from pathlib import Path
from swinv2_train.runtime import RunDirLock
lock = RunDirLock(Path(sys.argv[1]), beat_sec=0.05)
lock.acquire()
print("locked", flush=True)
time.sleep(60)
"""
    process = forked_code(code, str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    before = (tmp_path / LOCK_NAME).stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK_NAME).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "no sign of life"
        time.sleep(0.01)
    (tmp_path / "new").write_text(json.dumps(ELSEWHERE))
    (tmp_path / "new").replace(tmp_path / LOCK_NAME)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1 and "was taken over by a run on node7 (process 4711)" in said, said
    assert json.loads((tmp_path / LOCK_NAME).read_text()) == ELSEWHERE


def test_a_directory_that_is_made_anew_meanwhile_is_locked_itself(tmp_path: Path) -> None:
    """The lock of a directory that was removed would keep nobody out of the one that has its name now."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    first, second = RunDirLock(run_dir), RunDirLock(run_dir, wait_sec=10)
    first.acquire()
    thread = threading.Thread(target=second.acquire)
    thread.start()
    time.sleep(0.2)
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    first.release()
    thread.join()
    with pytest.raises(BlockingIOError, match="in use by another run"):
        RunDirLock(run_dir, wait_sec=0).acquire()
    second.release()
