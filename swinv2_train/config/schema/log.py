"""log: what is told, and to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from swinv2_train.config.rules import each, one_of

ARTIFACTS = ("pictures", "weights")
"""What wandb may keep besides the numbers."""


@dataclass
class LogConfig:
    wandb: Annotated[str, one_of("offline", "online", "disabled")]
    """offline (files, for wandb sync), online (offline where the server does not answer) or disabled."""
    wandb_project: str
    """Project under which wandb files the run."""
    wandb_name: str | None
    """Name of the wandb run; null = the run directory's name."""
    wandb_artifacts: Annotated[list[str], each(one_of(*ARTIFACTS))]
    """What wandb keeps as artifacts at the run's end: pictures (the task's), weights (of the last step)."""
    tensorboard: bool
    """Write TensorBoard event files to RUN_DIR/tensorboard/."""
    progress: Annotated[str, one_of("auto", "bar", "lines", "none")]
    """auto (a bar on a terminal, lines elsewhere), bar, lines or none."""
