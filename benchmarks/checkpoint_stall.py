"""How long training stands still for a checkpoint: written while it waits, and in the background.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py --size small

A real model under ZeRO-3 in bf16.  A forward and a backward pass follow each save, and what the optimizer's step would
then wait for is counted; the time until the files are complete is slept.  Prints one line of a table for each way and
the speed of the checksum.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from swinv2_train.checkpoint import Save, verified_checkpoint
from swinv2_train.distributed import (
    World,
    barrier,
    broadcast_object,
    init_distributed,
    shutdown_distributed,
)
from swinv2_train.engine import build_engine
from swinv2_train.models import swin_v2
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.training.param_groups import build_param_groups
from tests.support.toy import toy_config


def measure(world: World, size: str, run_dir: Path, saves: int) -> dict[str, list[tuple[float, float]]]:
    """For each way, (seconds that a save holds rank 0 up, seconds until it is complete) of each save."""
    module = swin_v2(size)
    config = toy_config(precision="bf16")
    engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, (SwinBlock,))
    found: dict[str, list[tuple[float, float]]] = {}
    images = torch.randn(1, 3, 256, 256)
    step = 0
    for _ in range(saves + 1):  # the first ones make AdamW's moments and ask for the memory of the copy
        for way, background in (("blocking", False), ("background", True)):  # by turns: the disk is shared
            step += 1
            barrier()
            started = time.perf_counter()
            saving = Save(run_dir, engine, {"step": step}, world, 1, None, background)
            held = time.perf_counter() - started
            engine.backward(engine.forward(images=images).square().mean())
            before = time.perf_counter()
            saving.wait_for_copy()
            held += time.perf_counter() - before
            engine.step(1e-4)
            while saving.under_way:
                time.sleep(0.01)  # training
            whole = time.perf_counter() - started
            barrier()
            before = time.perf_counter()
            path = saving.finish()
            held += time.perf_counter() - before
            found.setdefault(way, []).append((held, whole if background else held))
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    started = time.perf_counter()
    assert verified_checkpoint(path, world) == path
    verified = time.perf_counter() - started
    if world.is_main:
        print(f"\nswin_v2_{size}, {world.world_size} ranks, {num_bytes / 2**20:.0f} MiB a checkpoint\n")
        print("| way | stands still, s: median | min - max | complete after, s: median |\n|---|---|---|---|")
        for way, times in found.items():
            held, whole = zip(*times[1:], strict=True)
            print(f"| {way} | {median(held):.3f} | {min(held):.3f} - {max(held):.3f} | {median(whole):.3f} |")
        ways = zip(found["background"][1:], found["blocking"][1:], strict=True)
        ratios = [background[0] / blocking[0] for background, blocking in ways]
        print(f"\nstands still in the background: {median(ratios):.3f} of the blocking save before it (median)")
        block = os.urandom(2**26)
        started = time.perf_counter()
        zlib.crc32(block)
        rate = len(block) / (time.perf_counter() - started) / 1e9
        print(f"\nchecking it again before a resume: {verified:.2f} s; CRC-32 on one core: {rate:.1f} GB/s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = init_distributed(600)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        measure(world, options.size, Path(broadcast_object(own)), options.saves)
        barrier()
    shutdown_distributed()


if __name__ == "__main__":
    main()
