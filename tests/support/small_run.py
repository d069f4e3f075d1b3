"""A small classifier's run of some steps, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from swinv2_train import train
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config import Config
from swinv2_train.config.command_line import guarded
from swinv2_train.distributed import World
from tests.support.harness import run_distributed

SMALL = (
    "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", "model.img_size=16", "model.window_size=2",
    "train.global_batch_size=8", "train.micro_batch_size=4", "train.log_every_steps=1", "train.keep_best=null",
    "train.eval_every_steps=null", "log.wandb=disabled", "log.progress=none", "engine=local", "engine.precision=fp32",
    "runtime.num_threads=1",
)  # fmt: skip


def run_alone(config: Config, around: Any = None) -> Any:
    """train(config) in a process of its own; around(): called there first, its result is called after."""

    def command(world: World) -> Any:
        after = around() if around is not None else None
        code = guarded(lambda: train.train(config))
        return code if after is None else (code, after())

    return run_distributed(command, 1, init=False)[0]


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return read_checkpoint_weights(find_checkpoint(Path(config.run_dir)))
