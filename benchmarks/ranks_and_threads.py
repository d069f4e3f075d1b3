"""As many ranks as cores with a thread each, against one rank with a thread for each core: speed, and threads at once.

    python -m benchmarks.ranks_and_threads [--models demo tiny] [--rounds 3] [--steps 14] [--commands]

The real train command at one global batch, by torchrun and as one process, in turns; images/s are those it logs,
without the first steps of a start.  CPU seconds are of all processes of a run, loaders included, between the same
steps.  Threads are counted twenty times a second by their state in /proc: R is on a core, or waits for one, and what
spins in OpenMP is R too.  More of them than there are cores is oversubscription.  --commands: instead, the threads of
validation while training, of swinv2-evaluate and of swinv2-predict (Linux).
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.runtime import available_cores

FIRST = 4
"""Steps of a start that do not count."""
PERIOD_SEC = 0.05
TICK = os.sysconf("SC_CLK_TCK")
CORES = available_cores()
COMMON = (
    "engine=zero1", "engine.precision=fp32", "log.wandb=disabled", "log.progress=none", "train.log_every_steps=1",
    "train.epochs=null", "train.checkpoint_every_steps=1000000", "train.picture_every_steps=1000000",
)  # fmt: skip
MODELS = {
    "demo": (32, 256, ("experiment=cifar10_simmim",)),
    "tiny": (256, 8, ("model=tiny", "task=simmim", "data.num_workers=null")),
}
"""Pixels of a side, images of a step, overrides."""
WAYS = {
    f"1 rank, {CORES} threads": (1, {}),
    f"{CORES} ranks, 1 thread each": (CORES, {}),
    f"{CORES} ranks, OMP_NUM_THREADS={CORES} around them": (CORES, {"OMP_NUM_THREADS": str(CORES)}),
}
"""Ranks, and what the environment says."""


class Moment(NamedTuple):
    """A run at one moment: threads on or waiting for a core, of ranks and their loaders, and what was used so far."""

    ranks: int
    loaders: int
    cpu_sec: float
    steps: int


class Turn(NamedTuple):
    """One run."""

    images_per_sec: float
    cpu_ms_per_image: float
    moments: list[Moment]
    openmp: set[str]


def write_images(folder: Path, side: int, count: int) -> str:
    """JPEGs with detail at every scale, packed; returns their pattern."""
    rng = np.random.default_rng(0)
    named = []
    for number in range(count):
        image = np.zeros((side, side, 3))
        for cells in (4, 8, 16):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((side, side))
            image += np.asarray(coarse) / 3
        content = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(content, "JPEG", quality=90)
        named.append((f"p{number:04d}", content.getvalue(), "jpg", number % 10))
    write_shards(named, f"{folder}/images", 64)
    return f"{folder}/images-*.tar"


def status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def running(pid: int) -> int:
    """Threads of a process that are on a core or wait for one."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return 0
    states = []
    for thread in threads:
        try:
            states.append(Path(f"/proc/{pid}/task/{thread}/stat").read_bytes().rpartition(b")")[2].split()[0])
        except OSError:
            continue
    return states.count(b"R")


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def openmp_of(pid: int) -> set[str]:
    """The OpenMP runtimes that a process has loaded: two would have a pool of threads each."""
    try:
        mapped = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return set(re.findall(r"/\S*(?:gomp|iomp5|libomp)\S*", mapped))


def followed(
    command: list[str], depth: int, environment: dict[str, str], metrics: Path
) -> Iterator[tuple[Moment, int]]:
    """Run a command; yields what is seen of it, with the process id of a rank, until it ends well.

    depth: of the ranks below the process that is started.
    """
    settings = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.Popen(command, env={**settings, **environment}, stdout=sys.stderr)
    while process.poll() is None:
        ranks = [process.pid]
        for _ in range(depth):
            ranks = [child for pid in ranks for child in children(pid)]
        loaders = [child for pid in ranks for child in children(pid)]
        used = [status(pid) for pid in (*ranks, *loaders)]
        cpu_sec = sum((int(fields[11]) + int(fields[12])) / TICK for fields in used if fields)
        steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        yield Moment(sum(map(running, ranks)), sum(map(running, loaders)), cpu_sec, steps), (ranks or [0])[0]
        time.sleep(PERIOD_SEC)
    assert process.returncode == 0, command


def command_of(ranks: int, module: str, arguments: list[str]) -> list[str]:
    torchrun = ["swinv2_train.monitoring.torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return [sys.executable, "-m", *(torchrun if ranks > 1 else []), module, *arguments]


def turn(
    model: str,
    shards: str,
    run_dir: Path,
    steps: int,
    way: str,
    evaluation: tuple[str, ...] = ("data.eval_shards=null",),
) -> Turn:
    """Train so many steps one way, and see how."""
    ranks, environment = WAYS[way]
    _, batch, overrides = MODELS[model]
    arguments = [
        *overrides, *COMMON, f"run_dir={run_dir}", f"data.shards={shards}", f"train.max_steps={steps}",
        f"train.global_batch_size={batch}", f"train.micro_batch_size={batch // ranks}", *evaluation,
    ]  # fmt: skip
    moments, openmp = [], set()
    command = command_of(ranks, "swinv2_train.train", arguments)
    for moment, rank in followed(command, int(ranks > 1), environment, run_dir / "metrics.jsonl"):
        if FIRST <= moment.steps < steps:
            openmp = openmp or openmp_of(rank)
            moments.append(moment)
    logged = [line["perf/images_per_sec"] for line in read_metrics(run_dir) if line.get("perf/images_per_sec")]
    first, last = (next(each for each in moments if each.steps == count) for count in (FIRST, steps - 1))
    cpu_ms = 1000 * (last.cpu_sec - first.cpu_sec) / ((last.steps - first.steps) * batch)
    return Turn(statistics.median(logged[FIRST:]), cpu_ms, moments, openmp)


def threads_text(moments: list[Moment]) -> str:
    """Cells of a table: threads of ranks at once, mean and most; with loaders; how often more than there are cores."""
    ranks, everything = [each.ranks for each in moments], [each.ranks + each.loaders for each in moments]
    over = [100 * statistics.mean(count > CORES for count in counts) for counts in (ranks, everything)]
    return (
        f"{statistics.mean(ranks):.2f} | {max(ranks)} | {over[0]:.1f} % | {statistics.mean(everything):.2f} | "
        f"{max(everything)} | {over[1]:.1f} %"
    )


THREADS = "threads of ranks at once, mean | most | more than cores | with loaders, mean | most | more than cores"


def compare(models: list[str], rounds: int, steps: int, folder: Path) -> None:
    """Print a table: every way in turn, so many times."""
    print(f"| model | way | images/s (median) | of all turns | CPU ms/image | {THREADS} |\n{'|---' * 11}|")
    openmp: set[str] = set()
    for model in models:
        side, batch, _ = MODELS[model]
        (folder / model).mkdir()
        shards = write_images(folder / model, side, max(256, 2 * batch))
        turns: dict[str, list[Turn]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                run_dir = folder / model / f"{len(turns[way])}_{list(WAYS).index(way)}"
                turns[way].append(turn(model, shards, run_dir, steps, way))
        for way, found in turns.items():
            rates = [each.images_per_sec for each in found]
            cpu = statistics.median(each.cpu_ms_per_image for each in found)
            moments = [moment for each in found for moment in each.moments]
            print(
                f"| {model}, {batch} images of {side} px | {way} | {statistics.median(rates):.4g} | "
                f"{min(rates):.4g} - {max(rates):.4g} | {cpu:.3g} | {threads_text(moments)} |",
                flush=True,
            )
            openmp |= {name for each in found for name in each.openmp}
    print(f"\nOpenMP in a rank: {', '.join(sorted(Path(name).name for name in openmp)) or 'none'}")


def commands(folder: Path) -> None:
    """Print a table: the threads of what works on images besides training."""
    side, batch, overrides = MODELS["demo"]
    shards = write_images(folder, side, 2048)
    evaluating = (f"data.eval_shards={shards}", "train.eval_every_steps=2")
    print(f"| what runs | ranks | {THREADS} |\n{'|---' * 8}|")
    for number, (way, (ranks, environment)) in enumerate(list(WAYS.items())[:2]):
        run_dir = folder / f"run_{number}"
        found = turn("demo", shards, run_dir, 10, way, evaluating)
        print(f"| training with a validation every second step | {ranks} | {threads_text(found.moments)} |", flush=True)
        for name, arguments in (
            ("evaluate", [f"run_dir={run_dir}", f"out={folder}/scores_{number}"]),
            ("predict", [f"run_dir={run_dir}", f"images={shards}", f"out={folder}/answers_{number}.csv"]),
        ):
            command = command_of(ranks, f"swinv2_train.{name}", arguments)
            moments = [each for each, _ in followed(command, int(ranks > 1), environment, run_dir / "none")]
            print(f"| {name} | {ranks} | {threads_text(moments)} |", flush=True)


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--commands", action="store_true", help="validation, evaluate and predict instead")
    options = parser.parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{CORES} cores, {processor()} ({capability}), torch {torch.__version__}; load before: {load}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.commands:
            commands(Path(folder))
        else:
            compare(options.models, options.rounds, options.steps, Path(folder))


if __name__ == "__main__":
    main()
