"""From a traced model to files and back: torch.export programs, and ONNX graphs for onnxruntime."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swinv2_train.serving.any_size import size_step
from swinv2_train.serving.served import INPUT, Served

if TYPE_CHECKING:
    from torch.export import ExportedProgram

METADATA = "swinv2_train.json"
"""The extra file of a .pt2 and the key of ONNX's metadata_props that hold the description."""
ONE_FILE_BYTES = 2**31 - 2**26
"""Of parameters; ONNX's protobuf ends at 2 GiB, and the graph beside them takes some."""

Run = Callable[[Tensor], Tensor]


def traced(served: Served, images: Tensor, any_size: bool) -> ExportedProgram:
    """The program of a served model, for any batch and, where it is so, any multiple of its step.

    images: an example, of 2 or more images; where sizes are any, of sides that are 3 steps or more and not equal.
    """
    sides: dict[int, Any] = {0: torch.export.Dim("batch")}
    if any_size:
        step = size_step(served.encoder)
        sides |= {2: step * torch.export.Dim("rows", min=2), 3: step * torch.export.Dim("cols", min=2)}
    with torch.no_grad(), _quiet():
        return torch.export.export(served, (images,), dynamic_shapes=(sides,), strict=False)


def write_program(program: ExportedProgram, path: Path, description: dict[str, Any]) -> None:
    """A .pt2, with the description in it."""
    torch.export.save(program, path, extra_files={METADATA: json.dumps(description)})


def read_program(path: Path) -> Run:
    """What torch.export.load makes of a .pt2."""
    module = torch.export.load(path).module()
    return lambda images: module(images)


def write_onnx(program: ExportedProgram, path: Path, description: dict[str, Any], opset: int) -> None:
    """An .onnx with the description in it, and an .onnx.data with the weights where they do not fit into one file."""
    from onnxscript import opset18

    # the exporter has none of the first, and of the second none whose divisor follows from a size
    operators: dict[Any, Any] = {torch.sym_min: opset18.Min, torch.ops.aten.remainder.Scalar: opset18.Mod}
    table = {target: _called(operator) for target, operator in operators.items()}
    with torch.no_grad(), _quiet():
        onnx = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, input_names=[INPUT], verbose=False,
            output_names=[description["output"]["name"]], custom_translation_table=table,
        )  # fmt: skip
    assert onnx is not None, "dynamo=True gives a program"
    onnx.model.metadata_props[METADATA] = json.dumps(description)
    nbytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    onnx.save(path, external_data=nbytes > ONE_FILE_BYTES)


def data_beside(path: Path) -> Path:
    """Where the weights of an .onnx are that are not in it."""
    return path.with_name(f"{path.name}.data")


def _called(operator: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda first, second: operator(first, second)


def read_onnx(path: Path, threads: int | None = None) -> Run:
    """What onnxruntime makes of an .onnx on a CPU.  threads: None = torch's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of their own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
