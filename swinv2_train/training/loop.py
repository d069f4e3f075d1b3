"""The training loop: one step is visible, and so is what happens between two steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from swinv2_train.config import Config, averaged_score
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.distributed import World, all_reduce_sum, on_main
from swinv2_train.distributed.front import Front
from swinv2_train.engine import Engine, NonFiniteError
from swinv2_train.evaluation.probe import Probe
from swinv2_train.evaluation.scoring import Batch, StoppedError, evaluate_loader, in_lockstep
from swinv2_train.models.kernels import failures
from swinv2_train.monitoring.metrics import BadSteps, LossWatch, Means, ranks_where
from swinv2_train.monitoring.profiling import BACKWARD, EVALUATION, FORWARD, OPTIMIZER, label
from swinv2_train.runtime import StopRequest, keep_random_state
from swinv2_train.tasks.task import Task
from swinv2_train.training.attention_paths import AttentionPaths
from swinv2_train.training.bad_step import keep_bad_step
from swinv2_train.training.lr_schedule import RunLength, lr_at
from swinv2_train.training.monitor import Monitor, Outcome, is_due
from swinv2_train.training.position import Position
from swinv2_train.training.prefetch import STOP, StepPrefetcher
from swinv2_train.training.saver import Saver


@dataclass(frozen=True)
class Run:
    """The wiring of a training run: what works together from its first step to its last."""

    config: Config
    world: World
    task: Task
    attention: AttentionPaths
    engine: Engine
    position: Position
    saver: Saver
    monitor: Monitor
    eval_loader: EvalLoader | None
    probe: Probe | None
    """What probe.methods asks for."""
    accumulation_steps: int
    length: RunLength


def fit(run: Run, stop: StopRequest) -> bool:
    """Train from the run's position to run.length.last_step, log, evaluate and save on the way; train.patience ends it
    earlier.

    Returns True when the run is complete, False when it stopped on request; a complete checkpoint exists either way and
    the loaders are closed.  A stop within a step drops the step's work, and one within an evaluation drops the scores,
    which the next start makes up for.  Raises BadStepError on all ranks, with the weights as they were, for a step that
    must not be taken and that train.on_bad_step does not get over.
    """
    train, optim, position, saver, monitor = run.config.train, run.config.optim, run.position, run.saver, run.monitor
    watch, bad_steps, length = LossWatch(train.loss_spike_factor), BadSteps(), run.length
    monitor.start(saver.saved_step)
    prefetcher, front = open_prefetcher(run, stop), Front()
    stopped = not make_up_for_scores(run, stop)
    if position.step == 0 and run.probe is not None and run.config.probe.before_first_step and not stopped:
        probe_encoder(run, run.probe)
    while not stopped and position.step < length.last_step and not position.is_out_of_patience:
        monitor.step_begins()
        ready = prefetcher.take()
        if ready.state == STOP:
            stopped = True
            break
        curve_step = length.curve_step(position.step, position.images_seen)
        lr = lr_at(curve_step, length.curve_steps, optim.schedule, length.warmup_steps, optim.lr)
        outcome: Outcome | None = None
        before = keep_random_state(run.world.device)
        try:
            with monitor.own_time():
                shares, copies = loss_shares(run, ready.micro_batches), ready.copies
                while (outcome := take_step(run, copies, shares, lr, watch, prefetcher, front, stop)) is None:
                    before()
                    copies = prefetcher.copies(ready.micro_batches)
        except StoppedError:
            before()
            stopped = True
            break
        except BadStepError as bad:
            first = saver if bad_steps.skipped == 0 else None  # a state may be large, and the first tells most
            kept = keep_bad_step(
                Path(run.config.run_dir), str(bad), ready.micro_batches, position, run.world, first, before
            )
            monitor.log.say(kept)
            get_over(run, bad, bad_steps)
            if train.on_bad_step == "rollback":
                prefetcher = open_prefetcher(run, stop)
                continue
        position.advance(ready.micro_batches)
        monitor.step_done(ready.micro_batches, outcome, bad_steps.skipped)
        if is_due(position.step, train.log_every_steps):
            saver.poll()
        with monitor.between_steps():
            last = position.step == length.last_step
            if is_due(position.step, train.picture_every_steps) or last:
                save_picture(run, ready.micro_batches[-1])
            try:
                scores = measure(run, last, stop)
            except StoppedError:
                monitor.scores_are_due(True)
                stopped = True
                break
            score = scores.get(train.keep_best) if train.keep_best else None
            if position.patience is not None:
                position.patience.add(scores)
            if is_due(position.step, train.checkpoint_every_steps) or last or score is not None:
                saver.save(score)
                prefetcher.recheck_stop()  # evaluation and save take their time, and now nothing would be left to save
        monitor.manual_gc.after_step(position.step)
    if stopped:
        saver.save_if_new()
    elif position.is_out_of_patience:
        monitor.log.say(f"step {position.step}: the run ends by {position.patience}")
    saver.finish()
    monitor.close()
    close_loaders(run)
    return not stopped and (position.step == length.last_step or position.is_out_of_patience)


class BadStepError(RuntimeError):
    """A step's loss or gradient is not finite, or its loss jumped.  On every rank; the weights are as they were."""


def open_prefetcher(run: Run, stop: StopRequest) -> StepPrefetcher:
    """The steps from the run's position on."""
    return StepPrefetcher(
        iter(run.position.loader), run.accumulation_steps, run.world.device, stop, run.monitor.activity,
        run.monitor.waiting_for_data,
    )  # fmt: skip


def take_step(
    run: Run,
    copies: Iterable[Batch],
    shares: list[float],
    lr: float,
    watch: LossWatch,
    prefetcher: StepPrefetcher,
    front: Front,
    stop: StopRequest,
) -> Outcome | None:
    """Forward, backward and the optimizer's step.

    copies: micro-batches on the device; shares: what each counts.  The prefetcher prepares the next step meanwhile.
    The device is waited for once, for the gradient norm (engine/deepspeed/grad_norm.py).
    Returns None on every rank where an attention kernel failed on any: nothing has moved, no rank uses it any more, and
    the same step is to be taken again.
    Raises BadStepError on every rank, and nothing has moved.  Of several micro-batches, StoppedError before one of them
    where any rank is to stop; the engine may then only be saved.
    """
    losses, problem = Means(), None
    for number, (batch, share) in enumerate(zip(copies, shares, strict=True), start=1):
        if len(shares) > 1 and not front.may_begin(stop.requested is not None):
            raise StoppedError
        with label(FORWARD):
            loss = run.task.loss(run.engine.forward, batch)
        losses.add({"train/loss": loss}, weight=share)
        add_source_losses(losses, batch, run.position.source_names)
        if watch.factor is not None and number == len(shares):
            means = losses.read()
            mean = means["train/loss"]
            for name, value in means.items():
                known = name == "train/loss" or not math.isnan(value)  # a source without images in this step has none
                losses.add({name: torch.tensor(value, dtype=torch.float64)}, weight=float(known))
            problem = watch.problem(mean)
            if problem is not None:
                loss = loss * math.nan  # no engine takes a step that is not finite, so these gradients are dropped
        if failures.pending():
            loss = loss * math.nan  # as above; the other ranks learn of it when no engine takes the step
        with label(BACKWARD):
            run.engine.backward(loss * share)
        run.monitor.micro_batch_done(number, len(shares))
    if run.position.step + 1 < run.length.last_step:
        prefetcher.prepare()
    run.saver.wait_for_copy()
    try:
        with label(OPTIMIZER):
            grad_norm = run.engine.step(lr)
    except NonFiniteError as error:
        if run.attention.fell_back():
            return None
        ranks = ranks_where(not bool(torch.isfinite(loss)), run.world)
        cause = problem or f"{error}; the last loss was not finite on ranks {ranks or 'none'}"
        saved = run.saver.saved_step
        newest = "there is no checkpoint" if saved is None else f"the newest checkpoint is of step {saved}"
        raise BadStepError(f"step {run.position.step + 1} was not taken: {cause}; {newest}") from error
    if watch.factor is not None:
        watch.add(mean)
    return Outcome(losses, grad_norm, lr)


def add_source_losses(losses: Means, batch: Batch, names: tuple[str, ...]) -> None:
    """Each source's mean loss over its images of a batch, as mix/NAME/loss, where there are several."""
    if "image_losses" not in batch:
        return
    each, counts = batch["image_losses"]
    sources = batch["sources"].to(counts.device)
    for number, name in enumerate(names):
        weight = torch.where(sources == number, counts, torch.zeros_like(counts)).double()
        mean = (each.double() * weight).sum() / weight.sum().clamp(min=1e-12)
        losses.add({f"mix/{name}/loss": mean}, weight=weight.sum())


def get_over(run: Run, bad: BadStepError, bad_steps: BadSteps) -> None:
    """What train.on_bad_step does about a step that was not taken; raises it for "stop" and after too many in a row."""
    policy = run.config.train.on_bad_step
    bad_steps.add(run.position.step + 1)
    if policy == "stop" or bad_steps.in_a_row > run.config.train.max_bad_steps:
        raise bad
    run.monitor.log.say(f"warning: {bad}; train.on_bad_step={policy}")
    if policy == "rollback":
        with run.monitor.activity.doing("going back"):
            run.saver.roll_back(bad)
        run.monitor.open_records()


def loss_shares(run: Run, micro_batches: list[Batch]) -> list[float]:
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


def save_picture(run: Run, batch: Batch) -> None:
    """Write the task's picture of a few images: the evaluation's first ones, so that pictures compare over time."""
    picture = run.task.picture
    if picture is None:
        return
    with run.monitor.activity.doing("drawing"):
        if run.eval_loader is not None:
            batch = next(in_lockstep(run.eval_loader))
        shown = picture(run.engine.evaluate, batch, run.position.classes)
        run.monitor.log.picture(run.config.task.name, run.position.step, shown)


def make_up_for_scores(run: Run, stop: StopRequest) -> bool:
    """Take the scores that a stop has cut short at the step from which the run goes on; False where it stops again."""
    if run.saver.saved_step is None or not on_main(run.world, run.monitor.scores_were_cut_short):
        return True
    try:
        scores = measure(run, run.position.step == run.length.last_step, stop)
    except StoppedError:
        return False
    if run.position.patience is not None:
        run.position.patience.add(scores)
    run.monitor.scores_are_due(False)
    return True


def measure(run: Run, last: bool, stop: StopRequest) -> dict[str, float]:
    """The scores that are due at this step, logged: those of the evaluation images, and of the frozen encoder.

    Raises StoppedError on all ranks where any is to stop.
    """
    step, activity, scores = run.position.step, run.monitor.activity, {}
    if run.eval_loader is not None and (is_due(step, run.config.train.eval_every_steps) or last):
        with activity.doing("evaluating"), label(EVALUATION):
            scores = scores_of(run, run.eval_loader, stop)
        run.monitor.log_scores(scores)
    if run.probe is not None and (is_due(step, run.config.probe.every_steps) or last):
        scores = scores | probe_encoder(run, run.probe)
    return scores


def probe_encoder(run: Run, probe: Probe) -> dict[str, float]:
    """What the encoder is worth as it is, logged."""
    with run.monitor.between_steps(), run.monitor.activity.doing("probing"), label(EVALUATION):
        probed = probe.scores(partial(run.task.features, run.engine.evaluate), run.monitor.marking_probes())
    run.monitor.log_scores(probed)
    return probed


def scores_of(run: Run, loader: EvalLoader, stop: StopRequest) -> dict[str, float]:
    """The scores of the weights and, with optim.ema_decay, those of their averages."""
    score = partial(run.task.scores, run.engine.evaluate)

    def requested() -> bool:
        return stop.requested is not None

    scores = evaluate_loader(score, run.monitor.marking_progress(loader, len(loader)), requested)
    if run.config.optim.ema_decay is not None:
        with run.engine.ema_weights():
            averaged = evaluate_loader(score, run.monitor.marking_progress(loader, len(loader)), requested)
        scores |= {averaged_score(name): value for name, value in averaged.items()}
    return scores


def close_loaders(run: Run) -> None:
    """End the processes that read images."""
    run.position.loader.close()
    if run.eval_loader is not None:
        run.eval_loader.close()
