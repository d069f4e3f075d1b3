"""The training loop: one step is visible, and so is what happens between two steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swinv2_train.checkpoint import Save, load_checkpoint
from swinv2_train.config import Config, averaged_score
from swinv2_train.data.loading.loader import EvalLoader, TrainLoader
from swinv2_train.data.loading.pipe_loader import StreamLoader
from swinv2_train.distributed import World, all_reduce_sum, any_rank, raise_together
from swinv2_train.engine import Engine, NonFiniteError
from swinv2_train.evaluation.probe import Probe
from swinv2_train.evaluation.scoring import Batch, evaluate, together
from swinv2_train.monitoring.metrics import (
    BadSteps,
    LossWatch,
    Means,
    Throughput,
    device_peak_flops,
    each_rank,
    mfu,
    peak_memory_gib,
    ranks_where,
)
from swinv2_train.monitoring.profiling import BACKWARD, CHECKPOINT, DATA, EVALUATION, FORWARD, OPTIMIZER, Trace, label
from swinv2_train.monitoring.run_log import RunLog
from swinv2_train.monitoring.step_records import Records, StepRecord
from swinv2_train.monitoring.stragglers import Lag, OwnTime, slowest
from swinv2_train.monitoring.watchdog import DATA_WAIT, FIRST_STEP, Pulse
from swinv2_train.runtime import StopRequest
from swinv2_train.tasks.task import Task
from swinv2_train.training.garbage_collection import Garbage
from swinv2_train.training.lr_schedule import lr_at
from swinv2_train.training.prefetch import FAILED, STOP, Feed


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
    pulse: Pulse = field(default_factory=Pulse)
    """What this rank does, for those who look from outside."""
    lag: Lag = field(default_factory=Lag)
    """Whether the ranks wait for the same one again and again."""
    trace: Trace | None = None
    """What runtime.profile asks for."""
    garbage: Garbage = field(default_factory=lambda: Garbage(None))
    """When Python collects it."""
    probe: Probe | None = None
    """What probe.methods asks for."""


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
    bad_steps = BadSteps()
    own = OwnTime(run.world.device)
    tell_start(run)

    @contextmanager
    def waiting_for_data() -> Iterator[None]:
        with run.pulse.doing(DATA_WAIT), speed.waiting_for_data(), own.apart(), label(DATA):
            yield

    def open_feed() -> Feed:
        return Feed(iter(run.train_loader), run.accumulation_steps, run.world.device, stop, run.pulse, waiting_for_data)

    feed = open_feed()
    while run.step < run.total_steps:
        trace_step(run, speed)
        state, micro_batches, copies, problem = feed.take()
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
            with own.measured(due(run.step + 1, train.log_every_steps)):
                shares = loss_shares(run, micro_batches)
                losses, grad_norm = take_step(run, copies, shares, lr, watch, feed)
        except BadStepError as bad:
            bad_steps.add(run.step + 1)
            if train.on_bad_step == "stop" or bad_steps.in_a_row > train.max_bad_steps:
                raise
            run.log.say(f"warning: {bad}; train.on_bad_step={train.on_bad_step}")
            if train.on_bad_step == "rollback":
                records.close()
                with run.pulse.doing("going back"):
                    go_back(run, bad)
                records, feed = open_records(run), open_feed()
                continue
        run.step += 1
        run.images_seen += train.global_batch_size
        speed.step_done()
        run.pulse.step_done(run.step)
        for batch in micro_batches:
            run.uncounted_bad_images += batch["num_bad"]
        records.write(run.step, micro_batches)

        last = run.step == run.total_steps
        if losses is None:
            run.log.metrics(run.step, run.images_seen, {"train/skipped_steps": bad_steps.skipped})
        elif due(run.step, train.log_every_steps) or last or run.step == 1:
            log_step(run, losses.read() | {"train/lr": lr, "train/grad_norm": grad_norm}, speed.read(), own.read())
        else:
            run.log.progress(run.step, run.total_steps)
        if run.saving is not None and due(run.step, train.log_every_steps) and not any_rank(run.saving.under_way):
            finish_saving(run)
        with speed.paused():
            if due(run.step, train.picture_every_steps) or last:
                with run.pulse.doing("drawing"):
                    draw(run, micro_batches[-1])
            scores: dict[str, float] = {}
            if run.eval_loader is not None and (due(run.step, train.eval_every_steps) or last):
                with run.pulse.doing("evaluating"), label(EVALUATION):
                    scores = scores_of(run, run.eval_loader)
                log_scores(run, scores)
            if run.probe is not None and (due(run.step, config.probe.every_steps) or last):
                with run.pulse.doing("probing"), label(EVALUATION):
                    probed = run.probe.scores(partial(run.task.features, run.engine.evaluate), run.pulse.move)
                log_scores(run, probed)
                scores |= probed
            score = scores.get(train.keep_best) if train.keep_best else None
            if due(run.step, train.checkpoint_every_steps) or last or score is not None:
                save(run, score)
                feed.look_again()  # evaluation and save take their time, and now nothing would be left to save
        run.garbage.after_step(run.step)
    finish_saving(run)
    if run.trace is not None and (written := run.trace.close()):
        run.log.say(f"trace: {written}")
    records.close()
    run.train_loader.close()
    if run.eval_loader is not None:
        run.eval_loader.close()
    return run.step == run.total_steps


class BadStepError(RuntimeError):
    """A step's loss or gradient is not finite, or its loss jumped.  On every rank; the weights are as they were."""


def take_step(
    run: Run, copies: Iterable[Batch], shares: list[float], lr: float, watch: LossWatch, feed: Feed
) -> tuple[Means, float]:
    """Forward, backward and the optimizer's step; returns the losses and the gradient norm before clipping.

    copies: micro-batches on the device; shares: what each counts.  The feed prepares the next step meanwhile.
    The device is waited for once, for the gradient norm (engine/deepspeed/grad_norm.py).
    Raises BadStepError on every rank, and nothing has moved.
    """
    losses, problem = Means(), None
    for number, (batch, share) in enumerate(zip(copies, shares, strict=True), start=1):
        with label(FORWARD):
            loss = run.task.loss(run.engine.forward, batch)
        losses.add({"train/loss": loss}, weight=share)
        if watch.factor is not None and number == len(shares):
            mean = losses.read()["train/loss"]
            losses.add({"train/loss": torch.tensor(mean, dtype=torch.float64)})
            problem = watch.problem(mean)
            if problem is not None:
                loss = loss * math.nan  # no engine takes a step that is not finite, so these gradients are dropped
        with label(BACKWARD):
            run.engine.backward(loss * share)
        run.pulse.move()
    if run.step + 1 < run.total_steps:
        feed.prepare()
    log_stall(run)
    try:
        with label(OPTIMIZER):
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


def trace_step(run: Run, speed: Throughput) -> None:
    """A step begins: what runtime.profile asks for begins or ends with it, and counts for no step's time."""
    if run.trace is None:
        return
    with speed.paused():
        if written := run.trace.next_step(run.step + 1):
            run.log.say(f"trace: {written}")


def due(step: int, every: int | None) -> bool:
    """True after every so many steps."""
    return every is not None and step % every == 0


def log_step(run: Run, values: dict[str, float], speed: dict[str, float], own_sec: float) -> None:
    """One line of metrics: this step's loss over all ranks, the slowest rank's times and the fullest rank's memory.

    own_sec: what this rank took for the step without waiting for data or for other ranks; 0 = not measured.
    """
    mine = {"mem/peak_gib": peak_memory_gib(run.world.device), "data/wait_sec": speed.get("data/wait_sec", 0.0)}
    ranks = each_rank(mine | {"perf/own_step_sec": own_sec}, run.world)
    count_bad_images(run)
    values |= speed | {name: max(ranks[name]) for name in mine} | {"data/skipped_images": run.bad_images}
    if run.world.world_size > 1 and speed and own_sec:
        values |= name_slowest(run, ranks["perf/own_step_sec"], ranks["data/wait_sec"])
    images_per_sec = speed.get("perf/images_per_sec")
    utilisation = mfu(
        3 * 2 * run.task.multiply_adds,
        images_per_sec,
        device_peak_flops(run.world.device, run.config.engine.precision),
        run.world.world_size,
    )
    run.log.metrics(run.step, run.images_seen, values | {"perf/mfu": utilisation})
    run.log.progress(run.step, run.total_steps, values["train/loss"], images_per_sec)
    run.pulse.tell(
        images_seen=run.images_seen,
        loss=values["train/loss"],
        images_per_sec=images_per_sec,
        seconds_left=run.pulse.seconds_left(run.total_steps),
    )


def log_scores(run: Run, scores: dict[str, float]) -> None:
    """A line of metrics and one on the console."""
    run.log.metrics(run.step, run.images_seen, scores)
    run.log.say(f"step {run.step}: " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))


def name_slowest(run: Run, own_sec: list[float], data_wait_sec: list[float]) -> dict[str, float]:
    """The rank that the others wait for: in the metrics and the status, and on the console if it stays the same."""
    found = slowest(own_sec, data_wait_sec)
    run.pulse.tell(slowest_rank=found._asdict())
    if run.lag.add(found):
        run.log.say(f"step {run.step}: {found}")
    return {"perf/own_step_sec": found.own_sec, "perf/slowest_rank": found.rank}


def tell_start(run: Run) -> None:
    """The status of a run before its first step, which may compile."""
    run.pulse.step = run.step
    run.pulse.tell(
        total_steps=run.total_steps,
        images_seen=run.images_seen,
        checkpoint_step=run.saved_step if run.saved_step >= 0 else None,
    )
    run.pulse.turn_to(FIRST_STEP)


def moving(run: Run, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches; each is a sign that the run moves."""
    for batch in batches:
        run.pulse.move()
        yield batch


def count_bad_images(run: Run) -> None:
    """Add what all ranks met since the last count; SampleError on every rank when it is more than the data allow."""
    found = torch.tensor(float(run.uncounted_bad_images), device=run.world.device)
    run.bad_images += int(all_reduce_sum(found))
    run.uncounted_bad_images = 0
    run.train_loader.check_bad_images(run.bad_images, run.images_seen)


def scores_of(run: Run, loader: EvalLoader) -> dict[str, float]:
    """The scores of the weights and, with optim.ema_decay, those of their averages."""
    score = partial(run.task.scores, run.engine.evaluate)
    scores = evaluate(score, moving(run, loader))
    if run.config.optim.ema_decay is not None:
        with run.engine.averaged():
            averaged = evaluate(score, moving(run, loader))
        scores |= {averaged_score(name): value for name, value in averaged.items()}
    return scores


def draw(run: Run, batch: dict[str, Any]) -> None:
    """Write the task's picture of a few images: the evaluation's first ones, so that pictures compare over time."""
    picture = run.task.picture
    if picture is None:
        return
    if run.eval_loader is not None:
        batch = next(together(run.eval_loader))
    run.log.picture(run.config.task.name, run.step, picture(run.engine.evaluate, batch))


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
    with run.pulse.doing("saving"), label(CHECKPOINT):
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
        with run.pulse.doing("saving"):
            run.saving.wait_for_copy()
    stall_sec, run.stall_sec = run.stall_sec + time.perf_counter() - started, None
    run.log.metrics(run.step, run.images_seen, {"checkpoint/stall_sec": stall_sec})


def finish_saving(run: Run) -> None:
    """Wait for the checkpoint that is being written, if any; what went wrong with it is raised on every rank."""
    log_stall(run)
    if run.saving is not None:
        saving, run.saving = run.saving, None
        with run.pulse.doing("saving"), label(CHECKPOINT):
            saving.finish()
        run.saved_step = saving.step
        run.pulse.tell(checkpoint_step=run.saved_step)


def open_records(run: Run) -> Records:
    """The records that data.record_keys and data.on_bad_sample ask for, without steps that are run again."""
    data, run_dir = run.config.data, Path(run.config.run_dir)
    where = (run.world.rank, run.world.world_size, run.step)
    return Records(
        StepRecord(run_dir / "sample_keys", *where) if data.record_keys else None,
        StepRecord(run_dir / "bad_samples", *where) if data.on_bad_sample == "replace" else None,
    )
