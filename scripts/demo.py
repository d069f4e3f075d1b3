"""The whole way on real images: fetch and pack CIFAR-10, pre-train, fine-tune, evaluate, report.

    make demo                                # or: python scripts/demo.py
    make demo DEMO_MINUTES=8                 # at most (15); epochs are chosen by what a step takes here
    make demo DEMO_ARGS="train.epochs=1"     # overrides; a key of one task goes to that task's run alone

Two processes under torchrun (one where there is one GPU), DeepSpeed ZeRO stage 3, bf16.  Ctrl-C leaves a complete
checkpoint; run again, it goes on from there, or says that everything is done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

from scripts import demo_length, fetch_cifar10
from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config import TASKS, Config
from swinv2_train.config.arguments import last_of_each
from swinv2_train.config.command_line import compose_overrides, guarded, load_run_config
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from swinv2_train.config.load import known_keys
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.monitoring.console import duration_text
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.monitoring.torchrun import run_ranks as torchrun
from swinv2_train.runtime.cpu_speed import cpu_speed, slow_bf16

DATA_DIR = Path("data/cifar10")
PROCESSES = 2
SAVE_SEC = 120
"""How long a stopped rank may take to end its step and save."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code of the first phase that does not end well, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="folder of the two runs (%(default)s)")
    parser.add_argument("--minutes", type=float, default=15.0, help="the whole, data at hand, at most (%(default)g)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides")
    options = parser.parse_args(arguments)
    pretrain, finetune = options.runs / "pretrain", options.runs / "finetune"
    started = time.monotonic()

    phases = (
        ("SimMIM pre-training", pretrain, ["experiment=cifar10_simmim", f"run_dir={pretrain}"], "simmim"),
        (
            "Supervised fine-tuning",
            finetune,
            ["experiment=cifar10_finetune", f"run_dir={finetune}", f"task.init_from={pretrain}"],
            "classify",
        ),
    )
    precision = [f"engine.precision={precision_for(pretrain)}"]
    commands = [
        last_of_each([*command, *precision, *overrides_of(options.overrides, task)]) for _, _, command, task in phases
    ]
    configs = [compose_overrides(command) for command in commands]  # wrong input is said before anything is fetched

    source = configs[0].data.source
    exit_code = fetch_cifar10.run(["--out", str(DATA_DIR), *(() if source is None else ("--source", source))])
    if exit_code != EXIT_DONE:
        return exit_code
    exit_code, length = length_for(options.runs, commands, configs, 60 * options.minutes, options.overrides)
    if exit_code != EXIT_DONE:
        return exit_code
    if length is not None:
        commands[0].append(f"train.epochs={length.pretrain:g}")
        commands[1] = last_of_each([*length.overrides, *commands[1], f"train.epochs={length.finetune:g}"])
    for (title, run_dir, _, _), command in zip(phases, commands, strict=True):
        print(f"\n{title} ({run_dir})", flush=True)
        exit_code = run_ranks(["-m", "swinv2_train.train", *command])
        if exit_code == EXIT_STOPPED:
            newest = newest_checkpoint(run_dir)
            print(f"stopped; {newest or 'nothing'} is complete; `make demo` goes on from there", flush=True)
        if exit_code != EXIT_DONE:
            return exit_code

    print("\nEvaluation on the test images", flush=True)
    scores = evaluate(finetune)
    if scores is None:
        return EXIT_FAILED
    print_table(pretrain, finetune, scores, time.monotonic() - started)
    print(f"\nreport: {finetune / 'report.html'}")
    return EXIT_DONE


def precision_for(run_dir: Path) -> str:
    """bf16, or fp32 on a CPU whose bf16 would turn minutes into hours; what a run was begun with, it goes on with."""
    if (run_dir / "config.yaml").exists():
        return load_run_config(run_dir).engine.precision
    if torch.cuda.is_available():
        return "bf16"
    if (slow := slow_bf16(cpu_speed())) is None:
        return "bf16"
    print(f"{slow}; the demo runs in fp32")
    return "fp32"


def length_for(
    runs: Path, commands: Sequence[list[str]], configs: Sequence[Config], seconds: float, overrides: Sequence[str]
) -> tuple[int, demo_length.Length | None]:
    """The exit code of what was timed, and the epochs of both phases so that the whole ends within so many seconds.

    What was chosen when the runs were begun stays.  None: as the commands say, which is so where the user names epochs
    or steps, and for runs that were begun without a choice.
    """
    if {"train.epochs", "train.max_steps"} & {each.partition("=")[0].lstrip("+") for each in overrides}:
        return EXIT_DONE, None
    chosen = demo_length.kept(runs)
    if chosen is not None:
        print(f"as it was begun: {chosen.text()}", flush=True)
    if chosen is not None or (runs / "pretrain" / "config.yaml").exists():
        return EXIT_DONE, chosen
    started = time.monotonic()
    print("\nA few steps of each phase, to see how long they take here", flush=True)
    timed = []
    alone = ("data.eval_shards=null", "train.eval_every_steps=null", "train.keep_best=null", "task.init_from=null")
    for command, more in zip(commands, ((), alone), strict=True):
        exit_code, found = demo_length.measure([*command, *more], runs / "timed", run_ranks)
        if found is None:
            return exit_code, None
        timed.append(found)
    images, tests = (
        open_manifest(str(shards)).num_samples for shards in (configs[1].data.shards, configs[1].data.eval_shards)
    )
    batch = configs[1].train.global_batch_size
    work = demo_length.Work(images / batch, tests / batch, configs[1].train.eval_every_steps or images)
    left = seconds - (time.monotonic() - started)
    length = demo_length.choose(left, *timed, work)
    expected = demo_length.seconds(length, *timed, work)
    print(
        f"a step takes {timed[0].step:.2f} s and {timed[1].step:.2f} s: {length.text()}, about "
        f"{duration_text(expected)} from now on{'' if expected <= left else ', which is the shortest there is'}",
        flush=True,
    )
    demo_length.keep(runs, length)
    return EXIT_DONE, length


def overrides_of(overrides: Sequence[str], task: str) -> list[str]:
    """The overrides without those of keys that only the other tasks have."""
    own = set(known_keys(TASKS[task]))
    foreign = set(known_keys()) - own
    return [override for override in overrides if override.partition("=")[0].lstrip("+~") not in foreign]


def num_processes() -> int:
    """Each needs a GPU of its own; on a CPU they share the cores."""
    return 1 if torch.cuda.device_count() == 1 else PROCESSES


def run_ranks(command: list[str]) -> int:
    """torchrun in this process; returns the ranks' exit code, and of a signal that torchrun has passed on a stop's."""
    ranks = ["--standalone", "--nproc-per-node", str(num_processes()), "--shutdown-timeout", str(SAVE_SEC)]
    code = torchrun([*ranks, *command])
    return EXIT_STOPPED if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else code


def evaluate(run_dir: Path, overrides: Sequence[str] = ()) -> dict[str, float] | None:
    """The scores that the evaluate command prints; None after it has failed."""
    command = [sys.executable, "-m", "swinv2_train.evaluate", f"run_dir={run_dir}", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # torchrun's 1
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    return json.loads(done.stdout) if done.returncode == EXIT_DONE else None


def print_table(pretrain: Path, finetune: Path, scores: dict[str, float], seconds: float) -> None:
    """What was done and what came out, one line each."""
    rows = [("phase", "steps", "images", "images/s", "loss first -> last")]
    for title, run_dir in (("pre-training", pretrain), ("fine-tuning", finetune)):
        lines = read_metrics(run_dir)
        losses = [line["train/loss"] for line in lines if line.get("train/loss") is not None]
        speeds = sorted(line["perf/images_per_sec"] for line in lines if line.get("perf/images_per_sec") is not None)
        speed = f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-"
        last = lines[-1]
        rows.append(
            (title, f"{last['step']:,}", f"{last['images_seen']:,}", speed, f"{losses[0]:.3f} -> {losses[-1]:.3f}")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        f"\ntest images {scores['images']:,}   top-1 {scores['val/top1']:.2f} %   top-5 {scores['val/top5']:.2f} %   "
        f"loss {scores['val/loss']:.4f}   (this call took {duration_text(seconds)})"
    )


if __name__ == "__main__":
    try:
        sys.exit(guarded(main))
    except (KeyboardInterrupt, SignalException):  # outside of a training phase nothing needs saving
        sys.exit(EXIT_STOPPED)
