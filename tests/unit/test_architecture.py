"""The layers of docs/architecture.md: imports go downward, and a third-party package stays in one package of ours."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

import swinv2_train
from swinv2_train.config import TASKS

PACKAGE = Path(swinv2_train.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "config": 0, "models": 0,
    "storage": 1,
    "runtime": 2,
    "distributed": 3, "data": 3,
    "monitoring": 4,
    "report": 5,
    "tasks": 6, "engine": 6,
    "evaluation": 7, "checkpoint": 7, "inspection": 7,
    "weights": 8,
    "training": 9,
    "planning": 10, "inference": 10, "serving": 10,
    "train": 11, "evaluate": 11, "plan": 11, "export": 11, "status": 11, "make_shards": 11,
    "doctor": 11, "stats": 11, "predict": 11, "embed": 11, "look": 11, "replay": 11,
}  # fmt: skip
"""A package imports packages of lower layers alone; the commands are the top layer, and nobody imports them."""
COMMANDS = {
    "train", "evaluate", "plan", "export", "status", "make_shards", "doctor", "stats", "predict", "embed", "look",
    "replay",
}  # fmt: skip
CONFINED = {
    "deepspeed": {"engine"},
    "fairscale": {"engine"},
    "webdataset": {"data"},
    "pyarrow": {"data"},
    "av": {"data"},
    "wandb": {"monitoring"},
    "tqdm": {"monitoring"},
    "huggingface_hub": {"weights"},
    "hydra": {"config"},
    "triton": {"models"},
    "onnx": {"serving"},
    "onnxruntime": {"serving"},
    "onnxscript": {"serving"},
}
KERNELS = {"models/kernels/triton_attention.py"}  # Triton's language; the file can be imported without it


def package_of(path: Path) -> str:
    """models/swin_v2.py -> models; train.py -> train; __init__.py -> ''"""
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


def test_a_loose_file_is_a_command_and_every_package_has_a_layer() -> None:
    """A new package needs a line in LAYERS, or nothing would check it."""
    assert {package_of(path) for path in FILES} - {""} == LAYERS.keys()
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS | {"__init__"}


def test_every_package_says_what_it_is_for() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            assert len((ast.get_docstring(ast.parse(path.read_text())) or "").split()) >= 5, name(path)


def test_scripts_and_benchmarks_import_what_there_is() -> None:
    """They lie outside of what is type-checked, and a benchmark runs once in a while alone."""
    for path in sorted((*PACKAGE.parent.glob("scripts/*.py"), *PACKAGE.parent.glob("benchmarks/*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert found, f"{path.name}:{node.lineno}: {node.module} has no {alias.name}"


def test_setup_cfg_packs_every_package() -> None:
    """Its list is written by hand, because conf/ lies beside the package."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    folders = {".".join((PACKAGE.name, *path.parent.relative_to(PACKAGE).parts)) for path in FILES}
    assert set(setup["options"]["packages"].split()) == folders | {"swinv2_train.conf"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_downward(path: Path) -> None:
    """Packages of one layer do not know each other, and no command is imported."""
    package = package_of(path)
    for module, line in imports_of(path):
        parts = module.split(".")
        if parts[0] == "swinv2_train" and len(parts) > 1 and parts[1] in LAYERS and parts[1] != package:
            assert LAYERS[parts[1]] < LAYERS[package], (
                f"{name(path)}:{line} (layer {LAYERS[package]}) imports {module} of layer {LAYERS[parts[1]]}"
            )


def test_one_place_counts_the_cores() -> None:
    """Others would count those of the machine where a process may use some, and start too many threads."""
    asking = [path for path in FILES if "cpu_count" in path.read_text()]
    assert [name(path) for path in asking] == ["runtime/seeds_and_threads.py"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_third_party_packages_stay_where_they_belong(path: Path) -> None:
    for module, line in imports_of(path):
        top = module.split(".")[0]
        assert package_of(path) in CONFINED.get(top, {package_of(path)}), f"{name(path)}:{line} imports {top}"


@pytest.mark.parametrize("path", [path for path in FILES if package_of(path) == "models"], ids=name)
def test_models_import_torch_alone(path: Path) -> None:
    """So that a model works in a notebook."""
    allowed = {"torch", "swinv2_train", "__future__"} | set(sys.stdlib_module_names)
    if name(path) in KERNELS:
        allowed |= {"triton"}
    if "detection" in path.parts:
        allowed |= {"torchvision"}  # its operators on boxes
    foreign = {module.split(".")[0] for module, _ in imports_of(path)} - allowed
    assert not foreign, f"{name(path)} imports {sorted(foreign)}"


def test_engines_know_no_model() -> None:
    """They are handed a module and the classes of its blocks, so that an engine trains any model."""
    for path in FILES:
        if package_of(path) == "engine":
            known = [f"{m} (line {line})" for m, line in imports_of(path) if m.startswith("swinv2_train.models")]
            assert not known, f"{name(path)} imports {', '.join(known)}"


def test_data_does_not_know_torch_distributed() -> None:
    """The order of images is a function of plain numbers."""
    for path in FILES:
        if package_of(path) == "data":
            assert not [
                m for m, _ in imports_of(path) if m.startswith(("torch.distributed", "swinv2_train.distributed"))
            ]


def module_of(path: Path) -> str:
    return ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Imports inside functions count: a circle that is hidden there is still a circle."""
    modules = {module_of(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        found = {dotted if dotted in modules else dotted.rpartition(".")[0] for dotted, _ in imports_of(path)}
        graph[module_of(path)] = found & modules - {module_of(path)}

    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_a_task_is_known_by_its_type_in_its_own_files_alone() -> None:
    """So that a new task is its schema class, its line in TASKS, its file in tasks/ and its YAML alone."""
    tasks = {name for cls in TASKS.values() for name in (cls.__name__, cls.implementation.rpartition(":")[2])}
    for path in FILES:
        if package_of(path) == "tasks" or name(path).startswith(("config/schema/", "config/__init__.py")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            words = {getattr(node, field, None) for field in ("id", "attr", "name")}
            assert not words & tasks, f"{name(path)}:{getattr(node, 'lineno', '?')} knows {words & tasks}"


@pytest.mark.slow
def test_importing_every_module_does_nothing_visible() -> None:
    """No print, no change of the environment, no thread, no accelerator, and none of the slow packages."""
    modules = [module_of(path) for path in FILES]
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
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
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


def test_the_drawing_shows_these_layers() -> None:
    """docs/architecture.md shows it to those who do not read tests."""
    drawing = ET.parse(PACKAGE.parent / "docs" / "pictures" / "layers.svg")
    drawn = {
        text.text: int(layer.attrib["data-layer"])
        for layer in drawing.iterfind(".//{*}g[@data-layer]")
        for text in layer.iterfind("{*}text[@class='package']")
    }
    assert drawn == LAYERS
