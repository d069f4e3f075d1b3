"""Kill runs again and again, at random moments, with another batch each time, and look at what is left.

    python scripts/chaos.py --kills 200 --kinds SIGKILL

Every case is a source of images (packed shards, a folder, shards over HTTP from a server that answers 503 now and
then, a pipe) and a task.  Every start of a case draws its number of ranks, ZeRO stage, global batch, micro-batch,
loader workers and way of saving anew; every end its moment and its kind: SIGKILL to all ranks or to one, SIGTERM,
SIGINT twice.  After each, the newest checkpoint must be whole and not older than the one before.  In the end every step
must stand in the records once, with the images that the order plans for its place, so that each image is used once in
every epoch; the learning rate must be the function of the images seen; and the run must end where its epochs do.  What
a pipe prints has no order: there the steps and their number of images must fit.  With --batch N the batch stays the
same, and losses are compared with a run that nobody disturbs.  Prints a table in Markdown; exit code 0 when all held.

Ranks are forks of this process, which has imported everything, without a launcher: a start costs a second.
"""

# ruff: noqa: E402  (imports after the environment that they read)
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAME_AS_TESTS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
if __name__ == "__main__":  # before torch is imported, in which forks must find no pool of threads
    os.environ.update(SAME_AS_TESTS)
    sys.path.insert(0, str(ROOT))

import numpy as np

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config import EXIT_USER_ERROR
from swinv2_train.config.command_line import load_run_config
from swinv2_train.data.loading.order import GlobalOrder
from swinv2_train.data.objects import Mask, Objects, objects_to_json
from swinv2_train.data.sample import OBJECTS, SEGMENTATION
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.training.lr_schedule import Reached, lr_at, run_length
from tests.support.commands import finish, start_ranks
from tests.support.images import encoded
from tests.support.shard_server import ShardServer, serve

NUM_IMAGES, NUM_SHARDS, NUM_CLASSES = 96, 8, 4
MOST_STEPS, LATE_STEPS, MOST_RANKS, MOST_PASSES = 12, 10, 3, 3
MICRO_BATCHES = (2, 4)
LARGEST_BATCH = MOST_RANKS * MOST_PASSES * max(MICRO_BATCHES)
SOURCES, TASKS = ("shards", "folder", "http", "pipe"), ("simmim", "finetune", "segment", "detect")
KINDS = ("SIGKILL all", "SIGKILL one", "SIGTERM", "SIGINT twice")
LOSS_RTOL = 1e-3  # measured worst 1.7e-5 over 3,000 steps on other ranks and stages
ABSENT = "did not come within"
"""What ranks say of one that is killed before it meets them."""
MEETING_SEC, ENDING_SEC = 40, 120
MODEL = (
    "model.embed_dim=16", "model.depths=[1,1]", "model.num_heads=[1,2]", "optim.lr=1e-4", "train.log_every_steps=1",
    "train.picture_every_steps=100000", "train.eval_every_steps=null", "train.keep_best=null", "data.record_keys=true",
    "data.eval_shards=null", "engine.precision=fp32", "log.wandb=disabled", "log.progress=none",
    "runtime.num_threads=1", f"runtime.process_group_timeout_sec={MEETING_SEC}",
)  # fmt: skip
TASK_KEYS = {
    "simmim": ("experiment=cifar10_simmim",),
    "finetune": ("experiment=cifar10_finetune", "task.init_from=null", f"task.num_classes={NUM_CLASSES}"),
    "segment": (
        "task=segment", "model=demo", "data=cifar10", f"task.num_classes={NUM_CLASSES}", "task.reduce_zero_label=false",
        "task.head_channels=16", "task.aux_channels=8", "task.resize_long_px=32", "task.resize_short_px=32",
        "optim.schedule.warmup_steps=null",
    ),
    "detect": (
        "task=detect", "model=demo", "data=cifar10", f"task.num_classes={NUM_CLASSES}", "task.head=cascade_mask_rcnn",
        "task.max_objects=4", "task.head_channels=8", "task.head_width=16", "task.level_proposals=60",
        "task.proposals=40", "task.box_samples=16", "task.mask_samples=4", "optim.schedule.warmup_steps=null",
    ),
}  # fmt: skip


@dataclass
class Start:
    """One start of a run, and how it was ended."""

    ranks: int
    stage: int
    micro_batch: int
    batch: int
    workers: int
    background: bool
    """Checkpoints are written while training goes on."""
    save_every: int
    kind: str
    steps: int
    """New steps after which it is struck; 0 = at a moment of its start."""
    before: int = 0
    """Step of the newest checkpoint at the start."""
    reached: int = 0
    """The last step that was logged."""
    after: int = 0
    """Step of the newest checkpoint at the end."""
    problem: str = ""


@dataclass
class Case:
    """A run on one source and task."""

    source: str
    task: str
    folder: Path
    epochs: int
    max_steps: int
    """The length of a pipe's run, whose images cannot be counted beforehand."""
    starts: list[Start] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / f"{self.task}_{self.source}"

    def overrides(self, pattern: str) -> tuple[str, ...]:
        """All that its starts share."""
        length = (f"train.epochs={self.epochs}", "optim.schedule.warmup_epochs=1")
        if self.source == "pipe":
            length = (f"train.max_steps={self.max_steps}", "optim.schedule.warmup_steps=8")
        cache = (f"data.cache_dir={self.folder / 'cache'}", "data.fetch_give_up_sec=60")
        objects = ("data.annotations=../objects.json",) if (self.task, self.source) == ("detect", "folder") else ()
        return (*TASK_KEYS[self.task], *MODEL, *length, *cache, *objects, f"data.shards='{pattern}'")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="over all cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only the kinds that begin so: SIGKILL, say")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--batch", type=int, help="one global batch for all starts, and losses compared (24, say)")
    parser.add_argument("--dir", type=Path, help="where the runs go; default: a temporary folder, removed at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return campaign(folder.resolve(), options)


def campaign(folder: Path, options: argparse.Namespace) -> int:
    """Every case, its kills and its end; returns the exit code."""
    import deepspeed  # noqa: F401  imported once here, then in every fork

    pack(folder)
    names = [(source, task) for source in options.sources for task in options.tasks]
    kills = [options.kills // len(names) + (i < options.kills % len(names)) for i in range(len(names))]
    print("| case | kill | ranks | stage | micro-batch | batch | workers | background | how | after steps | before | "
          "reached | after | verdict |\n|" + "---|" * 14)  # fmt: skip
    draw, cases = random.Random(options.seed), []
    with serve(folder / "shards") as server:
        for (source, task), count in zip(names, kills, strict=True):
            kinds = [kind for kind in KINDS if kind.startswith(options.kinds)]
            starts = [draw_start(draw, kinds, options.batch) for _ in range(count)]
            steps = sum(start.steps + LATE_STEPS for start in starts)
            most = sum((start.steps + LATE_STEPS) * start.batch for start in starts)  # so that none comes to the end
            case = Case(source, task, folder, most // NUM_IMAGES + 2, steps + 1)
            cases.append(case)
            run_case(case, starts, draw, server, options)
    print(report(cases, options.seed))
    return 1 if any(case.problems for case in cases) else 0


def run_case(
    case: Case, starts: list[Start], draw: random.Random, server: ShardServer, options: argparse.Namespace
) -> None:
    """Disturb a run as often as asked, let it end, and look at its records."""
    pattern = {
        "shards": f"{case.folder}/shards/train-*.tar",
        "folder": images_of_task(case),
        "http": f"{server.url}/train-{{000000..{NUM_SHARDS - 1:06d}}}.tar",
        "pipe": f"pipe:cat {case.folder}/shards/train-{{000000..{NUM_SHARDS - 1:06d}}}.tar",
    }[case.source]
    common = case.overrides(pattern)
    for start in starts:
        start.before = step_of(newest_checkpoint(case.run_dir))
        disturb_server(draw, server, case)
        kill_once(start, case.run_dir, common, draw)
        case.starts.append(start)
        print(row(case, start), flush=True)
    last = Start(1, 1, max(MICRO_BATCHES), options.batch or LARGEST_BATCH, 0, False, 1000, "", 0)
    case.problems += [start.problem for start in case.starts if start.problem]
    case.problems += to_the_end(last, case.run_dir, common) or wrong_records(case)
    if options.batch and not case.problems and case.source != "pipe":
        quiet = case.run_dir.with_name(f"{case.run_dir.name}_quiet")
        case.problems += to_the_end(last, quiet, common) or wrong_losses(quiet, case.run_dir)


def images_of_task(case: Case) -> str:
    """The folder source: in a folder with label images, class folders are none."""
    return f"{case.folder}/{'pairs' if case.task == 'segment' else 'images'}"


def pack(folder: Path) -> None:
    """The same images, each with the classes of its pixels and two objects or none, as shards and as pairs, and as
    files in class folders with the objects beside them.
    """
    rng = np.random.default_rng(0)
    images = [encoded(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(NUM_IMAGES)]
    classes = [encoded(rng.integers(0, NUM_CLASSES, (32, 32), dtype=np.uint8)) for _ in range(NUM_IMAGES)]
    rows = [
        (f"image_{i:03d}", image, "png", i % NUM_CLASSES, pixels)
        for i, (image, pixels) in enumerate(zip(images, classes, strict=True))
    ]
    objects = [objects_of(number) for number in range(NUM_IMAGES)]
    packed = [
        (*row[:4], {SEGMENTATION: row[4], OBJECTS: objects_to_json(each)})
        for row, each in zip(rows, objects, strict=True)
    ]
    write_annotations(folder / "objects.json", [f"class_{row[3]}/{row[0]}.{row[2]}" for row in rows], objects)
    write_shards(packed, str(folder / "shards" / "train"), NUM_IMAGES // NUM_SHARDS)
    for name, image, ending, label, pixels in rows:
        for kind in ("images", "pairs"):
            path = folder / kind / f"class_{label}" / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        path.with_suffix(".seg.png").write_bytes(pixels)


def objects_of(number: int) -> Objects:
    """Two boxes with masks in an image of 32 x 32; none in every fifth."""
    rng = np.random.default_rng(number)
    corners = rng.integers(0, 16, (2 if number % 5 else 0, 2))
    boxes = np.concatenate([corners, corners + rng.integers(8, 16, corners.shape)], axis=1).astype(np.float32)
    outlines = [np.array([[x0, y0], [x1, y0], [x1, y1]], float) for x0, y0, x1, y1 in boxes.tolist()]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).astype(np.float64) / 2
    classes, masks = rng.integers(0, NUM_CLASSES, len(boxes)), tuple(Mask(polygons=(each,)) for each in outlines)
    return Objects((32, 32), number, boxes, classes, np.zeros(len(boxes), bool), area, masks)


def write_annotations(path: Path, names: list[str], objects: list[Objects]) -> None:
    """As COCO does."""
    images = [{"id": i, "file_name": name, "height": 32, "width": 32} for i, name in enumerate(names)]
    rows: list[dict[str, Any]] = []
    for number, each in enumerate(objects):
        for box, label, mask in zip(each.boxes.tolist(), each.classes.tolist(), each.masks, strict=True):
            assert mask is not None, "every object has one"
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            polygons = [polygon.ravel().tolist() for polygon in mask.polygons]
            rows.append({"id": len(rows), "image_id": number, "category_id": label, "bbox": sides, "iscrowd": 0,
                         "area": sides[2] * sides[3] / 2, "segmentation": polygons})  # fmt: skip
    categories = [{"id": number, "name": f"kind {number}"} for number in range(NUM_CLASSES)]
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))


def draw_start(draw: random.Random, kinds: list[str], batch: int | None) -> Start:
    ranks, micro_batch = draw.choice((1, 1, 2, 2, MOST_RANKS)), draw.choice(MICRO_BATCHES)
    return Start(
        ranks=ranks,
        stage=draw.randint(0, 3),
        micro_batch=micro_batch,
        batch=batch or ranks * micro_batch * draw.randint(1, MOST_PASSES),
        workers=draw.choice((0, 0, 1)),
        background=draw.random() < 0.5,
        save_every=draw.randint(2, 7),
        kind=draw.choice(kinds),
        steps=draw.choice((0, *range(1, MOST_STEPS + 1))),
    )


def disturb_server(draw: random.Random, server: ShardServer, case: Case) -> None:
    """Some shards are busy when they are asked for next, and sometimes all must be fetched again."""
    if case.source == "http":
        if draw.random() < 0.3:
            shutil.rmtree(case.folder / "cache", ignore_errors=True)
        for number in draw.sample(range(NUM_SHARDS), 3):
            server.faults[f"train-{number:06d}.tar"] = [503] * draw.randint(1, 2)


def launch(run_dir: Path, common: tuple[str, ...], start: Start) -> list[Any]:
    return start_ranks(
        f"run_dir={run_dir}", *common, f"engine.zero_stage={start.stage}",
        f"train.micro_batch_size={start.micro_batch}", f"train.global_batch_size={start.batch}",
        f"data.num_workers={start.workers}", f"train.background_save={start.background}",
        f"train.checkpoint_every_steps={start.save_every}", ranks=start.ranks,
    )  # fmt: skip


def kill_once(start: Start, run_dir: Path, common: tuple[str, ...], draw: random.Random) -> None:
    """Start the run, end it in the drawn way, and look at what is left."""
    processes = launch(run_dir, common, start)
    wanted, began = start.before + start.steps, time.monotonic()
    at_sec = draw.uniform(0, 1.2) if start.steps == 0 else 120.0
    while all(each.poll() is None for each in processes) and time.monotonic() - began < at_sec:
        if start.steps and wanted <= last_step(run_dir) and changed_since(run_dir, began):
            break
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.05))  # anywhere within a step or a save
    if start.steps and any(each.poll() is not None for each in processes):
        start.problem = "ended by itself"
    for each in processes[-1:] if start.kind == "SIGKILL one" else processes:
        for number in {"SIGTERM": ["SIGTERM"], "SIGINT twice": ["SIGINT", "SIGINT"]}.get(start.kind, ["SIGKILL"]):
            each.send_signal(getattr(signal, number))
    said = ""
    for each in processes:
        try:
            code, output = finish(each, timeout_sec=ENDING_SEC)
        except subprocess.TimeoutExpired:
            start.problem = start.problem or f"did not end within {ENDING_SEC} s, and was killed"
            continue
        said += output
        if code == EXIT_USER_ERROR and ABSENT not in output:
            start.problem = start.problem or "refused (exit code 2)"
    start.reached, start.after = last_step(run_dir), step_of(newest_checkpoint(run_dir))
    if start.after < start.before:
        start.problem = f"checkpoint {start.before} was lost"
    if start.problem:
        start.problem += f": {said[-600:]}"


def changed_since(run_dir: Path, began: float) -> bool:
    """Whether this start has logged; before it has, the steps in the file are those of the one before."""
    age = time.time() - (run_dir / "metrics.jsonl").stat().st_mtime
    return age < time.monotonic() - began


def to_the_end(start: Start, run_dir: Path, common: tuple[str, ...]) -> list[str]:
    """What goes wrong with a start that nobody disturbs."""
    ended = [finish(each, timeout_sec=900) for each in launch(run_dir, common, start)]
    return [f"{run_dir.name} ended with {code}: {output[-600:]}" for code, output in ended if code]


def planned_keys(case: Case) -> Iterator[str]:
    """The images in the order of the stream, without end."""
    config = load_run_config(case.run_dir)
    source = open_source(images_of_task(case) if case.source == "folder" else f"{case.folder}/shards/train-*.tar")
    order = GlobalOrder(source.counts, config.seed, config.data.lanes, config.data.window_shards)
    reader = source.open_reader()
    position = 0
    while True:
        _, shard, index = order.locate(position)
        yield reader.key(shard, index)
        position += 1


def wrong_records(case: Case) -> list[str]:
    """What the records of a finished run say that should not be."""
    problems, planned = [], planned_keys(case)
    lines = [json.loads(line) for line in (case.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    if [line["step"] for line in steps] != list(range(1, len(steps) + 1)):
        problems.append("steps are missing from metrics.jsonl, or stand there twice")
    used = images_of(case.run_dir)
    seen, total, begun = 0, Counter(), Reached(0, 0, steps[0]["images_seen"], steps[0]["images_seen"])
    config = load_run_config(case.run_dir)
    length = run_length(config.train, config.optim.schedule, NUM_IMAGES, begun)
    for line in steps:
        images = line["images_seen"] - seen
        ours = used.get(line["step"], [])
        if len(ours) != images:
            problems.append(f"step {line['step']} has {len(ours)} images in the records and {images} in metrics.jsonl")
        curve_step = length.curve_step(line["step"] - 1, seen)
        rate = lr_at(curve_step, length.curve_steps, config.optim.schedule, length.warmup_steps, config.optim.lr)
        if line["train/lr"] != rate:
            problems.append(f"step {line['step']} has lr {line['train/lr']}, not {rate}")
        if case.source != "pipe" and Counter(ours) != Counter(next(planned) for _ in range(images)):
            problems.append(f"step {line['step']} had other images than planned")
        seen, total = line["images_seen"], total + Counter(ours)
    if case.source != "pipe":
        last = seen - (steps[-2]["images_seen"] if len(steps) > 1 else 0)
        if not 0 <= seen - case.epochs * NUM_IMAGES < last:
            problems.append(f"{seen} images were seen instead of {case.epochs} epochs of {NUM_IMAGES}")
        if max(total.values()) - min(total.values()) > 1 or len(total) != NUM_IMAGES:
            problems.append("some images were used more often than others")
    elif len(steps) != config.train.max_steps:
        problems.append(f"{len(steps)} steps instead of {config.train.max_steps}")
    return problems


def images_of(run_dir: Path) -> dict[int, list[str]]:
    """The images of every step, of all ranks; a step that stands in the records twice has too many."""
    found: dict[int, list[str]] = {}
    for path in sorted((run_dir / "sample_keys").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], []).extend(entry["keys"])
    return found


def wrong_losses(quiet: Path, disturbed: Path) -> list[str]:
    """Where the losses of two runs of the same batch differ by more than the order of their sums explains."""
    ours, theirs = (
        {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}
        for run_dir in (quiet, disturbed)
    )
    worst = max(abs(ours[step] - theirs.get(step, float("inf"))) / ours[step] for step in ours)
    print(f"\n{disturbed.name}: largest difference of a step's loss {worst:.2g} (relative)\n")
    return [f"losses differ by {worst:.2g}"] if worst > LOSS_RTOL else []


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))


def row(case: Case, start: Start) -> str:
    """A line of the table."""
    values = (
        f"{case.task} {case.source}", len(case.starts), start.ranks, start.stage, start.micro_batch, start.batch,
        start.workers, start.background, start.kind, start.steps, start.before, start.reached, start.after,
        start.problem or "ok",
    )  # fmt: skip
    return f"| {' | '.join(map(str, values))} |"


def report(cases: list[Case], seed: int) -> str:
    """The verdict on all cases."""
    starts = [start for case in cases for start in case.starts]
    kinds, batches = Counter(start.kind for start in starts), sorted({start.batch for start in starts})
    problems = [f"{case.task} {case.source}: {problem}" for case in cases for problem in case.problems[:5]]
    return "\n".join([
        "",
        f"seed {seed}; {len(starts)} kills ({', '.join(f'{kinds[kind]} x {kind}' for kind in KINDS if kinds[kind])}), "
        f"{sum(start.reached <= start.before for start in starts)} of them before a new step, with global batches "
        f"{', '.join(map(str, batches))}; {sum(start.problem == '' for start in starts)} survived",
        *(problems or ["every step had its planned images, each once; nothing was lost"]),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
