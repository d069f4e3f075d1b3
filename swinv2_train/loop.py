"""The training loop: one step is visible, and so is what happens between two steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from swinv2_train.checkpoint import Save, load_checkpoint
from swinv2_train.config import Config, ConfigError
from swinv2_train.data.loader import EvalLoader, TrainLoader
from swinv2_train.data.stream import StreamLoader
from swinv2_train.distributed import World, all_reduce_sum, any_rank, highest, raise_together
from swinv2_train.engine import Engine, NonFiniteError
from swinv2_train.log import RunLog
from swinv2_train.metrics import (
    LossWatch,
    Means,
    Throughput,
    device_peak_flops,
    max_over_ranks,
    mfu,
    peak_memory_gib,
    ranks_where,
)
from swinv2_train.records import StepRecord
from swinv2_train.runtime import StopRequest
from swinv2_train.schedule import lr_at
from swinv2_train.tasks import Task

Score = Callable[[dict[str, Any]], dict[str, torch.Tensor]]
"""From a batch to means over it, weighted by batch["weight"]."""


@dataclass
class Run:
    """Everything that one training run works with."""

    config: Config
    world: World
    task: Task
    engine: Engine
    train_loader: TrainLoader | StreamLoader
    eval_loader: EvalLoader | None
    log: RunLog
    accumulation_steps: int
    total_steps: int
    warmup_steps: int
    step: int
    """Completed optimizer steps."""
    images_seen: int
    """Images of all completed steps, over all ranks."""
    saved_step: int
    """Step of the newest complete checkpoint; -1 when there is none."""
    saving: Save | None = None
    """A checkpoint that is being written in the background."""
    stall_sec: float | None = None
    """How long the last save has held training up so far; None when that is logged."""
    bad_images: int = 0
    """Damaged samples of the run over all ranks and starts, when they were last counted."""
    uncounted_bad_images: int = 0
    """Those of this rank since then."""


def fit(run: Run, stop: StopRequest) -> bool:
    """Train from run.step to run.total_steps, log, evaluate and save on the way.

    Returns True when the run is complete, False when it stopped on request; a complete checkpoint exists either way and
    the loaders are closed.  Raises BadStepError on all ranks, with the weights as they were, for a step that must not
    be taken and that train.on_bad_step does not get over.
    """
    config, train = run.config, run.config.train
    speed = Throughput(train.global_batch_size)
    watch = LossWatch(train.loss_spike_factor)
    records = open_records(run)
    batches = iter(run.train_loader)
    bad_steps = BadSteps()
    while run.step < run.total_steps:
        with speed.waiting_for_data():
            micro_batches, problem = fetch(batches, run.accumulation_steps)
        state = highest(FAILED if problem else STOP if stop.requested else GO)  # the same on every rank
        if state == FAILED:
            raise_together(problem)
        if state == STOP:
            finish_saving(run)
            if run.saved_step != run.step:
                save(run, None)
            break
        lr = lr_at(run.step, run.total_steps, config.optim.schedule, run.warmup_steps, config.optim.lr)
        losses: Means | None = None
        try:
            losses, grad_norm = take_step(run, micro_batches, lr, watch)
        except BadStepError as bad:
            bad_steps.add(run.step + 1)
            if train.on_bad_step == "stop" or bad_steps.in_a_row > train.max_bad_steps:
                raise
            run.log.say(f"warning: {bad}; train.on_bad_step={train.on_bad_step}")
            if train.on_bad_step == "rollback":
                records.close()
                go_back(run, bad)
                records, batches = open_records(run), iter(run.train_loader)
                continue
        run.step += 1
        run.images_seen += train.global_batch_size
        speed.step_done()
        for batch in micro_batches:
            run.uncounted_bad_images += batch["num_bad"]
        records.write(run.step, micro_batches)

        last = run.step == run.total_steps
        if losses is None:
            run.log.metrics(run.step, run.images_seen, {"train/skipped_steps": bad_steps.skipped})
        elif due(run.step, train.log_every_steps) or last or run.step == 1:
            log_step(run, losses.read() | {"train/lr": lr, "train/grad_norm": grad_norm}, speed.read())
        else:
            run.log.progress(run.step, run.total_steps)
        if run.saving is not None and due(run.step, train.log_every_steps) and not any_rank(run.saving.under_way):
            finish_saving(run)
        with speed.paused():
            if due(run.step, train.picture_every_steps) or last:
                draw(run, micro_batches[-1])
            scores: dict[str, float] = {}
            if run.eval_loader is not None and (due(run.step, train.eval_every_steps) or last):
                scores = evaluate(partial(run.task.scores, run.engine.evaluate), run.eval_loader)
                run.log.metrics(run.step, run.images_seen, scores)
                run.log.say(f"step {run.step}: " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            score = scores.get(train.keep_best) if train.keep_best else None
            if due(run.step, train.checkpoint_every_steps) or last or score is not None:
                save(run, score)
    finish_saving(run)
    records.close()
    run.train_loader.close()
    if run.eval_loader is not None:
        run.eval_loader.close()
    return run.step == run.total_steps


class BadStepError(RuntimeError):
    """A step's loss or gradient is not finite, or its loss jumped.  On every rank; the weights are as they were."""


def take_step(run: Run, micro_batches: list[dict[str, Any]], lr: float, watch: LossWatch) -> tuple[Means, float]:
    """Forward, backward and the optimizer's step; returns the losses and the gradient norm before clipping.

    Raises BadStepError on every rank, and nothing has moved.
    """
    losses, problem = Means(), None
    for number, (batch, share) in enumerate(zip(micro_batches, loss_shares(run, micro_batches), strict=True), start=1):
        loss = run.task.loss(run.engine.forward, batch)
        losses.add({"train/loss": loss}, weight=share)
        if watch.factor is not None and number == len(micro_batches):
            mean = losses.read()["train/loss"]
            losses.add({"train/loss": torch.tensor(mean, dtype=torch.float64)})
            problem = watch.problem(mean)
            if problem is not None:
                loss = loss * math.nan  # no engine takes a step that is not finite, so these gradients are dropped
        run.engine.backward(loss * share)
    log_stall(run)
    try:
        grad_norm = run.engine.step(lr)
    except NonFiniteError as error:
        ranks = ranks_where(not bool(torch.isfinite(loss)), run.world)
        cause = problem or f"{error}; the last loss was not finite on ranks {ranks or 'none'}"
        newest = (
            "there is no checkpoint" if run.saved_step < 0 else f"the newest checkpoint is of step {run.saved_step}"
        )
        raise BadStepError(f"step {run.step + 1} was not taken: {cause}; {newest}") from error
    if watch.factor is not None:
        watch.add(mean)
    return losses, grad_norm


class BadSteps:
    """How many steps could not be taken: in a row, and at all."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.skipped = 0
        self._last = 0

    def add(self, step: int) -> None:
        """A step that was bad again, or the one after it, continues the row; any later one begins a new row."""
        self.in_a_row = self.in_a_row + 1 if step <= self._last + 1 else 1
        self.skipped += 1
        self._last = step


def go_back(run: Run, problem: BadStepError) -> None:
    """Put the run back to its newest checkpoint, with a loader that begins there."""
    finish_saving(run)
    if run.saved_step < 0:
        raise problem
    checkpoint = Path(run.config.run_dir) / "checkpoints" / f"step_{run.saved_step:08d}"
    state = load_checkpoint(checkpoint, run.engine, run.world, run.config.seed)
    run.step, run.images_seen = state["step"], state["images_seen"]
    run.train_loader = run.train_loader.restarted(run.images_seen)
    run.train_loader.check_state(state["data"])
    run.bad_images, run.uncounted_bad_images = run.train_loader.bad_images_before, 0
    run.log.resume_at(run.step)
    run.log.say(f"back at {checkpoint}")


GO, STOP, FAILED = 0, 1, 2


def fetch(batches: Iterator[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], ConfigError | None]:
    """The next batches (fewer at the end), or what is wrong with this rank's data, for all ranks to hear together."""
    try:
        return list(islice(batches, count)), None
    except ConfigError as error:
        return [], error


def loss_shares(run: Run, micro_batches: list[dict[str, Any]]) -> list[float]:
    """What this rank's micro-batches count in the step's loss; the mean over ranks and micro-batches is 1.

    The engine takes the mean over ranks and micro-batches.  train.loss_mean=local leaves it at that (the official
    code); with global every image or hidden pixel of the global batch counts the same, for one small collective a step.
    """
    even = [1.0] * len(micro_batches)
    if run.config.train.loss_mean == "local":
        return even
    counts = torch.tensor([run.task.count(batch) for batch in micro_batches], dtype=torch.float64)
    mean = all_reduce_sum(counts.sum()) / (run.world.world_size * len(micro_batches))
    return (counts / mean).tolist() if mean > 0 else even  # where nothing counts every loss is 0 anyway


def due(step: int, every: int | None) -> bool:
    """True after every so many steps."""
    return every is not None and step % every == 0


def log_step(run: Run, values: dict[str, float], speed: dict[str, float]) -> None:
    """One line of metrics: this step's loss over all ranks, the slowest rank's times and the fullest rank's memory."""
    slowest = max_over_ranks(
        {"mem/peak_gib": peak_memory_gib(run.world.device), "data/wait_sec": speed.get("data/wait_sec", 0.0)}, run.world
    )
    count_bad_images(run)
    values |= speed | slowest | {"data/skipped_images": run.bad_images}
    images_per_sec = speed.get("perf/images_per_sec")
    utilisation = mfu(
        3 * 2 * run.task.multiply_adds,
        images_per_sec,
        device_peak_flops(run.world.device, run.config.engine.precision),
        run.world.world_size,
    )
    run.log.metrics(run.step, run.images_seen, values | {"perf/mfu": utilisation})
    run.log.progress(run.step, run.total_steps, values["train/loss"], images_per_sec)


def count_bad_images(run: Run) -> None:
    """Add what all ranks met since the last count; SampleError on every rank when it is more than the data allow."""
    found = torch.tensor(float(run.uncounted_bad_images), device=run.world.device)
    run.bad_images += int(all_reduce_sum(found))
    run.uncounted_bad_images = 0
    run.train_loader.check_bad_images(run.bad_images, run.images_seen)


def evaluate(score: Score, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The means of a score over one pass of an evaluation loader, over all ranks; every sample counts once."""
    means = Means()
    remaining = iter(batches)
    while True:
        found, problem = fetch(remaining, 1)
        if any_rank(problem is not None):
            raise_together(problem)
        if not found:  # on all ranks at once: they have equally many batches
            return means.read()
        means.add(score(found[0]), weight=found[0]["weight"].sum())


def draw(run: Run, batch: dict[str, Any]) -> None:
    """Write the task's picture of a few images: the evaluation's first ones, so that pictures compare over time."""
    if not run.task.has_picture:
        return
    if run.eval_loader is not None:
        batch = next(iter(run.eval_loader))
    picture = run.task.picture(run.engine.evaluate, batch)
    run.log.picture(run.config.task.name, run.step, picture)


def save(run: Run, score: float | None) -> None:
    """Write a checkpoint of this step; score is this step's value of train.keep_best, where it was measured."""
    train = run.config.train
    count_bad_images(run)
    state = {
        "step": run.step,
        "images_seen": run.images_seen,
        "data": run.train_loader.state_dict(run.images_seen, run.bad_images),
    }
    best = (train.keep_best, score) if train.keep_best is not None and score is not None else None
    finish_saving(run)
    started = time.perf_counter()
    run_dir, background = Path(run.config.run_dir), train.background_save
    run.saving = Save(run_dir, run.engine, state, run.world, train.keep_checkpoints, best, background)
    if not background:
        finish_saving(run)
    run.stall_sec = time.perf_counter() - started
    if not background:
        log_stall(run)


def log_stall(run: Run) -> None:
    """Log how long the last save held training up, and wait for what is left of its copy: the optimizer moves next."""
    if run.stall_sec is None:
        return
    started = time.perf_counter()
    if run.saving is not None:
        run.saving.wait_for_copy()
    stall_sec, run.stall_sec = run.stall_sec + time.perf_counter() - started, None
    run.log.metrics(run.step, run.images_seen, {"checkpoint/stall_sec": stall_sec})


def finish_saving(run: Run) -> None:
    """Wait for the checkpoint that is being written, if any; what went wrong with it is raised on every rank."""
    log_stall(run)
    if run.saving is not None:
        saving, run.saving = run.saving, None
        saving.finish()
        run.saved_step = saving.step


class Records:
    """What every rank writes down about its samples: RUN_DIR/sample_keys/ and RUN_DIR/bad_samples/."""

    def __init__(self, keys: StepRecord | None, bad_samples: StepRecord | None) -> None:
        self.keys = keys
        self.bad_samples = bad_samples

    def write(self, step: int, micro_batches: list[dict[str, Any]]) -> None:
        """The keys of a step, and the damaged samples among them."""
        if self.keys is not None:
            self.keys.write(step, keys=[key for batch in micro_batches for key in batch["keys"]])
        if self.bad_samples is not None:
            for batch in micro_batches:
                for problem in batch.get("problems", ()):
                    self.bad_samples.write(step, **problem)

    def close(self) -> None:
        """Nothing more is written."""
        for record in (self.keys, self.bad_samples):
            if record is not None:
                record.close()


def open_records(run: Run) -> Records:
    """The records that data.record_keys and data.on_bad_sample ask for, without steps that are run again."""
    data, run_dir = run.config.data, Path(run.config.run_dir)
    where = (run.world.rank, run.world.world_size, run.step)
    return Records(
        StepRecord(run_dir / "sample_keys", *where) if data.record_keys else None,
        StepRecord(run_dir / "bad_samples", *where) if data.on_bad_sample == "replace" else None,
    )
