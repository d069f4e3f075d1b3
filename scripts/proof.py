"""Does pre-training pay?  CIFAR-10 with 1 %, 10 % and 100 % of its labels, on two CPU cores in less than two hours.

    make proof                                  # or: python scripts/proof.py
    python scripts/proof.py --table             # nothing but the table and the picture of the runs that are there

SimMIM pre-trains one encoder per seed on all 50,000 training images, without labels (experiment=cifar10_proof_simmim).
From it, and from fresh weights, a classifier is trained on the labelled part for the same number of steps with the same
settings (experiment=cifar10_proof_finetune) and scored once, after its last step, on the 10,000 test images.  Each seed
has its own labelled images, weights, crops and order.  The frozen encoders are also judged by a k-NN vote and a linear
classifier, beside fresh ones of the same seeds.  What is complete is not run again; what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

import numpy as np

from scripts import fetch_cifar10
from swinv2_train.config.command_line import compose_overrides, guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from swinv2_train.data.packing import Entry, pack
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from swinv2_train.monitoring.console import duration_text
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.report.plots import new_figure, save_figure
from swinv2_train.runtime import environment_record

DATA = Path("data/cifar10")
IMAGES = 50_000
"""Images of the training set."""
SEEDS = (0, 1, 2)
STEPS = {1: 200, 10: 600, 100: 1000}
"""Percent of the labels -> supervised steps, the same from scratch and after pre-training."""
SIDE_BY_SIDE = 2
"""Runs at a time, of one thread each."""
SCRATCH, PRETRAINED = ARMS = "from scratch", "after SimMIM"
PROBES = {"k-NN": "probe/knn_top1", "linear": "probe/linear_top1"}


@dataclass(frozen=True)
class Job:
    """A command that leaves scores behind."""

    name: Path
    """Its run directory, or a name that has to do with it; NAME.log is what it says."""
    command: tuple[str, ...]
    """A module of the package, and its arguments."""
    result: Path
    """metrics.jsonl of a training run, evaluation.json of a probe."""
    needs: Path | None = None
    """The name of the job that must be complete before this one can start."""

    @property
    def final(self) -> dict[str, float] | None:
        """The scores after the last step; None while there are none."""
        if not self.result.exists():
            return None
        if self.result.suffix == ".json":
            content = json.loads(self.result.read_text())
            return {name: value for name, value in content.items() if name.startswith("probe/")}
        lines = read_metrics(self.result.parent)
        complete = lines and (self.result.parent / "report.html").exists()
        return lines[-1] if complete and lines[-1].get("val/loss") is not None else None


def training(run_dir: Path, experiment: str, seed: int, *overrides: str, needs: Path | None = None) -> Job:
    """A run on one thread."""
    common = ("log.wandb=disabled", "log.progress=lines", "runtime.num_threads=1")
    command = ("train", f"experiment={experiment}", f"run_dir={run_dir}", f"seed={seed}", *overrides, *common)
    return Job(run_dir, command, run_dir / "metrics.jsonl", needs)


def jobs(runs: Path) -> dict[tuple[str, int, int], Job]:
    """(what, percent of the labels, seed) -> job; encoders, which see no labels, and their probes have 0 percent."""
    found = {}
    for seed in SEEDS:
        encoder = runs / f"pretrain_seed{seed}"
        still = ("train.max_steps=1", "optim.lr=0", "optim.schedule.warmup_lr=0", "optim.schedule.min_lr=0")
        found[PRETRAINED, 0, seed] = training(encoder, "cifar10_proof_simmim", seed)
        found[SCRATCH, 0, seed] = training(runs / f"untrained_seed{seed}", "cifar10_proof_simmim", seed, *still)
    for percent, steps in STEPS.items():
        for seed in SEEDS:
            shards = f"data.shards='{subset_prefix(runs, percent, seed)}-*.tar'"
            for arm, needs in ((SCRATCH, None), (PRETRAINED, found[PRETRAINED, 0, seed].name)):
                run_dir = runs / f"{arm.split()[-1].lower()}_{percent:03d}_seed{seed}"
                start = f"task.init_from={'null' if needs is None else needs}"
                found[arm, percent, seed] = training(
                    run_dir, "cifar10_proof_finetune", seed, shards, start, f"train.max_steps={steps}", needs=needs
                )
    for arm in ARMS:
        for seed in SEEDS:
            encoder = found[arm, 0, seed].name
            out = encoder.with_name(f"probe_{encoder.name}")
            command = (
                "evaluate",
                f"run_dir={encoder}",
                f"out={out}",
                "probe.methods=[knn,linear]",
                "runtime.num_threads=1",
            )
            found[f"probe {arm}", 0, seed] = Job(out, command, out / "evaluation.json", encoder)
    return found


def subset_prefix(runs: Path, percent: int, seed: int) -> Path:
    """Where the labelled images of a seed are packed."""
    return DATA / "train" if percent == 100 else runs / "data" / f"labels_{percent:03d}_seed{seed}" / "train"


def pack_subset(runs: Path, percent: int, seed: int) -> None:
    """Pack as many images of every class as the percent says; a seed's 1 % are among its 10 %."""
    prefix = subset_prefix(runs, percent, seed)
    if percent == 100 or (prefix.parent / "manifest.json").exists():
        return
    manifest = open_manifest(f"{DATA}/train-*.tar", "data.shards")
    reader = TarReader(manifest, max_open=4)
    samples = [reader.read(shard, index) for shard, count in enumerate(manifest.counts) for index in range(count)]
    labels = np.array([sample.targets.get("label") for sample in samples])
    generator = np.random.default_rng(seed)
    entries = []
    for label in np.unique(labels):
        of_class = generator.permutation(np.flatnonzero(labels == label))
        for number in of_class[: round(len(of_class) * percent / 100)]:
            sample = samples[number]
            entries.append(
                Entry(sample.key, sample.extension, sample.targets.get("label"), lambda image=sample.image: image)
            )
    pack(entries, str(prefix), samples_per_shard=len(entries), seed=seed)


def run_all(todo: Sequence[Job]) -> bool:
    """Run what is not complete, SIDE_BY_SIDE at a time; False after the first run that fails, when the others ended."""
    waiting = [job for job in todo if job.final is None]
    started = time.monotonic()
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failed: Job | None = None
    try:
        while (waiting and failed is None) or running:
            for job in list(running):
                code = running[job].poll()
                if code is None:
                    continue
                del running[job]
                ended = duration_text(time.monotonic() - started)
                if code == EXIT_DONE and job.final is not None:
                    print(f"{ended}: {job.name}: {_scores(job.final)}", flush=True)
                else:
                    failed = job
                    print(f"{ended}: {job.name} ended with {code}; see {_log_path(job)}", flush=True)
            busy = {job.name for job in (*running, *waiting)}
            for job in [job for job in waiting if job.needs not in busy]:
                if failed is None and len(running) < SIDE_BY_SIDE:
                    waiting.remove(job)
                    running[job] = _start(job)
            time.sleep(0.5)
    finally:
        for process in running.values():  # Ctrl-C: each saves and leaves, and the next call goes on
            process.terminate()
        for process in running.values():
            process.wait()
    return failed is None


def _start(job: Job) -> subprocess.Popen[bytes]:
    path = _log_path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        command = [sys.executable, "-m", f"swinv2_train.{job.command[0]}", *job.command[1:]]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _log_path(job: Job) -> Path:
    return job.name.with_name(job.name.name + ".log")


def _scores(final: dict[str, float]) -> str:
    return "  ".join(f"{name} {final[name]:.4g}" for name in sorted(final) if name.startswith(("val/", "probe/")))


# --------------------------------------------------------------------------------------------------------------------
# What came out


@dataclass(frozen=True)
class Cell:
    """Top-1 in percent, by seed."""

    top1: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds."""
        return statistics.stdev(self.top1)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.spread:.2f}"


def cells(all_jobs: dict[tuple[str, int, int], Job]) -> dict[tuple[str, Any], Cell] | None:
    """(arm, percent or name of a probe) -> scores; None while a job is missing."""
    found: dict[tuple[str, Any], Cell] = {}
    for arm in ARMS:
        for what, percent, score in (
            *((percent, percent, "val/top1") for percent in STEPS),
            *((name, 0, score) for name, score in PROBES.items()),
        ):
            finals = [all_jobs[arm if percent else f"probe {arm}", percent, seed].final for seed in SEEDS]
            if None in finals:
                return None
            found[arm, what] = Cell(tuple(final[score] for final in finals if final is not None))
    return found


def verdict(scratch: Cell, pretrained: Cell) -> str:
    """In words: does pre-training gain more than the seeds spread?"""
    gain = pretrained.mean - scratch.mean
    spread = max(scratch.spread, pretrained.spread)
    if abs(gain) <= spread:
        return "no difference beyond the spread"
    return "pre-training wins" if gain > 0 else "pre-training loses"


def table(found: dict[tuple[str, Any], Cell]) -> Iterator[str]:
    """Markdown rows."""
    yield f"| labels | images | supervised steps | {SCRATCH} | {PRETRAINED} | gain | each seed's gain | |"
    yield "|---|---|---|---|---|---|---|---|"
    for what in (*STEPS, *PROBES):
        scratch, pretrained = found[SCRATCH, what], found[PRETRAINED, what]
        gains = [after - before for before, after in zip(scratch.top1, pretrained.top1, strict=True)]
        begin = f"{what} of the frozen encoder | | "
        if what in STEPS:
            begin = f"{what} % | {IMAGES * what // 100:,} | {STEPS[what]:,}"
        yield (
            f"| {begin} | {scratch} | {pretrained} | {pretrained.mean - scratch.mean:+.2f} "
            f"| {', '.join(f'{gain:+.2f}' for gain in gains)} | {verdict(scratch, pretrained)} |"
        )


def draw(found: dict[tuple[str, Any], Cell], path: Path) -> None:
    """Top-1 over the share of the labels: a dot for each seed, a line through the means, PNG."""
    figure = new_figure(7.2, 4)
    axes = figure.subplots()
    for arm, colour in ((PRETRAINED, "#2563c9"), (SCRATCH, "#d9730d")):
        axes.plot([found[arm, percent].mean for percent in STEPS], color=colour, linewidth=2, label=arm)
        for place, percent in enumerate(STEPS):
            scores = found[arm, percent].top1
            axes.plot([place] * len(scores), scores, "o", color=colour, fillstyle="none")
    axes.set_xticks(range(len(STEPS)), [f"{percent} % labels\n{steps:,} steps" for percent, steps in STEPS.items()])
    axes.set_title("CIFAR-10 test top-1 in percent, dots: seeds")
    axes.grid(axis="y", color="#dddddd")
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


def write_results(all_jobs: dict[tuple[str, int, int], Job], found: dict[tuple[str, Any], Cell], path: Path) -> None:
    """PATH.md, the table with what it is of; PATH.png; PATH.json with every run."""
    environment = environment_record(1)
    versions = {name: environment["versions"][name] for name in ("python", "torch", "deepspeed")}
    rows = [
        {"what": what, "percent": percent, "seed": seed, **(job.final or {})}
        for (what, percent, seed), job in all_jobs.items()
    ]
    facts = {"cpu": environment["cpu"], "versions": versions, "steps": STEPS, "runs": rows}
    pretraining = compose_overrides(list(all_jobs[PRETRAINED, 0, SEEDS[0]].command[1:]))
    supervised = compose_overrides(list(all_jobs[SCRATCH, 100, SEEDS[0]].command[1:]))
    parts = [
        f"# Does pre-training pay?  CIFAR-10 with {', '.join(f'{percent} %' for percent in STEPS)} of its labels",
        "    make proof        # or: python scripts/proof.py",
        f"Test top-1 in percent, mean ± sample standard deviation over {len(SEEDS)} seeds; each has its own labelled "
        "images, weights, crops and order, and an encoder of its own. Both arms take the same supervised steps of "
        f"{supervised.train.global_batch_size} images with the same settings (experiment=cifar10_proof_finetune, lr "
        f"{supervised.optim.lr:g}); SimMIM saw all {IMAGES:,} training images {pretraining.train.epochs:g} times "
        "without labels before (experiment=cifar10_proof_simmim). So the pre-trained arm has had more computing, and "
        "no more labels. The last rows score frozen encoders with the labels of all training images: a k-NN vote (20 "
        "neighbours) and a linear classifier, on a fresh encoder beside the pre-trained one.",
        "\n".join(table(found)),
        f"![top-1 over the share of the labels]({path.name}.png)",
        f"A difference counts where it is more than the larger of the two spreads. {environment['cpu']}, one thread a "
        "run; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".json").write_text(json.dumps(facts, indent=1) + "\n")
    path.with_name(path.name + ".md").write_text("\n\n".join(parts) + "\n")
    draw(found, path.with_name(path.name + ".png"))
    print("\n".join(table(found)))
    print(f"\n{path}.md, .png, .json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the proof; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/proof"), help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, help="default: benchmarks/proof_cpu_YYYYMM, without ending")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which a shell's background jobs ignore
    all_jobs = jobs(options.runs)
    if not options.table:
        exit_code = fetch_cifar10.run(["--out", str(DATA)])
        if exit_code != EXIT_DONE:
            return exit_code
        for percent in STEPS:
            for seed in SEEDS:
                pack_subset(options.runs, percent, seed)
        if not run_all(list(all_jobs.values())):
            return EXIT_FAILED
    found = cells(all_jobs)
    if found is None:
        print("not every run is complete: make proof", file=sys.stderr)
        return EXIT_FAILED
    write_results(all_jobs, found, options.results or Path(f"benchmarks/proof_cpu_{datetime.date.today():%Y%m}"))
    return EXIT_DONE


if __name__ == "__main__":
    try:
        sys.exit(guarded(main))
    except KeyboardInterrupt:
        print("stopped; make proof goes on from here", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
