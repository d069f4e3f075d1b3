"""By how much the planner expects each step taken for CUDA to move images/s: with it, and without.

    python -m benchmarks.expected_gains [--hardware a100_40gb h200]

Nothing here is measured: traces of the real model on the meta device, and data-sheet rates (conf/hardware/).  "Without"
is this project before the step, everything else as it is now.  Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.config import Config, HardwareConfig
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.models import simmim
from swinv2_train.models.precision import Float32LayerNorm
from swinv2_train.planning.hardware import fill_from_machine, required
from swinv2_train.planning.memory import plan_memory
from swinv2_train.planning.speed import SpeedPlan, pass_seconds, plan_speed

OPERATION_US = 106.0
"""What torch.library takes of the host beyond a plain Function, forward and backward of a layer
(benchmarks/launch_overhead_cpu_202611.md)."""
CASES = {
    "base, 192 px, window 12, SimMIM, ZeRO-1": ["experiment=simmim_base_192_800ep", "engine=zero1"],
    "base, micro-batch 8": [
        "experiment=simmim_base_192_800ep", "engine=zero1", "train.micro_batch_size=8", "train.global_batch_size=64",
    ],
    "giant, 192 px, ZeRO-3": ["experiment=simmim_giant_192", "engine=zero3"],
    "giant, 192 px, ZeRO-3, blocks@cpu": ["experiment=simmim_giant_192", "engine=zero3", "model.recompute=blocks@cpu"],
}  # fmt: skip
RANKS = 8


def square_pooling(images: Tensor, window_px: int, measured: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The statistics by three pools over window_px x window_px pixels, as they were."""
    pad = window_px // 2
    mean = F.avg_pool2d(images, window_px, stride=1, padding=pad, count_include_pad=False)
    square = F.avg_pool2d(images**2, window_px, stride=1, padding=pad, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(images), window_px, stride=1, padding=pad, divisor_override=1)
    return mean, (((square - mean**2) * (count / (count - 1))).clamp(min=0) + 1e-6) ** 0.5


def planned(config: Config, hardware: HardwareConfig, host_us: float = 0.0, moved_after: bool = False) -> SpeedPlan:
    """host_us: more host time for each block.  moved_after: block inputs go to CPU memory and back in the passes."""
    memory, trace = plan_memory(config, hardware, RANKS)
    passes = pass_seconds(hardware, trace)
    passes = replace(passes, host=passes.host + host_us * 1e-6 * len(memory.sizes.blocks))
    if moved_after:
        moved = 2 * passes.moved_to_host / (required(hardware.host_gb_per_sec) * 1e9)
        passes = replace(passes, traffic=passes.traffic + moved, moved_to_host=0)
    return plan_speed(config, hardware, memory.sizes, passes, RANKS)


@contextlib.contextmanager
def norms_on_copies() -> Iterator[None]:
    with mock.patch.object(Float32LayerNorm, "meta_stands_for", "cpu"):
        yield


def gains(config: Config, hardware: HardwareConfig) -> Iterator[tuple[str, float]]:
    """What was done, and images/s with it over images/s without."""
    now = planned(config, hardware).images_per_sec
    with norms_on_copies():
        yield "native bf16 LayerNorm", now / planned(config, hardware).images_per_sec
    plain = replace(config, model=replace(config.model, compile="none"))
    eager = planned(plain, hardware).images_per_sec
    yield "model.compile=auto", now / eager
    with norms_on_copies():
        yield "both, against neither", now / planned(plain, hardware).images_per_sec
    # Compiled graphs call torch.library's operation as before.
    slow = planned(plain, hardware, OPERATION_US).images_per_sec
    yield "fused attention as a plain Function, not compiled", eager / slow
    if getattr(config.task, "norm_target", None) is not None:
        with mock.patch.object(simmim, "local_statistics", square_pooling):
            yield "separable norm_target", now / planned(config, hardware).images_per_sec
    if config.model.recompute.endswith("@cpu"):
        yield "copies on their own stream", now / planned(config, hardware, moved_after=True).images_per_sec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", nargs="+", default=["a100_40gb", "h200"])
    names = parser.parse_args().hardware
    print(f"| expected images/s, with / without | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for case, overrides in CASES.items():
        rows: dict[str, list[float]] = {}
        for name in names:
            config = compose_overrides(["run_dir=unused", "data.shards=unused", f"hardware={name}", *overrides])
            hardware = fill_from_machine(config.hardware, RANKS)
            for what, gain in gains(config, hardware):
                rows.setdefault(what, []).append(gain)
        print(f"| **{case}** |{' |' * len(names)}")
        for what, row in rows.items():
            print(f"| {what} | {' | '.join(f'{gain:.3f}' for gain in row)} |")


if __name__ == "__main__":
    main()
