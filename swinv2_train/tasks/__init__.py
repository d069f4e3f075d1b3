"""What a model is trained to do: a batch in, a loss, scores and pictures out.

Everything that is known of a task stands in its file here, its class in config/schema/ and its conf/task/NAME.yaml.
"""

from __future__ import annotations

import importlib
from typing import cast

import torch

from swinv2_train.config import Config, TaskConfig
from swinv2_train.tasks.task import Task


def task_class(task: TaskConfig) -> type[Task]:
    """The class that does what a task section describes, imported when it is asked for."""
    module, _, name = task.implementation.partition(":")
    return cast(type[Task], getattr(importlib.import_module(module), name))


def build_task(config: Config, device: torch.device) -> Task:
    """The task that config.task names, its module freshly initialised on the CPU in float32.

    device: where batches are normalised.  Raises ConfigError when the sizes do not fit together.
    """
    return task_class(config.task)(config, config.task, device)
