"""Time and memory of the global order for 70 million images in 10,000 shards.

OMP_NUM_THREADS=1 python benchmarks/order_scale.py
"""

from __future__ import annotations

import resource
import time

import numpy as np

from swinv2_train.data.loading.order import GlobalOrder, rank_batch, rank_shards

LANES, WINDOW, BATCH, RANKS, STEPS = 64, 4, 4096, 8, 300


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    counts = np.random.default_rng(0).integers(6900, 7101, 10_000)
    middle = int(counts.sum()) // 2 // BATCH * BATCH
    before = peak_mib()

    started = time.perf_counter()
    order = GlobalOrder(counts, 0, LANES, WINDOW)
    order.locate(middle)
    print(f"{counts.sum()} images: located in mid-epoch after {1e3 * (time.perf_counter() - started):.1f} ms")

    started = time.perf_counter()
    for step in range(STEPS):
        rank_batch(order, middle + step * BATCH, BATCH, 0, RANKS)
    per_image = (time.perf_counter() - started) / (STEPS * BATCH // RANKS)
    print(f"{1e6 * per_image:.2f} us per image of a rank, {peak_mib() - before:.1f} MiB")

    started = time.perf_counter()
    for step in range(20):
        now, later = rank_shards(order, middle + step * BATCH, BATCH, 0, RANKS, 16)
    seconds = (time.perf_counter() - started) / 20
    print(f"{1e3 * seconds:.2f} ms per step to know the {len(now)} shards of the rank and {len(later)} next ones")

    before = peak_mib()
    alone = GlobalOrder(counts, 0, LANES, WINDOW)
    for step in range(20):
        rank_batch(alone, middle + step * BATCH, BATCH, 0, 1)
    print(f"{peak_mib() - before:.1f} MiB more for one rank that reads all {LANES} lanes")


if __name__ == "__main__":
    main()
