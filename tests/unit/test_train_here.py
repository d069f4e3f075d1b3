"""swinv2_train.train("KEY=VALUE", ...): a run inside a process that is somebody else's, and goes on."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import swinv2_train as s2
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config import ConfigError
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.engine.local import LocalEngine
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.training.trained import TrainedRun
from tests.support.harness import run_distributed, warm_up
from tests.support.processes import finished, forked_code, printed_by
from tests.support.small_run import SMALL, run_alone

LINES = ("log.progress=lines", "train.max_steps=3")


@pytest.fixture
def words(shards, tmp_path) -> Callable[..., list[str]]:
    """words(NAME, ...): of the small classifier's run in tmp_path/NAME."""
    start = ("experiment=cifar10_finetune", "task.init_from=null", "task.num_classes=4")

    def of(name: str, *more: str) -> list[str]:
        given = {word.partition("=")[0]: word for word in (*start, *SMALL, *shards, *LINES, *more)}
        return [f"run_dir={tmp_path / name}", *given.values()]

    return of


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint_weights(find_checkpoint(run_dir))


def same_run(one: Path, other: Path) -> bool:
    """Bit for bit: its weights, and what was measured of its steps."""
    measured = [
        [{name: value for name, value in line.items() if not name.startswith(("perf", "data", "mem", "checkpoint"))}
         for line in read_metrics(run)]
        for run in (one, other)
    ]  # fmt: skip
    found, expected = weights(one), weights(other)
    return measured[0] == measured[1] and all(torch.equal(found[name], each) for name, each in expected.items())


def state_of_the_process() -> dict[str, Any]:
    """What a run changes while it is at work."""
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGCHLD}},
        "environment": dict(os.environ), "arguments": sys.argv, "streams": (sys.stdout, sys.stderr),
        "hooks": (sys.excepthook, sys.breakpointhook), "python": random.getstate(),
        "numpy": str(np.random.get_state()), "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "deterministic": torch.get_deterministic_debug_mode(), "filters": list(warnings.filters),
        "descriptors": [os.fstat(number).st_ino for number in (1, 2)], "buffered": sys.__stdout__.line_buffering,
        "group": torch.distributed.is_initialized(), "timeout": torch.distributed.distributed_c10d.default_pg_timeout,
        "children": multiprocessing.active_children(), "at work": {each.name for each in threading.enumerate()},
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_here_equals_the_commands_whatever_the_process_has_done_before(words, settings, tmp_path):
    """Drawn numbers, other defaults, a stream without a descriptor, an event loop's file; afterwards all is as before,
    and a second run in the process, of an engine that holds process groups of its own, is as good.
    """
    zero = ("engine=zero1", "engine.precision=fp32")
    for name, more in (("command", ()), ("command_zero", zero)):
        assert run_alone(settings(*LINES, f"run_dir={tmp_path / name}", *more)) == EXIT_DONE

    def body() -> None:
        random.random(), np.random.rand(), torch.rand(3)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        signal.signal(signal.SIGINT, lambda number, frame: None)
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            before = state_of_the_process()
            first = s2.train(*words("here", "runtime.process_group_timeout_sec=99"))
            after = state_of_the_process()
            second = s2.train(*words("here_zero", *zero))
            again = s2.train(*words("here_zero", *zero))
        for found in (after, state_of_the_process() | {"streams": before["streams"]}):
            assert {name: (value, found[name]) for name, value in before.items() if value != found[name]} == {}
        assert signal.set_wakeup_fd(-1) == write
        assert first == TrainedRun(tmp_path / "here", 3, True, first.scores, None, None)
        assert set(first.scores) == {"val/loss", "val/top1", "val/top5"}
        assert (second.step, again) == (3, second)
        assert "step 3/3  loss" in said.getvalue() and "all 3 steps are done" in said.getvalue()
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        print(len(s2.load(first.run_dir).predict(np.zeros((16, 16, 3), np.uint8)).classes))

    assert printed_by(body).split()[-1] == "4"
    assert same_run(tmp_path / "here", tmp_path / "command")
    assert same_run(tmp_path / "here_zero", tmp_path / "command_zero")


@pytest.mark.slow
def test_ctrl_c_saves_and_is_a_keyboard_interrupt_then(words, tmp_path):
    """Not before: half a step is no run's state.  The rest of the program does not go on by itself."""

    def body() -> None:
        backward, calls = LocalEngine.backward, []

        def interrupting(engine: LocalEngine, loss: torch.Tensor) -> None:
            backward(engine, loss)
            calls.append(loss)
            if len(calls) == 4:  # of two a step
                os.kill(os.getpid(), signal.SIGINT)

        LocalEngine.backward = interrupting
        with pytest.raises(KeyboardInterrupt):
            s2.train(*words("stopped"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        print("saved", find_checkpoint(tmp_path / "stopped").name)
        s2.train(*words("stopped"))
        s2.train(*words("whole"))

    said = printed_by(body)
    assert "saved step_00000002" in said or "saved step_00000001" in said, said
    assert "stopped by SIGINT after step" in said
    assert same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_a_time_limit_returns_an_unfinished_run_and_the_best_checkpoint_is_named(words, tmp_path):
    def body() -> None:
        scored = words("run", "train.eval_every_steps=1", "train.keep_best=val/loss", "train.checkpoint_every_steps=1")
        stopped = s2.train(*scored, "runtime.stop_after_sec=0.001")
        assert (stopped.complete, stopped.step, stopped.scores) == (False, 0, {})
        run = s2.train(*scored)
        best = min(read_metrics(tmp_path / "run"), key=lambda line: line["val/loss"])
        assert (run.complete, run.best_score) == (True, best["val/loss"])
        assert run.best_checkpoint == tmp_path / "run" / "checkpoints" / f"step_{best['step']:08d}"
        s2.load(run.best_checkpoint)

    printed_by(body)


def test_wrong_input_is_a_config_error_and_leaves_nothing(words, tmp_path):
    def body() -> None:
        before = state_of_the_process()
        for wrong, message in (
            (["experiment=nope"], "there is no such experiment"),
            (["--help"], "'--help' is no 'KEY=VALUE'"),
            ([Path("run")], "is no 'KEY=VALUE'"),
            (["experiment"], "is no KEY=VALUE"),
            (["seed=1", "seed=2"], "seed is given twice"),
            (words("run", "data.shards=nowhere"), "data.shards names 'nowhere'"),
        ):
            with pytest.raises(ConfigError, match=message):
                s2.train(*wrong)
        assert state_of_the_process() == before
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        with pytest.raises(ConfigError, match="destroy_process_group"):
            s2.train(*words("run"))

    printed_by(body)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_fails_raises_what_it_failed_of_and_lets_go_of_its_workers(words):
    """A notebook keeps the last error, and with it, if nobody minds, the model and the processes that read images."""

    def body() -> None:
        step = LocalEngine.step
        LocalEngine.step = lambda engine, lr: 1 / 0
        before = state_of_the_process()
        try:
            s2.train(*words("run", "data.num_workers=1"))
        except ZeroDivisionError as error:
            kept = error
        assert state_of_the_process() == before, kept
        assert "LocalEngine.step" in "".join(traceback.format_exception(kept))
        LocalEngine.step = step
        assert s2.train(*words("run", "data.num_workers=1")).complete

    assert "rank 0 failed: ZeroDivisionError: division by zero (traceback in" in printed_by(body, subprocess.STDOUT)


@pytest.mark.slow
def test_another_thread_trains_and_a_second_one_has_to_wait(words):
    def body() -> None:
        began, go_on, step = threading.Event(), threading.Event(), LocalEngine.step

        def slow(engine: LocalEngine, lr: float) -> float:
            began.set()
            assert go_on.wait(60)
            return step(engine, lr)

        LocalEngine.step = slow
        found: list[TrainedRun] = []
        thread = threading.Thread(target=lambda: found.append(s2.train(*words("run"))))
        thread.start()
        assert began.wait(60)
        with pytest.raises(ConfigError, match="in another thread"):
            s2.train(*words("other"))
        go_on.set()
        thread.join()
        assert found[0].complete

    printed_by(body)


@pytest.mark.slow
def test_every_rank_of_a_script_is_told_the_same_of_one_run_after_the_other(words):
    """As under torchrun: rank 0 alone has written what they are told of, and a second run meets where the first did."""
    scored = words(
        "run", "engine=zero2", "engine.precision=fp32", "train.eval_every_steps=1", "train.keep_best=val/loss"
    )
    more = [word.replace("train.max_steps=3", "train.max_steps=4") for word in scored]
    first, second = run_distributed(lambda world: [s2.train(*scored), s2.train(*more)], 2, init=False)
    assert first == second and [run.step for run in first] == [3, 4] and first[1].best_score is not None


@pytest.mark.parametrize(
    "order",
    [
        "import swinv2_train as s2; s2.train",
        "import swinv2_train.train; import swinv2_train as s2",
        "from swinv2_train import train; import swinv2_train as s2; assert train is s2.train",
        "from swinv2_train.train import main; import swinv2_train as s2",
        "import swinv2_train as s2; s2.load; import swinv2_train.train",
        "from swinv2_train import *; assert callable(train); import swinv2_train as s2",
    ],
)
def test_the_commands_module_and_the_function_are_one_name_in_every_order_of_imports(order):
    names = ["swinv2_train", "swinv2_train.train", "swinv2_train.inference"]
    anew = f"import sys\nfor name in {names}: sys.modules.pop(name, 0)"
    use = """
from swinv2_train.config import ConfigError
try: s2.train('experiment=nope')
except ConfigError as error: print(error)
import swinv2_train.train as module
assert module.main and module.train and s2.train is module and s2.__version__
"""
    warm_up()
    code = "\n".join((anew, *order.split("; "), use))
    done = finished(forked_code(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    assert done.returncode == 0 and "there is no such experiment" in done.stdout, done.stdout
