"""Kill a run again and again, at random moments and in random ways, and compare what is left with a run left in peace.

    python scripts/chaos.py --kills 50 --seed 1

Every start of the disturbed run draws its number of ranks, ZeRO stage, micro-batch and loader workers anew; every kill
its moment and its kind: SIGKILL to all, SIGKILL to one rank, SIGTERM, or SIGINT twice.  After each the newest
checkpoint must be whole and not older than the one before.  At the end every step must have had the images that the
quiet run gave it, each once, and the losses must agree.  Prints a table in Markdown; exit code 0 when all held.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.data.shards.tar_reader import write_shards
from swinv2_train.monitoring.run_log import read_metrics

GLOBAL_BATCH = 24  # divides by 1, 2, 3 and 4 ranks
STEPS_PER_KILL = 60
KINDS = ("SIGKILL all", "SIGKILL one", "SIGTERM", "SIGINT twice")
MODEL = (
    "experiment=cifar10_simmim", "model.embed_dim=16", "model.depths=[1,1]", "model.num_heads=[1,2]", "optim.lr=1e-4",
    f"train.global_batch_size={GLOBAL_BATCH}", "train.log_every_steps=1", "train.checkpoint_every_steps=7",
    "train.picture_every_steps=100000", "data.record_keys=true", "data.eval_shards=null", "engine.precision=fp32",
    "log.wandb=disabled", "log.progress=none", "runtime.num_threads=1", "runtime.process_group_timeout_sec=60",
)  # fmt: skip


@dataclass
class Start:
    """One start of the disturbed run, and how it was ended."""

    ranks: int
    stage: int
    micro_batch: int
    workers: int
    background: bool
    """Checkpoints are written while training goes on."""
    kind: str
    after_sec: float
    before: int
    """Step of the newest checkpoint at the start."""
    reached: int = 0
    """The last step that was logged."""
    after: int = 0
    """Step of the newest checkpoint at the end."""
    problem: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-ranks", type=int, default=4)
    parser.add_argument("--dir", type=Path, help="where the runs go; default: a temporary folder, removed at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return campaign(arguments.dir or Path(temporary), arguments.kills, arguments.seed, arguments.max_ranks)


def campaign(folder: Path, kills: int, seed: int, max_ranks: int) -> int:
    """Both runs and the comparison; returns the exit code."""
    draw = random.Random(seed)
    total = STEPS_PER_KILL * kills
    common = (*MODEL, f"train.max_steps={total}", f"data.shards={make_shards(folder / 'shards')}")
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    starts: list[Start] = []
    startup_sec = run_to_the_end(quiet, common)
    for _ in range(kills):
        start = draw_start(draw, max_ranks, startup_sec, step_of(newest_checkpoint(disturbed)))
        starts.append(start)
        kill_once(start, disturbed, common)
        print(row(len(starts), start), flush=True)
        if start.after >= total:
            break
    run_to_the_end(disturbed, common)
    problems = [start.problem for start in starts if start.problem] + compare(quiet, disturbed, total)
    print(report(starts, seed, quiet, disturbed, problems))
    return 1 if problems else 0


def make_shards(folder: Path) -> str:
    """100 images in 10 shards: an epoch is a little over four steps, so that kills meet its border often."""
    rng = np.random.default_rng(0)

    def samples():
        for number in range(100):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            yield f"image_{number:03d}", buffer.getvalue(), "png", None

    write_shards(samples(), str(folder / "train"), 10)
    return f"{folder}/train-*.tar"


def draw_start(draw: random.Random, max_ranks: int, startup_sec: float, before: int) -> Start:
    ranks = draw.randint(1, max_ranks)
    per_rank = GLOBAL_BATCH // ranks
    return Start(
        ranks=ranks,
        stage=draw.randint(0, 3),
        micro_batch=draw.choice([size for size in range(1, per_rank + 1) if per_rank % size == 0 and size > 1]),
        workers=draw.choice((0, 0, 1)),
        background=draw.random() < 0.5,
        kind=draw.choice(KINDS),
        after_sec=draw.uniform(0.2, 2.0) * startup_sec,  # some before the first step
        before=before,
    )


def command(run_dir: Path, common: tuple[str, ...], start: Start) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(start.ranks)]
    own = (f"engine.zero_stage={start.stage}", f"train.micro_batch_size={start.micro_batch}")
    launcher = torchrun if start.ranks > 1 else []
    loader_and_saver = (f"data.num_workers={start.workers}", f"train.background_save={start.background}")
    return [
        sys.executable,
        *launcher,
        "-m",
        "swinv2_train.train",
        f"run_dir={run_dir}",
        *common,
        *own,
        *loader_and_saver,
    ]


def launch(run_dir: Path, common: tuple[str, ...], start: Start) -> subprocess.Popen[str]:
    log = (run_dir.parent / f"{run_dir.name}.log").open("a")
    return subprocess.Popen(
        command(run_dir, common, start), stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run_to_the_end(run_dir: Path, common: tuple[str, ...]) -> float:
    """An undisturbed start on 2 ranks; returns the seconds until its first step."""
    process = launch(run_dir, common, Start(2, 1, 12, 0, False, "", 0, 0))
    began, first = time.monotonic(), 0.0
    while process.poll() is None:
        time.sleep(0.2)
        if not first and last_step(run_dir):
            first = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"an undisturbed start failed; see {run_dir}.log")
    return first


def kill_once(start: Start, run_dir: Path, common: tuple[str, ...]) -> None:
    """Start the run, end it in the drawn way, and look at what is left."""
    process = launch(run_dir, common, start)
    deadline = time.monotonic() + start.after_sec
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        strike(process, start.kind)
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        start.problem = "hung for 120 s"
    start.reached = last_step(run_dir)
    start.after = step_of(newest_checkpoint(run_dir))
    if start.after < start.before:
        start.problem = f"checkpoint {start.before} was lost"
    if process.returncode == 2:
        start.problem = "refused (exit code 2)"


def strike(process: subprocess.Popen[str], kind: str) -> None:
    if kind.startswith("SIGKILL"):
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        ranks = [int(pid) for pid in children] or [process.pid]
        for pid in ranks if kind == "SIGKILL all" else ranks[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    elif kind == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)


def compare(quiet: Path, disturbed: Path, total: int) -> list[str]:
    """What differs between the two runs, in words."""
    problems = []
    planned, used = (images_of(run_dir) for run_dir in (quiet, disturbed))
    for step in range(1, total + 1):
        if used.get(step) != planned[step]:
            problems.append(f"step {step} had other images than planned")
    epochs = Counter(image for images in planned.values() for image in images.elements())
    if max(epochs.values()) - min(epochs.values()) > 1:
        problems.append("some images were used more often than others")
    if loss_difference(quiet, disturbed) > 1e-3:
        problems.append(f"losses differ by {loss_difference(quiet, disturbed):.2g}")
    return problems


def images_of(run_dir: Path) -> dict[int, Counter[str]]:
    """The images of every step, over all rank files: a step that another number of ranks took again counts once."""
    ranks_of_step: dict[int, dict[str, list[str]]] = {}
    for path in sorted((run_dir / "sample_keys").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            ranks_of_step.setdefault(entry["step"], {})[path.name] = entry["keys"]
    return {step: Counter(key for keys in ranks.values() for key in keys) for step, ranks in ranks_of_step.items()}


def loss_difference(quiet: Path, disturbed: Path) -> float:
    """Largest relative difference of a step's loss."""
    ours, theirs = (
        {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}
        for run_dir in (quiet, disturbed)
    )
    return max(abs(ours[step] - theirs.get(step, float("inf"))) / ours[step] for step in ours)


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))


def row(number: int, start: Start) -> str:
    verdict = start.problem or "ok"
    return (
        f"| {number} | {start.ranks} | {start.stage} | {start.micro_batch} | {start.workers} | {start.background} | "
        f"{start.kind} | "
        f"{start.after_sec:.1f} | {start.before} | {start.reached} | {start.after} | {verdict} |"
    )


def report(starts: list[Start], seed: int, quiet: Path, disturbed: Path, problems: list[str]) -> str:
    kinds = Counter(start.kind for start in starts)
    return "\n".join([
        "",
        f"seed {seed}; {len(starts)} kills ({', '.join(f'{kinds[kind]} x {kind}' for kind in KINDS)}), "
        f"{sum(start.reached <= start.before for start in starts)} of them before a new step; "
        f"{sum(start.problem == '' for start in starts)} survived",
        f"largest difference of a step's loss: {loss_difference(quiet, disturbed):.2g} (relative)",
        *(problems or ["every step had its planned images, each once"]),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
