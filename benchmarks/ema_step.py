"""What averaging the weights (optim.ema_decay) adds to a training step, in time and in bytes.

    python benchmarks/ema_step.py [--size tiny] [--rounds 9]

ZeRO-3 on one process, SimMIM at 64 px with 2 images: as small a step as that model has, so the share is as large as it
gets.  Two engines, with and without averages, take steps in turn.  Prints a Markdown table: medians of the time on a
GPU, or of CPU seconds of all threads, so that other load on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from swinv2_train.config.command_line import compose_overrides
from swinv2_train.distributed import World, init_distributed, shutdown_distributed
from swinv2_train.engine import build_engine
from swinv2_train.engine.deepspeed.engine import ZeroEngine
from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.training.param_groups import build_param_groups

PX, IMAGES = 64, 2


def build(size: str, precision: str, decay: float | None, world: World) -> ZeroEngine:
    config = compose_overrides([
        "run_dir=unused", "data.shards=unused", "engine=zero3", f"engine.precision={precision}", "engine.zero_stage=3",
        f"optim.ema_decay={'null' if decay is None else decay}", f"train.micro_batch_size={IMAGES}",
        f"train.global_batch_size={IMAGES}",
    ])  # fmt: skip
    torch.manual_seed(0)
    module = SimMIM(swin_v2(size, img_size=PX, window_size=4, num_classes=0))
    engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, (SwinBlock,))
    assert isinstance(engine, ZeroEngine)
    return engine


def seconds(part: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.process_time()
        part()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    part()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    world = init_distributed(600)
    torch.set_num_threads(1)
    images = torch.randn(IMAGES, 3, PX, PX, device=world.device)
    mask = torch.rand(IMAGES, PX // 4, PX // 4, device=world.device) < 0.6
    rows = []
    for precision in ("fp32", "bf16"):
        engines = {decay: build(options.size, precision, decay, world) for decay in (None, 0.9999)}
        passes: dict[float | None, list[float]] = {decay: [] for decay in engines}
        steps: dict[float | None, list[float]] = {decay: [] for decay in engines}
        updates: list[float] = []
        for number in range(options.rounds + 1):
            for decay, engine in engines.items():

                def forward_backward(engine: ZeroEngine = engine) -> None:
                    engine.backward(engine.forward(images=images, mask=mask)["loss"])

                def optimizer(engine: ZeroEngine = engine) -> None:
                    engine.step(1e-4)

                times = [seconds(part, world.device) for part in (forward_backward, optimizer)]
                if decay is not None:
                    updates.append(1e3 * seconds(engine._ema.update, world.device))
                if number:  # the first makes AdamW's moments
                    passes[decay].append(1e3 * times[0])
                    steps[decay].append(1e3 * times[1])
        whole = {decay: [a + b for a, b in zip(passes[decay], steps[decay], strict=True)] for decay in engines}
        ratios = [a / b for a, b in zip(whole[0.9999], whole[None], strict=True)]
        for decay in engines:
            shown = [f"{statistics.median(times[decay]):.1f}" for times in (passes, steps, whole)]
            shown.append("0" if decay is None else f"{statistics.median(updates):.1f}")
            ratio = "1" if decay is None else f"{statistics.median(ratios):.3f} ({min(ratios):.2f} - {max(ratios):.2f})"
            rows.append(f"| {precision} | {decay or 'null'} | {' | '.join(shown)} | {ratio} |")
    print(f"\n{options.size}, {world.device.type}\n")
    head = ("precision", "optim.ema_decay", "passes, ms", "optimizer, ms", "whole, ms", "averaging alone, ms", "ratio")
    print(f"| {' | '.join(head)} |\n|{len(head) * '---|'}\n" + "\n".join(rows))
    shutdown_distributed()


if __name__ == "__main__":
    main()
