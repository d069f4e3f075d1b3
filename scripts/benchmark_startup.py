"""Seconds from the command to the first completed training step: 2 ranks, ZeRO-3, bf16, a small SwinV2.

    python scripts/benchmark_startup.py [--repeats 3] [--before CHECKOUT]

Prints a Markdown table: this project's start beside the same command with every cut of engine/deepspeed/startup.py
undone (SWINV2_TRAIN_KEEP_COMPILER=1) and, where one is given, beside another checkout's, in turn, medians.
All are warm: one uncounted start of each comes first.  CPU seconds are of all processes together, so
that other load on the machine hardly counts.
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

KEPT = "compiler imports kept"


def first_step_sec(shards: str, checkout: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Start a run of one step and wait for its line in metrics.jsonl; (seconds, CPU seconds of all its processes)."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "swinv2_train.train", "experiment=cifar10_simmim", f"run_dir={run_dir}", "train.max_steps=1"]
        command += [f"data.shards={shards}", "data.eval_shards=null", "train.global_batch_size=64"]
        command += ["train.micro_batch_size=32"]
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=checkout,  # the package there takes precedence over an installed one
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (run_dir / "metrics.jsonl").exists():
            if process.poll() not in (None, 0):
                raise SystemExit(f"the run failed with exit code {process.returncode}")
            time.sleep(0.02)
        seconds = time.monotonic() - started
        cpu_seconds = cpu_seconds_of(process.pid)
        process.wait()
    return seconds, cpu_seconds


def cpu_seconds_of(pid: int) -> float:
    """CPU time so far of a process and all its living descendants, with what their ended children took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    children = [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return own + sum(cpu_seconds_of(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", default="data/cifar10/train-*.tar")
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    options = parser.parse_args()
    here = Path(__file__).parents[1]
    variants = {"as shipped": (here, {}), KEPT: (here, {"SWINV2_TRAIN_KEEP_COMPILER": "1"})}
    if options.before:
        variants["before"] = (options.before, {})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):
        for name, (checkout, environment) in variants.items():
            values = first_step_sec(str(Path(options.shards).absolute()), checkout, environment)
            if repeat:
                found[name].append(values)
    reference = [statistics.median(values) for values in zip(*found[KEPT], strict=True)]
    print("| start | first step after, s (median) | min - max | ratio | CPU s of all processes | ratio |")
    print("|---|---|---|---|---|---|")
    for name, pairs in found.items():
        seconds, cpu_seconds = zip(*pairs, strict=True)
        wall, cpu = statistics.median(seconds), statistics.median(cpu_seconds)
        print(
            f"| {name} | {wall:.1f} | {min(seconds):.1f} - {max(seconds):.1f} | {wall / reference[0]:.2f} "
            f"| {cpu:.1f} | {cpu / reference[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
