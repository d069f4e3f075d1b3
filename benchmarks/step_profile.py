"""Where the time of a training step goes, by kind of operation: the official arithmetic and ours, forward and backward.

    python benchmarks/step_profile.py [--threads 2] [--picture docs/pictures/step_time.png]
    python benchmarks/step_profile.py --precisions fp32 --before    # on a processor without bf16 units

SwinV2-T at 256 px, window 8, on a CPU, by torch.profiler's own time of each operation on the main thread; the rest is
what passes between operations.  Prints a Markdown table, milliseconds of the median of the steps.  Columns of one
allocator and precision are measured in turns.  --case base/192/12: another model.  --before: also the matrix products
alone, and ours with torch's operations in the place of the passes between products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from benchmarks.cpu_passes import without_passes
from scripts.contestants import Case
from scripts.matrix_products import MatrixProducts
from scripts.official_arithmetic import OfficialArithmetic
from swinv2_train.report.plots import new_figure, save_figure, stacked_bars
from swinv2_train.runtime import tune_allocator

COLOURS = ("#2563c9", "#1b7f79", "#8e44ad", "#d9730d", "#f0a35e", "#67c893", "#e57368", "#c2a2d6", "#999999")
KINDS = {  # of operations, by what their names begin with; what is not here is "other"
    "matrix products": (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear", "aten::convolution_backward",
        "aten::mkldnn_convolution",
    ),
    "fused attention": ("swinv2_train::", "GeneratedBackwardFor_swinv2_train", "triton", "_WindowAttention"),
    "passes between products": ("_AddNorm", "_Gelu"),
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


def step_of(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(images).float().square().mean().backward()

    return step


def milliseconds(works: dict[str, Callable[[], None]], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of each, in turns, by kind; the kinds add up to the time by the clock."""
    walls: dict[str, list[float]] = {name: [] for name in works}
    kinds = {name: dict.fromkeys([*KINDS, "other"], 0.0) for name in works}
    for turn in range(-3, steps):
        for name, step in works.items():
            start = time.perf_counter()
            step()
            if turn >= 0:
                walls[name].append(1000 * (time.perf_counter() - start))
    for _ in range(steps):
        for name, step in works.items():
            with profile(activities=[ProfilerActivity.CPU]) as found:
                step()
            for event in found.key_averages():
                kind = kind_of(event.key.removeprefix("autograd::engine::evaluate_function: "))
                kinds[name][kind] += event.self_cpu_time_total
    scales = {name: statistics.median(walls[name]) / sum(kinds[name].values()) for name in works}
    return {name: {kind: value * scales[name] for kind, value in kinds[name].items()} for name in works}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--case", default="tiny/256/8", metavar="SIZE/PX/WINDOW")
    parser.add_argument("--before", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, px, window = options.case.split("/")
    case = Case(size, int(px), int(window), options.batch_size)
    columns = {}
    for tuned in (False, True):  # as the train command does; the official arithmetic had the system's settings
        if tuned:
            tune_allocator()
        for precision in options.precisions:
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            torch.manual_seed(0)
            images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, dtype=dtype)
            model = case.model(fused_attention=tuned).to(dtype)
            ours = step_of(model, images)
            works = {f"ours, {precision}": ours} if tuned else {
                f"official, {precision}": step_of(OfficialArithmetic(model).to(dtype), images)
            }  # fmt: skip
            if tuned and options.before:
                products = MatrixProducts(model, case.batch_size, dtype, torch.device("cpu"))

                def alone() -> None:
                    products.forward()  # noqa: B023  called at once
                    products.backward()  # noqa: B023

                def before() -> None:
                    with without_passes():
                        ours()  # noqa: B023

                works = {f"products alone, {precision}": alone, f"ours before, {precision}": before, **works}
            columns |= milliseconds(works, options.steps)
    names = sorted(columns, key=lambda name: name.endswith("bf16"))
    print(f"| ms | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for kind in [*KINDS, "other"]:
        print(f"| {kind} | {' | '.join(f'{columns[name][kind]:.0f}' for name in names)} |")
    print(f"| **all** | {' | '.join(f'**{sum(columns[name].values()):.0f}**' for name in names)} |")
    if options.picture:
        draw(columns, names, case, options.picture)


def draw(columns: dict[str, dict[str, float]], names: list[str], case: Case, path: Path) -> None:
    figure = new_figure(10, 0.6 * len(names) + 1)
    axes = figure.subplots()
    bars = [columns[name] for name in names]
    for place, total in enumerate(stacked_bars(axes, bars, dict(zip(bars[0], COLOURS, strict=True)), horizontal=True)):
        axes.annotate(f"{total:.0f} ms", (total, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"ms: forward and backward pass of {case.name}, {case.batch_size} images, on a CPU")
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
