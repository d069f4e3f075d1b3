"""The rooms of DESIGN.md: imports go down the floors, and a third-party package stays in its room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swinv2_train

PACKAGE = Path(swinv2_train.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "config": 0, "gate": 0, "slurm": 0, "distributed": 0, "lazy": 0,
    "models": 1, "metrics": 1, "runtime": 1, "records": 1, "console": 1, "log": 1, "pictures": 1, "charts": 1,
    "agreement": 2, "profiling": 1, "garbage": 1, "feed": 2,
    "health": 1, "stragglers": 1,
    "data": 2,
    "tasks": 3, "probe": 3, "optim": 3, "schedule": 3, "ema": 3,
    "engine": 4,
    "checkpoint": 5, "weights": 5, "report": 5, "planning": 5,
    "loop": 6,
    "command_line": 7, "train": 7, "evaluate": 7, "plan": 7, "export": 7, "status": 7,
}  # fmt: skip
ENTRY_POINTS = {"command_line", "train", "evaluate", "plan", "export"}
CONFINED = {
    "deepspeed": {"engine"},
    "fairscale": {"engine"},
    "webdataset": {"data"},
    "pyarrow": {"data"},
    "wandb": {"log"},
    "tqdm": {"console"},
    "hydra": ENTRY_POINTS,
    "triton": {"models"},
}
KERNELS = {"models/fused_kernels.py"}  # Triton's language; the file can be imported without it


def room_of(path: Path) -> str:
    """models/swin_v2.py -> models; log.py -> log; __init__.py -> ''"""
    return "" if path == PACKAGE / "__init__.py" else path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names of everything a file imports, also inside functions; a relative import is made absolute."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_stands_on_a_floor() -> None:
    """A new room needs a line in FLOORS, or nothing would check it."""
    assert {room_of(path) for path in FILES} - {""} <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_downward(path: Path) -> None:
    """Rooms on one floor may know each other, but not models: it is torch alone."""
    room = room_of(path)
    floor = FLOORS.get(room, 0)
    for module, line in imports_of(path):
        parts = module.split(".")
        if parts[0] == "swinv2_train" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS[parts[1]] <= floor, f"{name(path)}:{line} (floor {floor}) imports {module} of a higher floor"
            if room == "models":
                assert parts[1] == "models", (
                    f"{name(path)}:{line} imports {module}; models/ knows torch and itself only"
                )


@pytest.mark.parametrize("path", FILES, ids=name)
def test_third_party_packages_stay_in_their_rooms(path: Path) -> None:
    for module, line in imports_of(path):
        top = module.split(".")[0]
        assert room_of(path) in CONFINED.get(top, {room_of(path)}), f"{name(path)}:{line} imports {top}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "models"], ids=name)
def test_models_import_torch_alone(path: Path) -> None:
    """So that a model works in a notebook."""
    allowed = {"torch", "swinv2_train", "__future__"} | set(sys.stdlib_module_names)
    if name(path) in KERNELS:
        allowed |= {"triton"}
    foreign = {module.split(".")[0] for module, _ in imports_of(path)} - allowed
    assert not foreign, f"{name(path)} imports {sorted(foreign)}"


def test_data_does_not_know_torch_distributed() -> None:
    """The order of images is a function of plain numbers."""
    for path in FILES:
        if room_of(path) == "data":
            assert not [
                m for m, _ in imports_of(path) if m.startswith(("torch.distributed", "swinv2_train.distributed"))
            ]


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Top-level imports only: what a function imports is loaded when it is called."""
    graph: dict[str, set[str]] = {}
    modules = {
        ".".join((PACKAGE.name, *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__") for p in FILES
    }
    for path in FILES:
        own = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        targets: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        graph[own] = {target for target in targets & modules if target != own}

    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_importing_every_module_does_nothing_visible() -> None:
    """No print, no change of the environment, no thread, no accelerator, and none of the slow packages."""
    modules = [
        ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in FILES
        if path.name != "__main__.py"
    ]
    code = f"""
import os, sys, threading
import torch
before, threads = dict(os.environ), threading.active_count()
for module in {modules!r}: __import__(module)
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert threading.active_count() == threads
assert not torch.cuda.is_initialized()
slow = {{"deepspeed", "wandb", "webdataset", "pyarrow", "matplotlib", "torch._dynamo", "torch._inductor"}}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_the_lines_that_people_grep_for_are_absent() -> None:
    """House style: no utils.py, no bare except, no stub, no machine path."""
    for path in FILES:
        assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, name(path)
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
                f"{name(path)}:{node.lineno} bare except"
            )
            if isinstance(node, ast.Raise) and node.exc is not None:
                assert "NotImplementedError" not in ast.dump(node.exc), f"{name(path)}:{node.lineno} a stub"
