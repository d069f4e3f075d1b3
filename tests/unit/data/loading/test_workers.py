"""Worker processes that fail, die or wait: the training process hears of it at once, and nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_train.config import MachineError
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_FAILED, EXIT_STOPPED
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.data.loading.pipe_loader import StreamLoader
from swinv2_train.data.loading.workers import WorkerError, with_workers, worker_death
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.folder import FolderReader
from swinv2_train.data.sources.huggingface import SavedDatasetReader
from swinv2_train.data.sources.pipe import open_stream
from tests.support.commands import OWN_SESSION, command
from tests.support.images import image_bytes
from tests.support.processes import finished, forked, forked_command
from tests.support.shard_files import write_plain_tar
from tests.support.shard_server import serve
from tests.unit.data.loading.test_loader import CONFIG, Transform, make_shards, train_loader


class Broken(Transform):
    """Fails as no worker may: its error's class cannot be found by who would unpickle it."""

    def __call__(self, *arguments: Any) -> Any:
        class Odd(Exception):
            lock = property(lambda self: self)

        if os.getpid() != MAIN:
            raise Odd("something odd")
        return super().__call__(*arguments)


MAIN = os.getpid()
ONE = replace(CONFIG, num_workers=1)
FILES = {"folder": FolderReader, "saved": SavedDatasetReader}


def files_of(kind: str, folder: Path) -> Path:
    """16 images as a class folder, or as a data set saved by `datasets`."""
    if kind == "folder":
        for number in range(16):
            path = folder / "train" / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(number, size=(32, 32)))
    else:
        from datasets import ClassLabel, Dataset, Features, Image

        images = [{"bytes": image_bytes(number, size=(32, 32)), "path": None} for number in range(16)]
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
        columns = {"image": images, "label": [number % 3 for number in range(16)]}
        Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "train"))
    return folder / "train"


@pytest.mark.parametrize("kind", ["train", "eval", "pipe", "folder", "saved"])
def test_an_error_that_cannot_be_pickled_is_heard_at_once(tmp_path, kind):
    """Of every loader; the worker's thread would drop it, and the training process wait for ever."""
    loader: Any
    if kind in FILES:
        loader = train_loader(open_source(str(files_of(kind, tmp_path))), ONE, transform=Broken())
    elif kind == "train":
        loader = train_loader(make_shards(tmp_path, 20), ONE, transform=Broken())
    elif kind == "eval":
        loader = EvalLoader(make_shards(tmp_path, 20), ONE, Broken(), 2, 0, 1)
    else:
        stream = open_stream(f"pipe:cat {make_shards(tmp_path, 20).paths[0]}")
        loader = StreamLoader(stream, ONE, Broken(), 0, 2, 2, 0, 1, 0)
    started = time.monotonic()
    with pytest.raises(WorkerError, match="^a data worker failed: Odd: something odd") as caught:
        next(iter(loader))
    assert time.monotonic() - started < 60 and "in __call__" in str(caught.value)
    loader.close()


def test_workers_end_though_one_took_their_lock_along(tmp_path):
    """A run hung at its end: whoever is killed while it asks whether to go on keeps the lock of that question."""
    loader = train_loader(make_shards(tmp_path, 40), ONE)
    next(iter(loader))
    iterator = loader._workers._running["loader"]._iterator
    pid = os.fork()
    if pid == 0:
        iterator._workers_done_event._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not iterator._workers_done_event._cond.acquire(False)
    (worker,) = iterator._workers
    ended = threading.Thread(target=loader.close, daemon=True)
    ended.start()
    ended.join(20)
    assert not ended.is_alive() and not worker.is_alive()


def test_what_the_tests_own_processes_inherit_closes_nothing_of_theirs():
    """The likely cause of a worker that hung: an older loader's queue, dropped in it, closed its pipe."""
    inherited: list[Any] = [multiprocessing.Pipe(duplex=False) for _ in range(8)]

    def body() -> None:
        pipes = [os.pipe() for _ in range(64)]  # among them the numbers of what was inherited, if those are free
        inherited.clear()
        for receiver, sender in pipes:
            os.write(sender, b"still open")
            assert os.read(receiver, 10) == b"still open"

    assert finished(forked(body)).returncode == 0


def test_a_worker_that_is_killed_is_told_with_the_likely_cause(tmp_path):
    """The kernel kills who takes too much memory, and says so to nobody."""
    loader = train_loader(make_shards(tmp_path, 40), ONE)
    stream = iter(loader)
    next(stream)
    (worker,) = loader._workers._running["loader"]._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises((WorkerError, RuntimeError)) as caught:
        for _ in range(1000):
            next(stream)
            time.sleep(0.01)
    told = caught.value if isinstance(caught.value, WorkerError) else worker_death(caught.value)
    assert re.match(
        rf"a data worker \(pid {worker.pid}\) (is killed by signal: Killed|exited unexpectedly); ", str(told)
    )
    assert "the machine ran out of memory (see dmesg): lower data.num_workers" in str(told)
    loader.close()


def test_what_torch_says_of_a_dead_worker_is_understood():
    bus = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's")
    assert "shared memory /dev/shm has" in str(worker_death(bus)) and "--shm-size" in str(worker_death(bus))
    two = RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly")
    assert "(pid 1, 2) exited unexpectedly" in str(worker_death(two))
    assert worker_death(RuntimeError("CUDA out of memory")) is None


def test_a_fault_of_the_machine_is_one_message_and_exit_code_1(capsys):
    def command() -> int:
        raise MachineError("a data worker died")

    assert guarded(command) == EXIT_FAILED and capsys.readouterr().err == "error: a data worker died\n"


def small_shared_memory() -> None:
    """This process alone gets a /dev/shm of 64 kB; os._exit(77) where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, new_mounts = 1 << 18 | 1 << 14, 0x00020000
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
        os._exit(77)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        os._exit(77)


@pytest.mark.parametrize("full", [False, True])
def test_batches_of_a_pipe_need_no_room_in_dev_shm(tmp_path, full):
    """A container has 64 MB of it.  Where it is full no worker can be started, and the message says what to do."""
    rows = [(f"{number}.png", image_bytes(number, size=(64, 64))) for number in range(8)]
    path = write_plain_tar(tmp_path / "t.tar", rows)

    def body() -> None:
        small_shared_memory()
        if full:
            with contextlib.suppress(OSError), open("/dev/shm/filled", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        loader = StreamLoader(open_stream(f"pipe:cat {path}"), ONE, Large(needs_label=False), 0, 4, 4, 0, 1, 0)
        kept = [batch["image"].shape for batch in itertools.islice(loader, 12)]
        assert kept == [(4, 3, 256, 256)] * 12
        loader.close()
        print("fine")

    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    done = finished(forked(lambda: os._exit(guarded(lambda: body() or 0)), **pipes))
    if done.returncode == 77:
        pytest.skip("mount namespaces are not allowed here")
    if full:
        assert done.returncode == EXIT_FAILED, done.stderr
        assert "data.num_workers: no data worker can be started" in done.stderr and "--shm-size=8g" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


class Large(Transform):
    """Batches that are larger than the shared memory."""

    def __call__(self, image: torch.Tensor, targets: Any, rng: Any) -> dict[str, Any]:
        return {"image": torch.zeros(3, 256, 256, dtype=torch.uint8)}


def gone(marker: str) -> bool:
    """Whether no process has this in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                return False
    return True


def wait_until(what: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_is_heard_while_a_pipe_is_waited_for(tmp_path, workers):
    """A command that waits for its store for ever; the run ends with a checkpoint, and the command with it."""
    flag = tmp_path / "flag"
    pipe = f"data.shards='pipe:touch {flag}; sleep 98765{workers}'"
    run = command(
        tmp_path / "run", pipe, f"data.num_workers={workers}", "engine=local", "engine.precision=fp32",
        "data.eval_shards=null", "optim.schedule.warmup_steps=2",
    )  # fmt: skip
    process = forked_command("swinv2_train.train", *run, **OWN_SESSION)
    wait_until(flag.exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == EXIT_STOPPED and "stopped by SIGTERM after step 0" in output, output
    wait_until(lambda: gone(f"98765{workers}"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("answers", [False, True])
def test_a_run_on_files_hears_its_workers_errors_and_a_stop(tmp_path, monkeypatch, kind, answers):
    """A file system that does not answer any more, or a reader that fails: with one line and its exit code."""
    flag = tmp_path / "flag"

    def read(self: Any, *place: int) -> Any:
        flag.touch()
        if not answers:
            time.sleep(600)
        raise RuntimeError("something odd")

    monkeypatch.setattr(FILES[kind], "read", read)
    run = command(
        tmp_path / "run", f"data.shards={files_of(kind, tmp_path)}", "data.num_workers=1", "engine=local",
        "engine.precision=fp32", "data.eval_shards=null", "optim.schedule.warmup_steps=2",
    )  # fmt: skip
    process = forked_command("swinv2_train.train", *run, **OWN_SESSION)
    wait_until(flag.exists)
    if not answers:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    if answers:
        assert process.returncode == EXIT_FAILED, output
        assert "rank 0 failed: WorkerError: a data worker failed: RuntimeError: something odd" in output
    else:
        assert process.returncode == EXIT_STOPPED and "stopped by SIGTERM after step 0" in output, output


def test_a_worker_that_waits_ends_with_a_training_process_that_is_killed(tmp_path):
    """And so does its command: nobody would ever read what it prints."""
    flag = tmp_path / "flag"

    def body() -> None:
        stream = open_stream(f"pipe:touch {flag}; sleep 987659")
        next(iter(StreamLoader(stream, ONE, Transform(needs_label=False), 0, 2, 2, 0, 1, 0)))

    process = forked(body, **OWN_SESSION)
    wait_until(flag.exists)
    process.kill()
    process.communicate()
    wait_until(lambda: gone("sleep 987659"))


@pytest.mark.parametrize("manifest", [True, False])
def test_a_stop_is_heard_while_a_server_is_waited_for(tmp_path, manifest):
    """At the start too, where up to data.fetch_give_up_sec may pass."""
    make_shards(tmp_path / "served", 20)
    (tmp_path / "served" / "manifest.json").unlink(missing_ok=True)
    names = [path.name for path in sorted((tmp_path / "served").glob("*.tar"))]
    with serve(tmp_path / "served") as server:
        for name in ["manifest.json"] if manifest else names:
            server.faults[name] = ["always 503"]
        if manifest:
            (tmp_path / "served" / "manifest.json").write_text("{}")
        run = command(
            tmp_path / "run", f"data.shards={server.url}/{names[0]}", f"data.cache_dir={tmp_path / 'cache'}",
            "data.fetch_give_up_sec=600", "data.eval_shards=null", "engine=local", "engine.precision=fp32",
        )  # fmt: skip
        process = forked_command("swinv2_train.train", *run, **OWN_SESSION)
        wait_until(lambda: server.gets["manifest.json" if manifest else names[0]] > 1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 128 + signal.SIGTERM, output  # there is no checkpoint
        assert "stopped by SIGTERM before the first step" in output


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (5, 4), (9, 8), (64, 8)])
def test_a_rank_has_a_worker_for_each_of_its_cores_but_one(cores, expected):
    """And a number that is given stays, 0 too."""
    assert with_workers(replace(CONFIG, num_workers=None), cores).num_workers == expected
    assert with_workers(replace(CONFIG, num_workers=0), cores).num_workers == 0
