"""The C++ attention kernel is compiled once a host, with a word before, and a stop ends it."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.distributed import World, on_main
from swinv2_train.distributed.interruptible import StopOfAnyRank
from swinv2_train.models.kernels import cpu_attention
from swinv2_train.runtime import StopNow, StopRequest
from swinv2_train.training.attention_paths import compile_kernel
from tests.support.commands import OWN_SESSION, command
from tests.support.harness import run_distributed, warm_up
from tests.support.processes import forked
from tests.support.shard_files import ten_class_shards

NOTE = "note: compiling the attention kernel for this processor, once: 10 s to some minutes"


def begin_anew(folder: Path) -> None:
    """In a fork: as on a machine where nothing is compiled, whose compiler takes a minute."""
    compiler = folder / "c++"
    compiler.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 1; exit;; esac\necho $$ >> {folder}/calls\nsleep 61.04 & wait\n"
    )
    compiler.chmod(0o755)
    os.environ.update(CXX=str(compiler), XDG_CACHE_HOME=str(folder / "cache"))
    cpu_attention._load.cache_clear()
    cpu_attention.fingerprint.cache_clear()


def gone(group: int) -> bool:
    """Whether no process of a group lives."""
    for _ in range(50):
        alive = [p for p in Path("/proc").glob("[0-9]*/stat") if group_of(p) == (group, True)]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def group_of(path: Path) -> tuple[int, bool]:
    try:
        state, _, group = path.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return 0, False
    return int(group), state != "Z"


def test_a_stop_of_another_rank_ends_the_compiler_of_the_first(tmp_path):
    """The compiler's own children too, which would compute on for minutes."""

    def ask(world: World) -> tuple[str, list[str], str]:
        begin_anew(tmp_path)
        said: list[str] = []
        with StopRequest() as stop, StopOfAnyRank(stop) as stops:
            stops.listen()
            if world.rank == 1:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            try:
                compile_kernel(world, said.append, stop)
            except StopNow as stopped:
                return str(stopped), said, on_main(world, lambda: "still together")
        return "went on", said, ""

    found = run_distributed(ask, 2)
    assert found == [("SIGTERM", [NOTE] if rank == 0 else [], "still together") for rank in range(2)]
    (group,) = map(int, (tmp_path / "calls").read_text().split())  # one rank compiles for all
    assert gone(group)


@pytest.mark.parametrize("busy", [False, True])
def test_a_stop_that_comes_while_the_compiler_starts_ends_it(busy, tmp_path):
    """Whoever was about to name the process was interrupted, and a compiler went on for nobody.

    busy: a machine on which a thread is far before the one that has started it goes on.
    """
    start = threading.Thread.start

    class StoppedAtItsStart(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if "process_group" in options:  # the compiler at work, not its --version
                while not (tmp_path / "calls").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)

    def starts_late(thread: threading.Thread) -> None:
        start(thread)
        time.sleep(0.5)

    def ask(world: World) -> str:
        begin_anew(tmp_path)
        subprocess.Popen = StoppedAtItsStart  # type: ignore[misc]
        if busy:
            threading.Thread.start = starts_late  # type: ignore[method-assign]
        with StopRequest() as stop:
            try:
                compile_kernel(world, lambda _: None, stop)
            except StopNow as stopped:
                return str(stopped)
        return "went on"

    assert run_distributed(ask, 1) == ["SIGTERM"]
    assert gone(int((tmp_path / "calls").read_text()))


def test_what_is_compiled_already_is_loaded_without_a_word():
    if cpu_attention.problem() is not None:
        pytest.skip("there is no compiled kernel here")
    assert not cpu_attention.will_compile()
    compile_kernel(World(0, 0, 1, 1, torch.device("cpu")), pytest.fail)


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_compiles_says_so_and_ends(tmp_path):
    """With the exit code of a run that was stopped before it had a checkpoint, and a status that says stopped."""
    ten_class_shards(tmp_path / "shards")
    arguments = command(
        tmp_path / "run", f"data.shards='{tmp_path}/shards/train-{{000000..000002}}.tar'", "data.eval_shards=null",
        "engine=local", "engine.precision=fp32", "data.num_workers=0", "model.attention=fused",
    )  # fmt: skip
    warm_up()
    main = importlib.import_module("swinv2_train.train").main

    def body() -> None:
        begin_anew(tmp_path)
        sys.argv = ["swinv2_train.train", *arguments]
        main()

    process = forked(body, **OWN_SESSION)
    while not (tmp_path / "calls").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM != EXIT_DONE, output
    assert NOTE in output and "SIGTERM: stopping the start" in output
    assert "stopped by SIGTERM before the first step; the same command begins again" in output
    assert '"state": "stopped"' in (tmp_path / "run" / "status.json").read_text()
    assert gone(int((tmp_path / "calls").read_text()))
