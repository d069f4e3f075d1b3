"""Where the time of a training step goes, by kind of operation: the official arithmetic and ours, forward and backward.

    python benchmarks/step_profile.py [--threads 2] [--picture docs/pictures/step_time.png]

SwinV2-T at 256 px, window 8, on a CPU, by torch.profiler's own time of each operation on the main thread; the rest is
what passes between operations.  Prints a Markdown table, milliseconds of the median of the steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from scripts.official_arithmetic import OfficialArithmetic
from swinv2_train.models import swin_v2
from swinv2_train.report.plots import new_figure, save_figure, stacked_bars
from swinv2_train.runtime import tune_allocator

COLOURS = ("#2563c9", "#1b7f79", "#8e44ad", "#d9730d", "#f0a35e", "#67c893", "#e57368", "#999999")
KINDS = {  # of operations, by what their names begin with; what is not here is "other"
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear"),
    "fused attention": ("swinv2_train::", "GeneratedBackwardFor_swinv2_train", "triton"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward"),
    "GELU": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "copies": ("aten::copy_", "aten::cat", "aten::roll", "aten::index", "aten::_index_put", "aten::clone"),
    "elementwise and sums": (
        "aten::mul", "aten::add", "aten::div", "aten::sum", "aten::sub", "aten::neg", "aten::exp", "aten::where",
        "aten::linalg_vector_norm", "aten::clamp", "aten::masked_fill", "aten::sigmoid", "aten::threshold",
        "aten::relu", "aten::expand", "aten::bernoulli", "aten::ge", "aten::eq", "aten::logical", "aten::fill",
        "aten::zero_", "aten::mean", "aten::to", "aten::_to_copy",
    ),
}  # fmt: skip


def kind_of(name: str) -> str:
    """The longest beginning decides, or aten::add would take aten::addmm."""
    found = [(len(start), kind) for kind, starts in KINDS.items() for start in starts if name.startswith(start)]
    return max(found)[1] if found else "other"


def step(model: nn.Module, images: torch.Tensor) -> None:
    model.zero_grad()
    model(images).float().square().mean().backward()


def milliseconds(model: nn.Module, images: torch.Tensor, steps: int) -> dict[str, float]:
    """Milliseconds of a step, by kind; the kinds add up to the time by the clock."""
    for _ in range(3):
        step(model, images)
    walls = []
    for _ in range(steps):
        start = time.perf_counter()
        step(model, images)
        walls.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step(model, images)
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in found.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000 / steps
    wall = statistics.median(walls) * 1000
    total = sum(kinds.values())
    return {kind: value * wall / total for kind, value in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        images = torch.randn(options.batch_size, 3, 256, 256, dtype=dtype)
        official = OfficialArithmetic(swin_v2("tiny", drop_path_rate=0.1)).to(dtype)
        columns[f"official, {precision}"] = milliseconds(official, images, options.steps)
    tune_allocator()  # as the train command does; the official arithmetic had the system's settings
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        images = torch.randn(options.batch_size, 3, 256, 256, dtype=dtype)
        ours = swin_v2("tiny", drop_path_rate=0.1, fused_attention=True).to(dtype)
        columns[f"ours, {precision}"] = milliseconds(ours, images, options.steps)
    names = sorted(columns, key=lambda name: (name.split(", ")[1] == "bf16", name.startswith("ours")))
    print(f"| ms | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for kind in [*KINDS, "other"]:
        print(f"| {kind} | {' | '.join(f'{columns[name][kind]:.0f}' for name in names)} |")
    print(f"| **all** | {' | '.join(f'**{sum(columns[name].values()):.0f}**' for name in names)} |")
    if options.picture:
        draw(columns, names, options.picture)


def draw(columns: dict[str, dict[str, float]], names: list[str], path: Path) -> None:
    figure = new_figure(10, 0.6 * len(names) + 1)
    axes = figure.subplots()
    bars = [columns[name] for name in names]
    for place, total in enumerate(stacked_bars(axes, bars, dict(zip(bars[0], COLOURS, strict=True)), horizontal=True)):
        axes.annotate(f"{total:.0f} ms", (total, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms: forward and backward pass of SwinV2-T, 256 px, window 8, on a CPU")
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
