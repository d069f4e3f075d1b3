"""The learning rate as a pure function of the step, and the derived lengths of a run.

lr_at(step) is the learning rate with which step number ``step`` (counted from 0, i.e. after ``step`` completed steps)
is taken.  The curves are those of the official SwinV2 code (timm's schedulers with per-iteration updates and
WARMUP_PREFIX: the curve starts when the warm-up has ended and runs over the remaining steps).
"""

from __future__ import annotations

import math

from swinv2_train.config import ConfigError, ScheduleConfig, TrainConfig


def total_steps(config: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run: max_steps, or if null ceil(epochs x num_samples / global_batch_size).

    num_samples: images of the training shards.
    """
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None, "load_config demands one of the two"
    return max(1, _ceil(config.epochs * num_samples / config.global_batch_size))


def warmup_steps(config: ScheduleConfig, train: TrainConfig, num_samples: int) -> int:
    """Steps of the warm-up: warmup_steps, or where that is null warmup_epochs in steps, rounded up.

    A run that is cut short by train.max_steps may end inside its warm-up.
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    assert config.warmup_epochs is not None, "load_config demands one of the two"
    return _ceil(config.warmup_epochs * num_samples / train.global_batch_size)


def lr_at(step: int, total_steps: int, config: ScheduleConfig, warmup_steps: int, peak: float) -> float:
    """Learning rate of step number ``step``.

    step: 0 .. total_steps - 1 (later steps stay at the end value).  peak: optim.lr.
    Warm-up: warmup_lr + (peak - warmup_lr) x step / warmup_steps, so step 0 has warmup_lr and the first step after the
    warm-up has peak.  With t = (step - warmup_steps) / (total_steps - warmup_steps):
    cosine: min_lr + (peak - min_lr) (1 + cos(pi t)) / 2;  linear: peak + (min_lr - peak) t;
    multistep: peak x gamma^(number of milestones m with step >= round(m x total_steps));  constant: peak.
    Source: timm CosineLRScheduler, StepLRScheduler as called in microsoft/Swin-Transformer lr_scheduler.py.
    """
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
    raise ConfigError(f"optim.schedule.name '{config.name}' is unknown; choose cosine, linear, multistep or constant")


def _ceil(value: float) -> int:
    """Round up, but not because of the last bits of a product such as 0.1 x 30 = 3.0000000000000004."""
    return math.ceil(value - 1e-9)
