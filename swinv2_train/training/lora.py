"""LoRA in a run: the adapters that are trained, and what its checkpoints say of them."""

from __future__ import annotations

import torch

from swinv2_train.checkpoint import SCALE
from swinv2_train.config import Config, ConfigError, OptimConfig
from swinv2_train.models.lora import add_adapters
from swinv2_train.tasks import build_task
from swinv2_train.tasks.task import Task


def build_trained_task(config: Config, device: torch.device) -> Task:
    """The task whose module a run trains: build_task's, with the adapters that optim.lora asks for.

    What only answers or is exported needs none: weights of a run are read with the adapters in them
    (weights/adapters.py).  Raises ConfigError for a rank that is larger than a layer.
    """
    task, lora = build_task(config, device), config.optim.lora
    if lora.rank:
        try:
            add_adapters(task.encoder, lora.rank, lora.alpha, lora.targets)
        except ValueError as error:
            raise ConfigError(f"optim.lora.rank ({lora.rank}): {error}") from error
    return task


def adapter_state(config: OptimConfig) -> dict[str, float]:
    """What a checkpoint must say so that its adapters can be read."""
    return {SCALE: config.lora.alpha / config.lora.rank} if config.lora.rank else {}
