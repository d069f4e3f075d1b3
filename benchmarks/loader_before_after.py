"""The loader of two checkouts on the same JPEGs in one run: the ratio of their images per second.

    git worktree add /tmp/before COMMIT
    OMP_NUM_THREADS=1 python -m benchmarks.loader_before_after /tmp/before [--rounds 20] [--images 600] [--workers 0 2]

Each checkout runs its own benchmarks/loader_throughput.py in a process of its own, and the two take turns, each with
its bare decode loop beside its loader.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
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
    children = {}
    for name, checkout in (("before", options.before.resolve()), ("now", HERE)):
        children[name] = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(options.images), *map(str, options.workers)], text=True, cwd=checkout,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(checkout)},
        )  # fmt: skip
        assert children[name].stdout.readline() == "ready\n"
    turns: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in children}
    for number in range(options.rounds):
        order = list(children) if number % 2 else list(reversed(children))
        for name in order:
            print("turn", file=children[name].stdin, flush=True)
            turns[name].append(json.loads(children[name].stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()
    print("| loader | images/s before | images/s now | now / before, by the clock | by CPU time | quartiles |")
    print("|---|---|---|---|---|---|")
    for reader in turns["now"][0]:
        clock = {name: [turn[reader][0] for turn in found] for name, found in turns.items()}
        cpu = [old[reader][1] / new[reader][1] for old, new in zip(turns["before"], turns["now"], strict=True)]
        by_clock = statistics.median(old / new for old, new in zip(clock["before"], clock["now"], strict=True))
        rates = " | ".join(f"{1 / statistics.median(clock[name]):.0f}" for name in ("before", "now"))
        low, middle, high = statistics.quantiles(cpu, n=4)
        what = "bare decode loop" if reader == "bare" else f"{reader} workers"
        print(f"| {what} | {rates} | {by_clock:.3f} | {middle:.3f} | {low:.3f} - {high:.3f} |")


if __name__ == "__main__":
    main()
