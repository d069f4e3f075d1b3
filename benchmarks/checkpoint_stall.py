"""How long training stands still for a checkpoint: written while it waits, and in the background.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py --size small

A real model under ZeRO-3 in bf16; the steps between two saves are simulated by sleeping, because what is asked is how
long the saves hold a rank up and how fast a core writes.  Prints one line of a table for each way and the speed of the
checksum.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from toy import toy_config  # noqa: E402

from swinv2_train.checkpoint import Save, verified_checkpoint  # noqa: E402
from swinv2_train.distributed import (  # noqa: E402
    World,
    barrier,
    broadcast_object,
    init_distributed,
    shutdown_distributed,
)
from swinv2_train.engine import build_engine  # noqa: E402
from swinv2_train.models import swin_v2  # noqa: E402
from swinv2_train.optim import build_param_groups  # noqa: E402


def measure(world: World, size: str, run_dir: Path, saves: int) -> dict[str, list[tuple[float, float]]]:
    """For each way, (seconds that a save holds rank 0 up, seconds until it is complete) of each save."""
    module = swin_v2(size)
    config = toy_config(precision="bf16")
    engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1)
    found: dict[str, list[tuple[float, float]]] = {}
    for number, (way, background) in enumerate((("blocking", False), ("background", True))):
        for step in range(number * (saves + 1), (number + 1) * (saves + 1)):  # the first one makes the averages
            barrier()
            started = time.perf_counter()
            saving = Save(run_dir, engine, {"step": step}, world, 1, None, background)
            held = time.perf_counter() - started
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
        print("| way | stands still, s (median) | complete after, s (median) |\n|---|---|---|")
        for way, times in found.items():
            held, whole = (sorted(column)[1 + saves // 2 - 1] for column in zip(*times[1:], strict=True))
            print(f"| {way} | {held:.3f} | {whole:.3f} |")
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
