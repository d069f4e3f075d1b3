"""train.loss_mean: what an image counts when damaged ones leave the micro-batches unequal.  The real train command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swinv2_train import train
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.distributed import World
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.images import encoded

SMALL = (
    "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", "model.img_size=16", "model.window_size=2",
    "train.global_batch_size=16", "train.max_steps=1", "train.keep_best=null", "data.eval_shards=null",
    "data.on_bad_sample=replace", "data.max_bad_fraction=0.9", "log.wandb=disabled", "log.progress=none",
    "engine.precision=fp32", "runtime.num_threads=1",
    # one step of AdamW with a huge eps moves a weight by nearly its gradient x lr / eps
    "optim.lr=1000", "optim.eps=1000", "optim.schedule.warmup_steps=0", "optim.clip_grad_norm=0",
    "optim.weight_decay=0",
)  # fmt: skip
DAMAGED = (1, 2, 3, 8, 14)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """16 images, all in the one step; 5 are damaged, not evenly among ranks and micro-batches."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)

    def samples():
        for i in range(16):
            data = encoded(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            yield f"k{i:03d}", b"damaged" if i in DAMAGED else data, "png", i % 4

    write_shards(samples(), str(folder / "train"), 16)
    return f"data.shards={folder}/train-*.tar"


@pytest.mark.parametrize("experiment", ["cifar10_finetune", "cifar10_simmim"])
def test_global_mean_on_two_ranks_is_one_process_over_the_whole_batch(experiment, shards, tmp_path):
    """Loss and gradients of 2 ranks x 2 micro-batches equal those of one batch of 16; with local means they do not."""
    task = ("task.init_from=null", "task.num_classes=4") if experiment == "cifar10_finetune" else ()

    def after_a_step(name: str, ranks: int, *overrides: str) -> tuple[float, dict[str, torch.Tensor]]:
        run = (f"experiment={experiment}", f"run_dir={tmp_path / name}")
        config = composed([*run, *SMALL, shards, *task, *overrides])

        def command(world: World) -> Any:
            return guarded(lambda: train.train(config))

        assert run_distributed(command, ranks, init=False) == [EXIT_DONE] * ranks
        lines = read_metrics(Path(config.run_dir))
        weights = read_checkpoint_weights(find_checkpoint(Path(config.run_dir)))
        return lines[-1]["train/loss"], {name: tensor.detach() for name, tensor in weights.items()}

    halves = ("engine=zero1", "engine.precision=fp32", "train.micro_batch_size=4")
    start = after_a_step("start", 1, "engine=local", "train.micro_batch_size=16", "optim.lr=0")[1]
    loss, whole = after_a_step("whole", 1, "engine=local", "train.micro_batch_size=16")
    global_loss, global_mean = after_a_step("global", 2, *halves, "train.loss_mean=global")
    local_loss, local_mean = after_a_step("local", 2, *halves)
    moved = torch.cat([(whole[name] - start[name]).flatten() for name in start])
    assert moved.norm() > 0.01

    def distance(other: dict[str, torch.Tensor]) -> float:
        apart = torch.cat([(whole[name] - other[name]).flatten() for name in start])
        return float(apart.norm() / moved.norm())

    # measured: 1.7e-7 with global means, with local ones 0.62 (classification) and 0.34 (SimMIM); losses 1e-7, 1e-3
    assert distance(global_mean) < 2e-6 and global_loss == pytest.approx(loss, rel=1e-6)
    assert distance(local_mean) > 0.1 and local_loss != pytest.approx(loss, rel=1e-4)
