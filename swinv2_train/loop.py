"""The training loop: one step is visible, and so is what happens between two steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from swinv2_train.checkpoint import save_checkpoint
from swinv2_train.config import Config, ConfigError
from swinv2_train.data.loader import EvalLoader, TrainLoader
from swinv2_train.distributed import World, all_reduce_sum, any_rank, highest, raise_together
from swinv2_train.engine import Engine, NonFiniteError
from swinv2_train.log import RunLog
from swinv2_train.metrics import Means, Throughput, device_peak_flops, max_over_ranks, mfu, peak_memory_gib, ranks_where
from swinv2_train.runtime import StopRequest, replace_text
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
    train_loader: TrainLoader
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


def fit(run: Run, stop: StopRequest) -> bool:
    """Train from run.step to run.total_steps, log, evaluate and save on the way.

    Returns True when the run is complete, False when it stopped on request; a complete checkpoint exists either way and
    the loaders are closed.  Raises NonFiniteError on all ranks, with the weights as they were, when a step's gradients
    are not finite.
    """
    config, train = run.config, run.config.train
    speed = Throughput(train.global_batch_size)
    keys = KeyRecord(Path(config.run_dir), run) if config.data.record_keys else None
    batches = iter(run.train_loader)
    num_bad = 0  # damaged samples of this rank since this start
    while run.step < run.total_steps:
        with speed.waiting_for_data():
            micro_batches, problem = fetch(batches, run.accumulation_steps)
        state = highest(FAILED if problem else STOP if stop.requested else GO)  # the same on every rank
        if state == FAILED:
            raise_together(problem)
        if state == STOP:
            if run.saved_step != run.step:
                save(run, None)
            break
        lr = lr_at(run.step, run.total_steps, config.optim.schedule, run.warmup_steps, config.optim.lr)
        losses = Means()
        step_keys: list[str] = []
        for batch, share in zip(micro_batches, loss_shares(run, micro_batches), strict=True):
            loss = run.task.loss(run.engine.forward, batch)
            run.engine.backward(loss * share)
            losses.add({"train/loss": loss}, weight=share)
            num_bad += batch["num_bad"]
            step_keys += batch["keys"]
        try:
            grad_norm = run.engine.step(lr)
        except NonFiniteError as error:
            ranks = ranks_where(not bool(torch.isfinite(loss)), run.world)
            raise NonFiniteError(
                f"step {run.step + 1} was not taken: {error}; the last loss was not finite on ranks {ranks or 'none'}; "
                f"the newest checkpoint is of step {run.saved_step}"
            ) from error
        run.step += 1
        run.images_seen += train.global_batch_size
        speed.step_done()
        if keys is not None:
            keys.write(run.step, step_keys)

        last = run.step == run.total_steps
        if due(run.step, train.log_every_steps) or last or run.step == 1:
            values = losses.read() | {"train/lr": lr, "train/grad_norm": grad_norm}
            log_step(run, values, speed.read(), num_bad)
        else:
            run.log.progress(run.step, run.total_steps)
        with speed.paused():
            if due(run.step, train.picture_every_steps) or last:
                draw(run, batch)
            scores: dict[str, float] = {}
            if run.eval_loader is not None and (due(run.step, train.eval_every_steps) or last):
                scores = evaluate(partial(run.task.scores, run.engine.evaluate), run.eval_loader)
                run.log.metrics(run.step, run.images_seen, scores)
                run.log.say(f"step {run.step}: " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            score = scores.get(train.keep_best) if train.keep_best else None
            if due(run.step, train.checkpoint_every_steps) or last or score is not None:
                save(run, score)
    run.train_loader.close()
    if run.eval_loader is not None:
        run.eval_loader.close()
    return run.step == run.total_steps


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


def log_step(run: Run, values: dict[str, float], speed: dict[str, float], num_bad: int) -> None:
    """One line of metrics: this step's loss over all ranks, the slowest rank's times and the fullest rank's memory."""
    slowest = max_over_ranks(
        {"mem/peak_gib": peak_memory_gib(run.world.device), "data/wait_sec": speed.get("data/wait_sec", 0.0)}, run.world
    )
    skipped = float(all_reduce_sum(torch.tensor(float(num_bad), device=run.world.device)))
    values |= speed | slowest | {"data/skipped_images": skipped}
    images_per_sec = speed.get("perf/images_per_sec")
    utilisation = mfu(
        3 * 2 * run.task.multiply_adds,
        images_per_sec,
        device_peak_flops(run.world.device, run.config.engine.precision),
        run.world.world_size,
    )
    run.log.metrics(run.step, run.images_seen, values | {"perf/mfu": utilisation})
    run.log.progress(run.step, run.total_steps, values["train/loss"], images_per_sec)


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
    state = {
        "step": run.step,
        "images_seen": run.images_seen,
        "data": run.train_loader.state_dict(run.images_seen),
    }
    best = (train.keep_best, score) if train.keep_best is not None and score is not None else None
    started = time.perf_counter()
    save_checkpoint(Path(run.config.run_dir), run.engine, state, run.world, train.keep_checkpoints, best)
    run.log.metrics(run.step, run.images_seen, {"checkpoint/stall_sec": time.perf_counter() - started})
    run.saved_step = run.step


class KeyRecord:
    """RUN_DIR/sample_keys/: one JSONL file per rank, {"step": int, "keys": [str, ...]} per step, flushed each line.

    Opening it drops the lines of steps that are run again, so every step stands there once.
    """

    def __init__(self, run_dir: Path, run: Run) -> None:
        path = run_dir / "sample_keys" / f"rank_{run.world.rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= run.step]
        replace_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, keys: list[str]) -> None:
        self._file.write(json.dumps({"step": step, "keys": keys}) + "\n")
        self._file.flush()


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file that end in a newline: a killed process may have torn the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
