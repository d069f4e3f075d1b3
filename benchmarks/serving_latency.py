"""Milliseconds for an image by each way of serving a SwinV2, in turns: eager models, torch.export, onnxruntime, int8.

    python -m benchmarks.serving_latency [--size tiny] [--img-size 256] [--rounds 7] [--threads 2]

Random weights of timm's, loaded into both models.  Prints a row for each batch size and way: median and minimum.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import timm
import torch
from torch import Tensor

from swinv2_train.config.command_line import compose_overrides
from swinv2_train.models.kernels.failures import surviving
from swinv2_train.serving.graphs import read_onnx, read_program, traced, write_onnx, write_program
from swinv2_train.serving.int8 import quantize
from swinv2_train.serving.served import Served, described
from swinv2_train.tasks import build_task
from swinv2_train.weights import load_weights

BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--img-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    print(f"{_processor()}; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, timm {timm.__version__}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ways = built(asked.size, asked.img_size, asked.threads, Path(folder))
        for batch in BATCHES:
            images = torch.randn(batch, 3, asked.img_size, asked.img_size)
            for name, seconds in in_turns(ways, images, asked.rounds).items():
                each = [1000 * value / batch for value in seconds]
                print(f"| {batch} | {name} | {statistics.median(each):.1f} | {min(each):.1f} |", flush=True)


def built(size: str, img_size: int, threads: int, folder: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way, from images to logits, of the same weights."""
    theirs = timm.create_model(f"swinv2_{size}_window8_256", img_size=img_size).eval()
    torch.save(theirs.state_dict(), folder / "timm.pth")
    words = ["task=classify", "task.num_classes=1000", f"model={size}", "data=labelled", "model.window_size=8"]
    config = compose_overrides([*words, f"model.img_size={img_size}"], ("run_dir", "data.shards"))
    ours, plain = (build_task(config, torch.device("cpu")) for _ in range(2))
    for task in (ours, plain):
        load_weights(task.module, folder / "timm.pth", format="timm")
    ours.module.eval()
    served = Served(plain, config, False).eval()
    description = described(config, plain, served, None, False)
    served.for_tracing(False)
    program = traced(served, served.input_like(2, (img_size, img_size)), False)
    paths = {name: folder / name for name in ("model.pt2", "float32.onnx", "dynamic.onnx", "static.onnx")}
    write_program(program, paths["model.pt2"], description)
    write_onnx(program, paths["float32.onnx"], description, 20)
    quantize(paths["float32.onnx"], paths["dynamic.onnx"], description)
    calibration = iter([torch.randn(2, 3, img_size, img_size) for _ in range(4)])
    quantize(paths["float32.onnx"], paths["static.onnx"], description, calibration)
    for name, path in paths.items():
        print(f"{name}: {path.stat().st_size / 1e6:.1f} MB")

    def eager(images: Tensor) -> Tensor:
        with surviving(lambda case, cause: None):
            return ours.module(images)

    return {
        "timm, eager": theirs,
        "ours, eager": eager,
        "torch_export": read_program(paths["model.pt2"]),
        "onnxruntime, float32": read_onnx(paths["float32.onnx"], threads),
        "onnxruntime, int8=dynamic": read_onnx(paths["dynamic.onnx"], threads),
        "onnxruntime, int8=static": read_onnx(paths["static.onnx"], threads),
    }


def in_turns(ways: dict[str, Callable[[Tensor], Tensor]], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, after one of each that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(images)
            if number:
                found[name].append(time.perf_counter() - start)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [unit for unit in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if unit in flags]
    return f"{len(named)} x {named[0] if named else platform.processor()} ({', '.join(units)})"


if __name__ == "__main__":
    main()
