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
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from scripts.official_arithmetic import OfficialArithmetic
from swinv2_train.models import swin_v2
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
    """Of a step, by kind; the kinds add up to the time by the clock."""
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
    left, top, width, bar, gap = 120, 16, 620, 34, 14
    image = Image.new("RGB", (left + width + 250, top + len(names) * (bar + gap) + 40), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    scale = width / max(sum(kinds.values()) for kinds in columns.values())
    for row, name in enumerate(names):
        x, y = float(left), top + row * (bar + gap)
        canvas.text((left - 8, y + bar / 2), name, fill="#333333", font=font, anchor="rm")
        for kind, colour in zip(columns[name], COLOURS, strict=True):
            canvas.rectangle((x, y, x + columns[name][kind] * scale, y + bar), fill=colour)
            x += columns[name][kind] * scale
        canvas.text(
            (x + 6, y + bar / 2), f"{sum(columns[name].values()):.0f} ms", fill="#333333", font=font, anchor="lm"
        )
    for row, (kind, colour) in enumerate(zip(columns[names[0]], COLOURS, strict=True)):
        y = top + 18 * row
        canvas.rectangle((left + width + 80, y, left + width + 92, y + 12), fill=colour)
        canvas.text((left + width + 98, y + 6), kind, fill="#333333", font=font, anchor="lm")
    title = "forward and backward pass of SwinV2-T, 256 px, window 8, on a CPU"
    canvas.text((left, image.height - 24), title, fill="#333333", font=font)
    image.save(path)


if __name__ == "__main__":
    main()
