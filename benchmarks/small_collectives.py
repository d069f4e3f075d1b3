"""Small collectives of ranks that share cores, under the kernel's usual policy and under SCHED_BATCH, in turns.

    python -m benchmarks.small_collectives [--rounds 5] [--ranks 2 3 4]

The usual policy is what a rank has without init_distributed's word.  All-reduces of 1,000 float32 alone, and with a
product of two 300 x 300 matrices between them; milliseconds of each, and of CPU time in gloo's two threads (Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.ranks_and_threads import CORES, processor
from swinv2_train.distributed import init_distributed, process_group, shutdown_distributed

COUNT = 300


def main() -> None:
    """Time both policies and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    options = parser.parse_args()
    print(f"{processor()}, {CORES} cores, torch {torch.__version__}; medians of {options.rounds} rounds\n")
    print("| ranks | policy | an all-reduce, ms | gloo's CPU, ms | with a product between, ms | gloo's CPU, ms |")
    print("|---|---|---|---|---|---|")
    for ranks in options.ranks:
        found: dict[bool, list[list[float]]] = {False: [], True: []}
        for _ in range(options.rounds):
            for batch, rows in found.items():
                rows.append(measured(ranks, batch))
        for batch, rows in found.items():
            cells = " | ".join(f"{statistics.median(column):.3f}" for column in zip(*rows, strict=True))
            print(f"| {ranks} | {'SCHED_BATCH' if batch else 'usual'} | {cells} |", flush=True)


def measured(ranks: int, batch: bool) -> list[float]:
    """What rank 0 of so many processes found."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(rank, (ranks, batch, queue), ranks)
    return queue.get()


def rank(number: int, ranks: int, batch: bool, queue: torch.multiprocessing.SimpleQueue) -> None:
    """One process."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29517"))
    torch.set_num_threads(1)
    if not batch:
        process_group._schedule_batch = lambda on: None
    init_distributed(300)
    numbers, matrix = torch.ones(1000), torch.ones(300, 300)
    row = []
    for product in (False, True):
        dist.barrier()
        cpu, started = of_gloo(), time.perf_counter()
        for _ in range(COUNT):
            dist.all_reduce(numbers)
            if product:
                matrix @ matrix
        row += [1000 * (time.perf_counter() - started) / COUNT, (of_gloo() - cpu) / COUNT]
    if number == 0:
        queue.put(row)
    shutdown_distributed()


def of_gloo() -> float:
    """CPU milliseconds of gloo's threads in this process."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


if __name__ == "__main__":
    main()
