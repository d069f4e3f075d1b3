"""train: length of the run, batches, and what happens between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from swinv2_train.config.rules import at_least, one_of, positive


@dataclass
class TrainConfig:
    max_steps: Annotated[int | None, at_least(1)]
    """Optimizer steps of the whole run, whatever their batches; null = from epochs."""
    epochs: Annotated[float | None, positive()]
    """Passes over the training shards, counted in images, so that the batch may change; max_steps takes precedence."""
    global_batch_size: Annotated[int, at_least(1)]
    """Images per optimizer step over all ranks and accumulation steps; may change at a resume (docs/resume.md)."""
    micro_batch_size: Annotated[int, at_least(1)]
    """Images per rank and forward pass."""
    loss_mean: Annotated[str, one_of("local", "global")]
    """local (mean of the ranks' and micro-batches' own means, as official) or global (mean of all images or pixels)."""
    on_bad_step: Annotated[str, one_of("stop", "skip", "rollback")]
    """When a step is not finite or its loss jumps: stop, skip it, or rollback (to the newest checkpoint)."""
    max_bad_steps: Annotated[int, at_least(1)]
    """Bad steps in a row (skip), or rollbacks from the same step (rollback), after which the run stops."""
    loss_spike_factor: Annotated[float | None, at_least(1)]
    """A loss above N x the median of the last 100 steps is a bad step; null = only one that is not finite."""
    log_every_steps: Annotated[int, at_least(1)]
    """Steps between metric lines."""
    checkpoint_every_steps: Annotated[int, at_least(1)]
    """Steps between checkpoints; the last step is always saved."""
    background_save: bool
    """Copy the state to CPU memory and write it while training goes on; otherwise training waits."""
    keep_checkpoints: Annotated[int, at_least(1)]
    """How many of the newest complete checkpoints are kept."""
    keep_best: str | None
    """Also keep the best checkpoint by a score that the run measures: val/top1, val_ema/loss, probe/knn_top1, ..."""
    patience: Annotated[int | None, at_least(1)]
    """Evaluations in a row without a better train.keep_best after which the run ends; null = it never ends so."""
    eval_every_steps: Annotated[int | None, at_least(1)]
    """Steps between evaluations on data.eval_shards; null evaluates at the end only."""
    picture_every_steps: Annotated[int, at_least(1)]
    """Steps between pictures of the task (SimMIM reconstructions)."""
