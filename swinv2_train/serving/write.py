"""A run's model as one file for production: traced, written, and compared with the model before it has its name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.config import Config, ConfigError
from swinv2_train.models.initial import on_meta
from swinv2_train.runtime import available_cores, set_threads
from swinv2_train.serving.check import cases, largest_difference, traced_sides
from swinv2_train.serving.graphs import read_onnx, read_program, traced, write_onnx, write_program
from swinv2_train.serving.int8 import calibration_images, check_int8, compared, quantize
from swinv2_train.serving.request import ServingRequest
from swinv2_train.serving.served import Served, check_served, described
from swinv2_train.tasks import build_task
from swinv2_train.tasks.task import Task
from swinv2_train.weights import load_weights, weights_classes
from swinv2_train.weights.hub import pinned


def serve(config: Config, request: ServingRequest) -> dict[str, Any]:
    """Write request.out, and OUT.json beside it, which says how it is used; print what was done as one JSON line.

    Returns what the line holds.  Raises ConfigError for what cannot be served, MachineError where the file does not
    compute what the model computes; nothing is written then.
    """
    out, sidecar = request.out, request.out.with_name(f"{request.out.name}.json")
    for path in (out, sidecar):
        if path.exists():
            raise ConfigError(f"out ({path}) exists; name a new file, or remove it")
    check_int8(config, request)
    set_threads(config.runtime.num_threads, available_cores())
    with on_meta():
        task = build_task(config, torch.device("cpu"))
    check_served(config, task, request.dynamic_size)
    origin = _load(task, config, request)
    served = Served(task, config, request.preprocess).eval()
    classes = _classes(config, origin)
    description = described(config, task, served, classes, request.dynamic_size)
    line: dict[str, Any] = {"weights": origin, "ema": request.ema, "format": request.format}
    checked = cases(served, request.dynamic_size)  # by the model as it is, before it is made ready
    served.for_tracing(request.dynamic_size)
    images = served.input_like(2, traced_sides(served, request.dynamic_size))
    program = traced(served, images, request.dynamic_size)
    with _folder_beside(out) as folder, _folder_beside(folder / "float32") as exact:
        path = (folder if request.int8 is None else exact) / out.name
        if request.format == "torch_export":
            write_program(program, path, description)
            line["largest_difference"] = largest_difference(read_program(path), checked, out.name)
        else:
            description["opset"] = line["opset"] = request.opset
            write_onnx(program, path, description, request.opset)
            line["largest_difference"] = largest_difference(read_onnx(path), checked, out.name)
        if request.int8 is not None:
            description["int8"] = request.int8
            static = request.int8 == "static"
            calibration = calibration_images(config, request, task, classes) if static else None
            quantize(path, folder / out.name, description, calibration)
            line |= compared(config, task, served, classes, path, folder / out.name)
        (folder / sidecar.name).write_text(json.dumps(description, indent=1, allow_nan=False) + "\n")
        line["files"] = _moved(folder, out)
    print(json.dumps(line))
    return line


def _load(task: Task, config: Config, request: ServingRequest) -> str:
    """Give the module its values; returns where they are from."""
    found = None if request.weights else find_checkpoint(Path(request.checkpoint or config.run_dir))
    path = pinned(request.weights or str(found))
    task.module.to_empty(device="cpu")
    load_weights(task.module, path, format=request.weights_format, averaged=request.ema)
    return path


def _classes(config: Config, origin: str) -> tuple[str, ...] | None:
    """What the classes are called, as far as weights or configuration say it."""
    count = config.task.label_classes or config.task.pixel_classes or 0
    names = weights_classes(origin) if count else None
    return config.task.pixel_class_names if names is None or len(names) > count else names


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A folder in that of out, which is gone afterwards with what is in it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise ConfigError(f"out ({out}) cannot be written ({error.strerror or error}); name another place") from error
    with folder as name:
        yield Path(name)


def _moved(folder: Path, out: Path) -> list[str]:
    """Give the files of folder their places beside out, which comes last.  Returns their paths."""
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name == out.name)
    return [str(path.rename(out.with_name(path.name))) for path in files]
