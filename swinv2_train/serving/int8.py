"""Integers of 8 bits in an ONNX graph's products of matrices, and what that costs in accuracy and gains in time."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError
from swinv2_train.distributed import World
from swinv2_train.evaluation.splits import build_loader, open_splits, score
from swinv2_train.serving.graphs import METADATA, Run, data_beside, read_onnx
from swinv2_train.serving.request import ServingRequest
from swinv2_train.serving.served import INPUT, Served
from swinv2_train.tasks.task import Forward, Task

Classes = tuple[str, ...] | None
"""What the model's classes are called."""
TIMED = 10
"""Calls of each graph, in turns."""
OPERATORS = ["MatMul", "Gemm"]
ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def check_int8(config: Config, request: ServingRequest) -> None:
    """ConfigError where there is nothing to measure or calibrate with."""
    if request.int8 is None:
        return
    name, kind = config.task.name, request.int8
    if getattr(config.task, "target", None) is None:
        raise ConfigError(
            f"int8={kind} prints what it costs in a classifier's scores, and task={name} has none; leave int8 out"
        )
    if request.preprocess and config.reads_values:
        raise ConfigError(f"int8={kind} with preprocess=true is for photographs, not for bands; leave one out")
    for key, value, needed in (
        ("data.eval_shards", config.data.eval_shards, True),
        ("data.shards", config.data.shards, kind == "static"),
    ):
        if needed and (value is None or value == "unused"):
            raise ConfigError(f"int8={kind} needs images, and {key} names none; set {key}=PATTERN")


def quantize(exact: Path, out: Path, description: dict[str, Any], calibration: Iterator[Tensor] | None = None) -> None:
    """Write the graph of exact with products of integers to out.

    calibration: batches of its input, from which the ranges of all activations are taken once; None = each call takes
    those of its own.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded, large = exact.with_name("folded.onnx"), data_beside(exact).exists()
    beside = {"all_tensors_to_one_file": True, "external_data_location": data_beside(folded).name} if large else {}
    quant_pre_process(str(exact), str(folded), skip_symbolic_shape=True, save_as_external_data=large, **beside)
    # 7 bits of weights: products are added in pairs in 16 bits, and cut off, where a processor has no VNNI
    shared: dict[str, Any] = {"op_types_to_quantize": OPERATORS, "per_channel": True, "reduce_range": True}
    shared["use_external_data_format"] = large
    if calibration is None:
        quantize_dynamic(str(folded), str(out), weight_type=QuantType.QInt8, **shared)
    else:
        quantize_static(
            str(folded), str(out), _Calibration(calibration), quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, **shared,
        )  # fmt: skip
    model = onnx.load(str(out), load_external_data=False)
    onnx.helper.set_model_props(model, {METADATA: json.dumps(description)})
    onnx.save(model, str(out))


class _Calibration:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Any] | None:
        images = next(self.batches, None)
        return None if images is None else {INPUT: images.numpy()}


def calibration_images(config: Config, request: ServingRequest, task: Task, classes: Classes) -> Iterator[Tensor]:
    """The first images of data.shards, as they are evaluated, normalised or as they are read."""
    data = dataclasses.replace(config.data, eval_shards=config.data.shards, eval_splits={})
    config = dataclasses.replace(config, data=data)
    loader = build_loader(config, task, open_splits(config, classes, _say)[""], ALONE)
    left = request.calibration_images
    for batch in loader:
        images: Tensor = batch["images"][:left]
        yield images if request.preprocess else task.normalise(images)
        left -= len(images)
        if left <= 0:
            break
    loader.close()


def compared(
    config: Config, task: Task, served: Served, classes: Classes, exact: Path, integer: Path
) -> dict[str, Any]:
    """Scores on data.eval_shards, bytes and milliseconds for one image, of both graphs."""
    runs = {"float32": read_onnx(exact), "int8": read_onnx(integer)}
    split = open_splits(config, classes, _say)[""]
    found: dict[str, Any] = {}
    for name, run in runs.items():
        with torch.no_grad():
            scored = score(task, _forward(task, served, run), split, build_loader(config, task, split, ALONE), _say)
        found["images"], found[name] = scored.images, {**scored.scores}
    image = served.input_like(1, served.encoder.input_size)
    for name, milliseconds in timed({name: partial(run, image) for name, run in runs.items()}).items():
        found[name]["milliseconds"] = milliseconds
    for name, path in (("float32", exact), ("int8", integer)):
        found[name]["bytes"] = sum(each.stat().st_size for each in (path, data_beside(path)) if each.exists())
    return found


def _forward(task: Task, served: Served, run: Run) -> Forward:
    """A graph in the place of the task's module, which takes normalised images and gives what the loss knows."""

    def forward(images: Tensor) -> Tensor:
        found = run(images if served.normalise is None else task.normalise.pixels(images))
        return (found - served.mean) / served.std if served.output == "values" else found

    return forward


def timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median milliseconds of each call, all in turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + TIMED):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1000 * statistics.median(each[1:]), 3) for name, each in seconds.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
