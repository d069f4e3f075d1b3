"""Shared by all tests: one thread, the CPU alone but for tests/gpu, and the harness of real ranks."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

gc.disable()  # until all tests are collected: a fifth of the time of their imports went into a search for garbage
# Before torch is imported: forked ranks must not inherit a pool of OpenMP threads that exists in the parent only.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.support.started import STARTED, end_since  # noqa: E402

torch.set_num_threads(1)
# Autograd looks for devices once, at the first backward pass, and forks of a process where it found some cannot compute
# gradients.  An export of a graph leaves one behind that is none (seen with torch 2.14): let it look before.
torch.ones(1, requires_grad=True).sum().backward()
_set_num_threads, _HERE = torch.set_num_threads, os.getpid()


def _of_forks_alone(threads: int) -> None:
    """A fork takes its parent's pool of OpenMP threads for its own: it waits for them for ever, or crashes."""
    assert threads == 1 or os.getpid() != _HERE, "tests that need threads run in a fork (support.processes.printed_by)"
    _set_num_threads(threads)


torch.set_num_threads = _of_forks_alone
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    from tests.support.bf16_products import by_float32

    by_float32()

LONGEST = (
    "distributed/test_detect.py", "distributed/test_giant.py", "distributed/test_preemption.py",
    "distributed/test_recompute.py", "gpu/test_fused.py", "unit/engine/test_compile.py",
    "unit/planning/test_engine_memory.py", "unit/planning/test_plan.py", "unit/scripts/test_first_contact.py",
    "unit/serving/test_files.py", "unit/test_golden.py", "unit/test_pasted_commands.py",
)  # fmt: skip
"""Files that take more than a minute of a worker."""


def pytest_configure(config: pytest.Config) -> None:
    """Cards are for a call of tests/gpu alone (make test-gpu); any other call, and every process it starts, sees none:
    its ranks are more than a machine has cards.
    """
    of_gpu = Path(__file__).parent / "gpu"
    places = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    if all(place.is_relative_to(of_gpu) for place in places) and torch.cuda.is_available():
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whomever


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mostly waits goes first, then the longest files, and files with slow tests before those without: make test
    hands files out in this order, and what takes long would be left alone at the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    longest = {(Path(__file__).parent / name).resolve(strict=True) for name in LONGEST}
    items.sort(
        key=lambda item: (
            item.get_closest_marker("slurm") is None, item.path not in longest, item.path not in slow
        )
    )  # fmt: skip


def pytest_collection_finish() -> None:
    """What the imports have left stays: Python's collector need not look at it again, in any test."""
    gc.collect()
    gc.freeze()
    gc.get_freeze_count = _counted_once(gc.get_freeze_count)
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


def _counted_once(count: Callable[[], int]) -> Callable[[], int]:
    """To count is a walk through a million objects, and every run asks."""
    found = count()
    return functools.wraps(count)(lambda: found)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the fuzz suite has tried, at the end, whichever worker process tried it."""
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, text in getattr(report, "user_properties", ()):
            if name == "tried" and report.when == "call":
                terminalreporter.section("fuzzed")
                terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    first = len(STARTED)
    yield
    end_since(first)


@pytest.fixture
def run_distributed():
    """harness.run_distributed, for tests outside of tests/distributed."""
    from tests.support import harness

    return harness.run_distributed


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The path of a Python that starts without imports, for what starts its interpreters by a path."""
    from tests.support.warm_python import warm_python

    folder = tmp_path_factory.mktemp("python") / "warm"
    server = warm_python(folder)
    yield str(folder / "python")
    server.kill()
    server.wait()


@pytest.fixture
def settings(shards, tmp_path):
    """settings(*overrides): a small classifier's configuration in tmp_path/run, on the test's shards."""

    from tests.support.configs import composed
    from tests.support.small_run import SMALL

    def compose(*overrides: str, task: str = "finetune"):
        init = ("task.init_from=null", "task.num_classes=4") if task == "finetune" else ()
        run = (f"experiment=cifar10_{task}", f"run_dir={tmp_path / 'run'}")
        return composed([*run, *SMALL, *shards, *init, *overrides])

    return compose
