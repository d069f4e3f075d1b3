"""Seconds from the command to the first completed training step: 2 ranks, ZeRO-3, bf16, a small SwinV2.

    python scripts/benchmark_startup.py [--repeats 3]

Prints a Markdown table: this project's start beside the same command with every cut of engine/startup.py undone
(SWINV2_TRAIN_KEEP_COMPILER=1), in turn, medians.  Both are warm: one uncounted start of each comes first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = {"as shipped": {}, "compiler imports kept": {"SWINV2_TRAIN_KEEP_COMPILER": "1"}}


def first_step_sec(shards: str, environment: dict[str, str]) -> float:
    """Start a run of one step and wait for its line in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "swinv2_train.train", "experiment=cifar10_simmim", f"run_dir={run_dir}", "train.max_steps=1"]
        command += [f"data.shards={shards}", "data.eval_shards=null", "train.global_batch_size=64"]
        command += ["train.micro_batch_size=32"]
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (run_dir / "metrics.jsonl").exists():
            if process.poll() not in (None, 0):
                raise SystemExit(f"the run failed with exit code {process.returncode}")
            time.sleep(0.02)
        seconds = time.monotonic() - started
        process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", default="data/cifar10/train-*.tar")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(options.repeats + 1):
        for name, environment in VARIANTS.items():
            value = first_step_sec(options.shards, environment)
            if repeat:
                seconds[name].append(value)
    reference = statistics.median(seconds["compiler imports kept"])
    print("| start | first step after, s (median) | min - max | ratio |\n|---|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.1f} | {min(values):.1f} - {max(values):.1f} | {median / reference:.2f} |")


if __name__ == "__main__":
    main()
