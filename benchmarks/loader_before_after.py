"""The loader of two checkouts on the same JPEGs in one run: the ratio of their images per second.

    git worktree add /tmp/before COMMIT
    OMP_NUM_THREADS=1 python -m benchmarks.loader_before_after /tmp/before [--rounds 20] [--images 600] [--workers 0 2]

Each checkout runs its own benchmarks/loader_throughput.py in a process of its own, and the two take turns, each with
its bare decode loop beside its loader.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.two_checkouts import in_turns

CHILD = """
import json, sys, tempfile, warnings
import torch
from benchmarks import loader_throughput as own
from swinv2_train.config.command_line import compose_overrides
torch.set_num_threads(1)
warnings.filterwarnings("ignore")
images, *workers = map(int, sys.argv[1:])
with tempfile.TemporaryDirectory() as folder:
    named = [(f"p{i:04d}", own.photograph(i), "jpg", None) for i in range(own.SHARDS * own.PER_SHARD)]
    manifest = own.write_shards(named, f"{folder}/train", own.PER_SHARD)
    crop = own.Crop(compose_overrides(["run_dir=x", "data.shards=x"]).data, 192)
    streams = {"bare": own.bare(manifest, crop)} | {n: own.ours(manifest, crop, n) for n in workers}
    readers = {name: own.Reader(stream) for name, stream in streams.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps({name: reader.turn(images) for name, reader in readers.items()}), flush=True)
    for stream in streams.values():
        stream.close()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    options = parser.parse_args()
    given = [str(options.images), *map(str, options.workers)]
    turns = in_turns(options.before, CHILD, given, options.rounds)
    print("| loader | images/s before | images/s now | now / before, by the clock | by CPU time | quartiles |")
    print("|---|---|---|---|---|---|")
    for reader in turns[0][0]:
        pairs = [(old[reader], new[reader]) for old, new in turns]  # each (seconds of an image by the clock, of CPU)
        by_clock = statistics.median(old[0] / new[0] for old, new in pairs)
        cpu = [old[1] / new[1] for old, new in pairs]
        rates = " | ".join(f"{1 / statistics.median(pair[place][0] for pair in pairs):.0f}" for place in (0, 1))
        low, middle, high = statistics.quantiles(cpu, n=4)
        what = "bare decode loop" if reader == "bare" else f"{reader} workers"
        print(f"| {what} | {rates} | {by_clock:.3f} | {middle:.3f} | {low:.3f} - {high:.3f} |")


if __name__ == "__main__":
    main()
