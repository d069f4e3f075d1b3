"""The learning rate as a pure function of how far a run is, and the derived lengths of a run.

How far a run is: in images seen where its length is in epochs, and in optimizer steps where that is train.max_steps.
So the batch may change at a resume: an epoch stays an epoch, a step a step, and the rate goes on where it was.
The curves are those of the official SwinV2 code (timm's schedulers with per-iteration updates and WARMUP_PREFIX: the
curve starts when the warm-up has ended and runs over the remaining steps); poly is mmcv's, over the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from swinv2_train.config import ConfigError, ScheduleConfig, TrainConfig


class Reached(NamedTuple):
    """How far a run is."""

    step: int
    """Completed optimizer steps."""
    images_seen: int
    """Images of all completed steps, over all ranks."""
    first_batch_size: int
    """Images of the run's first step."""
    batch_size: int
    """Images of its last step."""

    @classmethod
    def of(cls, state: Mapping[str, Any], batch_size: int) -> Self:
        """What a checkpoint's state says; batch_size: of a run that has not begun.

        Checkpoints before version 0.3 do not say the sizes of their batches: the mean stands for them.
        """
        step, images_seen = state["step"], state["images_seen"]
        mean = max(1, round(images_seen / step)) if step else batch_size
        return cls(step, images_seen, state.get("first_batch_size", mean), state.get("batch_size", mean))


@dataclass(frozen=True)
class RunLength:
    """Where a run ends, and the unit in which its learning rate counts."""

    last_step: int
    """The optimizer step after which the run is done."""
    curve_steps: int
    """Steps of the learning rate's curve over the whole run."""
    warmup_steps: int
    """Those of its warm-up."""
    images_per_curve_step: int | None
    """Images of a step of the curve (the run's first batch); None = they are optimizer steps."""

    def curve_step(self, step: int, images_seen: int) -> float:
        """Where the curve stands after so many optimizer steps and images; whole while the batch stays as it began."""
        return step if self.images_per_curve_step is None else images_seen / self.images_per_curve_step


def run_length(train: TrainConfig, schedule: ScheduleConfig, num_samples: int, reached: Reached) -> RunLength:
    """The length of a run that has come so far and goes on with train.global_batch_size.

    With train.max_steps it counts optimizer steps, otherwise images: it ends with the step that completes its epochs.
    The other unit, in which the warm-up may stand, is converted by the run's first batch, so that no resume moves it.
    num_samples: images of the training shards.
    """
    began = replace(train, global_batch_size=reached.first_batch_size)
    warmup = warmup_steps(schedule, began, num_samples)
    if train.max_steps is not None:
        return RunLength(train.max_steps, train.max_steps, warmup, None)
    assert train.epochs is not None, "load_config demands one of the two"
    left = _ceil(train.epochs * num_samples / train.global_batch_size - reached.images_seen / train.global_batch_size)
    return RunLength(
        last_step=max(1, reached.step + max(0, left)),
        curve_steps=total_steps(began, num_samples),
        warmup_steps=warmup,
        images_per_curve_step=reached.first_batch_size,
    )


def batch_note(reached: Reached, train: TrainConfig, last_step: int) -> str | None:
    """What another train.global_batch_size than before means for the rest of the run; None where it is the same."""
    if train.global_batch_size == reached.batch_size:
        return None
    change = (
        f"train.global_batch_size is {train.global_batch_size} and was {reached.batch_size} until step {reached.step} "
        f"({reached.images_seen} images)"
    )
    if train.max_steps is None:
        counts = f"the run and its learning rate go on by images, to {train.epochs:g} epochs at step {last_step}"
    else:
        images = reached.images_seen + max(0, last_step - reached.step) * train.global_batch_size
        counts = (
            f"train.max_steps ({train.max_steps}) and the learning rate count steps, so the run ends at {images} images"
        )
    return f"{change}; {counts}; optim.lr, optim.ema_decay and all periods in steps are taken as they are"


def total_steps(config: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of a whole run: max_steps, or if null ceil(epochs x num_samples / global_batch_size).

    num_samples: images of the training shards.
    """
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None, "load_config demands one of the two"
    return max(1, _ceil(config.epochs * num_samples / config.global_batch_size))


def warmup_steps(config: ScheduleConfig, train: TrainConfig, num_samples: int) -> int:
    """Steps of the warm-up: warmup_steps, or where that is null warmup_epochs in steps, rounded up.

    A run that is cut short by train.max_steps may end inside its warm-up (length_warnings.py says so).
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    assert config.warmup_epochs is not None, "load_config demands one of the two"
    return _ceil(config.warmup_epochs * num_samples / train.global_batch_size)


def lr_at(step: float, total_steps: int, config: ScheduleConfig, warmup_steps: int, peak: float) -> float:
    """Learning rate of step number ``step``.

    step: 0 .. total_steps - 1 (later steps stay at the end value), of RunLength.curve_step, as total_steps and
    warmup_steps are; not whole after a change of the batch.  peak: optim.lr.
    Warm-up: warmup_lr + (peak - warmup_lr) x step / warmup_steps, so step 0 has warmup_lr and the first step after the
    warm-up has peak.  With t = (step - warmup_steps) / (total_steps - warmup_steps):
    cosine: min_lr + (peak - min_lr) (1 + cos(pi t)) / 2;  linear: peak + (min_lr - peak) t;
    multistep: peak x gamma^(number of milestones m with step >= round(m x total_steps));  constant: peak.
    poly counts from step 0: min_lr + (peak - min_lr) (1 - step / total_steps)^power; the warm-up multiplies it by its
    own line over peak.
    Source: timm CosineLRScheduler, StepLRScheduler as called in microsoft/Swin-Transformer lr_scheduler.py; poly:
    mmcv's PolyLrUpdaterHook as in Swin-Transformer-Semantic-Segmentation, whose warmup_ratio is warmup_lr / peak.
    """
    if config.name == "poly":
        left = max(0.0, 1.0 - step / total_steps)
        rate = config.min_lr + (peak - config.min_lr) * left**config.power
        started = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return rate * (started + (1.0 - started) * config.warmup_lr / peak) if started < 1.0 and peak else rate
    if step < warmup_steps:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if config.name == "cosine":
        return config.min_lr + (peak - config.min_lr) * (1.0 + math.cos(math.pi * done)) / 2.0
    if config.name == "linear":
        return peak + (config.min_lr - peak) * done
    if config.name == "multistep":
        passed = sum(step >= round(milestone * total_steps) for milestone in config.milestones)
        return float(peak * config.gamma**passed)
    if config.name == "constant":
        return peak
    names = "cosine, linear, poly, multistep or constant"
    raise ConfigError(f"optim.schedule.name '{config.name}' is unknown; choose {names}")


def _ceil(value: float) -> int:
    """Round up, but not because of the last bits of a product such as 0.1 x 30 = 3.0000000000000004."""
    return math.ceil(value - 1e-9)
