"""What a model is trained to do: a batch in, a loss, scores and pictures out."""

from __future__ import annotations

import torch

from swinv2_train.config import ClassifyConfig, Config, SimMIMConfig
from swinv2_train.tasks.task import Task


def build_task(config: Config, device: torch.device) -> Task:
    """The task that config.task names, its module freshly initialised on the CPU in float32.

    device: where batches are normalised.  Raises ConfigError when the sizes do not fit together.
    """
    from swinv2_train.tasks.classify import ClassifyTask
    from swinv2_train.tasks.simmim import SimMIMTask

    if isinstance(config.task, SimMIMConfig):
        return SimMIMTask(config, config.task, device)
    assert isinstance(config.task, ClassifyConfig), config.task
    return ClassifyTask(config, config.task, device)
