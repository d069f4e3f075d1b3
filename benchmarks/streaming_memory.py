"""Memory that a rank needs on top of its engine while whole weights come in and go out: one at a time, or collected.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/streaming_memory.py [--size base] [--precision fp32]

ZeRO-3 on the CPU.  Prints two Markdown tables: the measured peaks, and what they mean for giant.  Only anonymous memory
is counted (RssAnon of /proc/self/status, sampled every 0.5 ms): pages of mapped files belong to the page cache, which
the kernel takes back when it needs memory.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from swinv2_train.config.command_line import compose_overrides
from swinv2_train.distributed import World, barrier, broadcast_object, init_distributed, shutdown_distributed
from swinv2_train.engine import build_engine
from swinv2_train.engine.state import consolidate
from swinv2_train.models import swin_v2
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.training.param_groups import build_param_groups
from swinv2_train.weights import read_weights, save_weights

MIB = 2**20


def measured(world: World, function: Callable[[], Any]) -> tuple[float, float]:
    """(anonymous bytes that the call adds at its peak on the rank where that is most, seconds of the slowest rank)."""
    status = os.open("/proc/self/status", os.O_RDONLY)
    done = threading.Event()
    peak = 0

    def now() -> int:
        return int(os.pread(status, 4096, 0).split(b"RssAnon:")[1].split()[0]) * 1024

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, now())
            time.sleep(0.0005)

    barrier()
    before, started = now(), time.monotonic()
    thread = threading.Thread(target=watch)
    thread.start()
    function()
    barrier()
    seconds = time.monotonic() - started
    done.set()
    thread.join()
    os.close(status)
    ranks = [broadcast_object((peak - before, seconds), src=rank) for rank in range(world.world_size)]
    return max(added for added, _ in ranks), max(seconds for _, seconds in ranks)


def largest_of(module: torch.nn.Module) -> tuple[str, int, int]:
    """(name of the largest parameter, its float32 bytes, those of the whole model)"""
    sizes = {name: 4 * parameter.numel() for name, parameter in module.named_parameters()}
    name = max(sizes, key=sizes.__getitem__)
    return name, sizes[name], sum(sizes.values())


def compare(world: World, size: str, precision: str, folder: Path) -> tuple[int, int, dict[str, tuple[float, float]]]:
    """Bytes of the largest parameter and of the model, and what each way of each passage takes."""
    config = compose_overrides(
        ["task=classify", "task.num_classes=1000", f"model={size}", "engine=zero3", f"engine.precision={precision}",
         "optim=classify", "run_dir=unused", "data.shards=unused"]
    )  # fmt: skip
    file, state_dir, exported = folder / "in.safetensors", folder / "engine", folder / "out.safetensors"
    module = swin_v2(size)
    name, largest, total = largest_of(module)
    if world.is_main:
        save_file({key: value + 1e-3 for key, value in module.state_dict().items()}, file)
    engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, (SwinBlock,))
    del module
    with torch.device("meta"):
        described = swin_v2(size)

    def load() -> None:
        engine.load_full(read_weights(file) if world.is_main else None)

    def load_collected() -> None:
        state = {key: value.clone() for key, value in load_file(file).items()}
        engine.load_full(state if world.is_main else None)

    def gather() -> None:
        for _ in engine.full_tensors():
            pass

    def gather_collected() -> None:
        dict(engine.full_tensors())

    def export() -> None:
        if world.is_main:
            save_weights(described, exported, "microsoft", weights=consolidate.read_state_weights(state_dir))

    def export_collected() -> None:
        if world.is_main:
            save_file(dict(consolidate.read_state_weights(state_dir)), exported)

    results = {"a file into the engine, streamed": measured(world, load)}
    results["a file into the engine, the whole dictionary on every rank"] = measured(world, load_collected)
    results["out of the engine to rank 0, streamed"] = measured(world, gather)
    results["out of the engine to rank 0, collected"] = measured(world, gather_collected)
    state_dir.mkdir(exist_ok=True)
    barrier()
    engine.snapshot(copy=False).write(state_dir)
    barrier()
    results["a checkpoint to a safetensors file, streamed"] = measured(world, export)
    results["a checkpoint to a safetensors file, collected"] = measured(world, export_collected)
    if world.is_main:
        print(f"\n{size}, {precision}, {world.world_size} ranks: {total / MIB:.0f} MiB in fp32, ", end="")
        print(f"largest parameter {name} with {largest / MIB:.1f} MiB\n")
    return largest, total, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed tensors go back to the kernel, so baselines are true
    torch.set_num_threads(1)
    world = init_distributed(600)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast_object(own))
        largest, _, results = compare(world, options.size, options.precision, folder)
        barrier()
    if world.is_main:
        with torch.device("meta"):
            name, giant_largest, giant_total = largest_of(swin_v2("giant"))
        print("| passage | peak above the engine, MiB | in largest parameters | s |\n|---|---|---|---|")
        for passage, (added, seconds) in results.items():
            print(f"| {passage} | {added / MIB:.0f} | {added / largest:.1f} | {seconds:.1f} |")
        print(f"\ngiant: {giant_total / MIB:.0f} MiB, largest parameter {name} with {giant_largest / MIB:.0f} MiB\n")
        print("| passage | k | k x giant's largest, MiB |\n|---|---|---|")
        for passage, (added, _) in results.items():
            if passage.endswith("streamed"):
                print(f"| {passage} | {added / largest:.1f} | {added / largest * giant_largest / MIB:.0f} |")
    shutdown_distributed()


if __name__ == "__main__":
    main()
