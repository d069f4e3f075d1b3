"""What a configuration asks for beyond the end of its run: said at the start, for nothing would ever show it."""

from __future__ import annotations

from collections.abc import Iterator

from swinv2_train.config import Config
from swinv2_train.training.lr_schedule import RunLength, lr_at

MOST_OF_THE_START = 0.5
"""A share of the first weights in their averages of more than this is no average of the run."""


def length_warnings(config: Config, length: RunLength, step: int) -> Iterator[str]:
    """Lines for the user, each with the key, its value and the remedy.

    length: of the run, which has completed `step` optimizer steps before this start.
    """
    yield from _schedule(config, length)
    yield from _periods(config, length)
    yield from _profile(config, length.last_step - step)
    decay = config.optim.ema_decay
    if decay is not None and decay**length.last_step > MOST_OF_THE_START:
        yield (
            f"warning: optim.ema_decay ({decay:g}) over {length.last_step} steps leaves {decay**length.last_step:.0%} "
            "of the first weights in their averages; lower it, or lengthen the run"
        )


def _schedule(config: Config, length: RunLength) -> Iterator[str]:
    """A warm-up that does not end before the run, a rate above the peak, and milestones without effect."""
    schedule, steps, warmup = config.optim.schedule, length.curve_steps, length.warmup_steps
    key, value = ("warmup_steps", schedule.warmup_steps) if schedule.warmup_steps is not None else (
        "warmup_epochs", schedule.warmup_epochs
    )  # fmt: skip
    if warmup >= steps and warmup > 0:
        last = lr_at(steps - 1, steps, schedule, warmup, config.optim.lr)
        yield (
            f"warning: optim.schedule.{key} ({value:g}) is a warm-up of {warmup} steps in a run of {steps}: the "
            f"learning rate ends at {last:.3g}, still rising to optim.lr ({config.optim.lr:g}); shorten it, or "
            "lengthen the run"
        )
    falls = schedule.name in ("cosine", "linear", "poly")
    for key, value, used in (("warmup_lr", schedule.warmup_lr, warmup > 0), ("min_lr", schedule.min_lr, falls)):
        if used and value > config.optim.lr:
            yield (
                f"warning: optim.schedule.{key} ({value:g}) is above optim.lr ({config.optim.lr:g}), which is meant to "
                "be the highest learning rate; lower the one or raise the other"
            )
    if schedule.name != "multistep":
        return
    for milestone in schedule.milestones:
        at = round(milestone * steps)
        if at >= steps or at < warmup:
            where = "at the end or after it" if at >= steps else f"in the warm-up of {warmup}"
            yield (
                f"warning: optim.schedule.milestones ({milestone:g}) is step {at} of {steps}, {where}, so the learning "
                "rate does not fall there; move it"
            )


def _periods(config: Config, length: RunLength) -> Iterator[str]:
    """What is to happen every so many steps, and the run has fewer: it happens at the last step alone."""
    train, last = config.train, length.last_step
    measured = {
        "train.eval_every_steps": train.eval_every_steps if config.data.eval_shards is not None else None,
        "probe.every_steps": config.probe.every_steps if config.probe.methods else None,
    }
    told = {
        "train.log_every_steps": train.log_every_steps,
        "train.picture_every_steps": train.picture_every_steps,
        "train.checkpoint_every_steps": train.checkpoint_every_steps,
    }
    for kind, periods in (("warning", measured), ("note", told)):
        beyond = [f"{key} ({every})" for key, every in periods.items() if every is not None and every > last]
        if beyond:
            yield f"{kind}: {', '.join(beyond)}: more than the run's {last} steps, so at the last step alone"


def _profile(config: Config, steps: int) -> Iterator[str]:
    """A trace that this start does not come to, or not to the end of."""
    runtime = config.runtime
    first, last = runtime.profile_steps
    if runtime.profile and last > steps:
        trace = "no trace is written" if first > steps else f"the trace ends with step {steps}"
        yield f"warning: runtime.profile_steps ([{first}, {last}]) goes beyond the {steps} steps of this start: {trace}"
