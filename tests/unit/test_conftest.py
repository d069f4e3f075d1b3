"""What the tests do with the cards of a machine, and their order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import conftest

ROOT = Path(__file__).parents[2]
ORDER = ["engine", "fuzz slow", "fuzz", "launch slow slurm", "launch slurm", "weights", "weights slow", "workers"]


@pytest.mark.parametrize(
    ("arguments", "card", "hidden"),
    [
        (["tests/gpu"], True, False),
        (["tests/gpu/test_fused.py::test_x[1]", "tests/gpu/test_step.py"], True, False),
        (["tests/gpu"], False, True),
        (["tests"], True, True),
        (["tests/unit", "tests/gpu"], True, True),
    ],
)
def test_only_a_call_of_the_gpu_tests_alone_sees_cards(arguments, card, hidden, monkeypatch):
    """Two ranks on a machine of one card would be refused, and on two cards they would be other tests: NCCL's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "as it was")
    config = SimpleNamespace(args=arguments, invocation_params=SimpleNamespace(dir=ROOT))
    conftest.pytest_configure(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "as it was")


def test_what_waits_or_takes_long_goes_first_by_files_and_nothing_else_moves():
    """Left to the end, tests/slurm would be minutes in which a machine has nothing else to do."""
    marked = [
        SimpleNamespace(name=name, path=name.split()[0], get_closest_marker={mark: mark for mark in name.split()}.get)
        for name in ORDER
    ]
    conftest.pytest_collection_modifyitems(marked)
    first = ["launch slow slurm", "launch slurm", "fuzz slow", "fuzz", "weights", "weights slow"]
    assert [item.name for item in marked] == [*first, "engine", "workers"]


CHILD = """
import multiprocessing

def test_a_child():
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(exec, ("import tests.support",))
"""


@pytest.mark.slow
def test_a_new_interpreter_of_a_test_finds_the_tests_own_modules_when_pytest_is_called_by_its_name(tmp_path):
    """`pytest` does not put the checkout on the path, as `python -m pytest` does, and a child inherits the path."""
    (tmp_path / "test_child.py").write_text(CHILD)
    own = ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", *own, "--noconftest", str(tmp_path / "test_child.py")],
        cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
