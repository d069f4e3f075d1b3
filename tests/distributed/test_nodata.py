"""What was not measured counts nowhere, on any number of ranks, under every stage of ZeRO.  The real train command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config import Config
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.data.loading.pipe_loader import build_train_loader
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.tasks import build_task
from swinv2_train.train import train as train_run
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.images import npy
from tests.support.nodata import simmim_loss_by_hand

BANDS, SIZE = 3, 16
MEAN, STD = [0.1, 0.2, 0.3], [1.0, 2.0, 0.5]
SMALL = (
    "task=simmim", "model=demo", "task.mask_unit_px=4", "model.embed_dim=8", "model.depths=[1,1]",
    "model.num_heads=[1,2]", f"model.img_size={SIZE}", "model.window_size=2", "train.global_batch_size=12",
    "train.max_steps=1", "train.log_every_steps=1", "data.nodata=[nan]", "data.max_nodata_fraction=1.0",
    "data.on_bad_sample=replace", "data.max_bad_fraction=0.5", f"data.mean={MEAN}", f"data.std={STD}",
    "data.lanes=3", "data.window_shards=1", "data.num_workers=0", "data.record_keys=true", "log.wandb=disabled",
    "log.progress=none", "engine.precision=fp32", "runtime.num_threads=1", "train.loss_mean=global",
    # one step of AdamW with a huge eps moves a weight by nearly its gradient x lr / eps
    "optim.lr=1000", "optim.eps=1000", "optim.schedule.warmup_steps=0", "optim.clip_grad_norm=0",
    "optim.weight_decay=0",
)  # fmt: skip
RANKS = {"zero1": (1, 2), "zero2": (2, 3), "zero3": (3, 2), "zero0": (3, 4)}
"""Ranks and micro-batch of each engine: 6, 2, 2 and 1 micro-batches a step."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Three shards of four images, a step: one with nothing measured in it, two with corners, one damaged image."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shards")

    def samples():
        for number in range(12):
            image = rng.normal(0, 1, (20, 20, BANDS)).astype(np.float32)
            image[: number % 5 * 4, :13] = np.nan
            image[10:, 10:, 1] = np.nan
            if number // 4 == 1:
                image[:] = np.nan
            yield f"k{number:02d}", npy(image)[: 80 if number == 10 else None], "npy", None

    write_shards(samples(), str(folder / "t"), 4)
    return f"{folder}/t-*.tar"


def after_a_step(config: Config, ranks: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The step's line of metrics, and the weights."""
    assert run_distributed(lambda world: guarded(lambda: train_run(config)), ranks, init=False) == [EXIT_DONE] * ranks
    run_dir = Path(config.run_dir)
    weights = read_checkpoint_weights(find_checkpoint(run_dir))
    return read_metrics(run_dir)[-1], {name: tensor.detach() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """config(name, ...), the weights before the step, and the line and the weights after one of the whole batch."""
    folder = tmp_path_factory.mktemp("runs")

    def config(name: str, *overrides: str) -> Config:
        return composed([*SMALL, f"data.shards={shards}", f"run_dir={folder / name}", *overrides])

    alone = ("engine=local", "train.micro_batch_size=12")
    _, start = after_a_step(config("start", *alone, "optim.lr=0"), 1)
    line, weights = after_a_step(config("whole", *alone), 1)
    return config, start, line, weights


def test_the_loss_of_a_step_is_the_mean_worked_out_by_hand(whole, shards):
    """Over every hidden value that was measured, of the images that are whole."""
    config, start, line, _ = whole
    settings = config("hand")
    task = build_task(settings, torch.device("cpu"))
    task.module.load_state_dict(start, strict=False)
    steps = {"global_batch_size": 12, "micro_batch_size": 12, "rank": 0, "world_size": 1, "start_images": 0}
    loader = build_train_loader(open_source(shards), settings.data, task.train_transform, seed=settings.seed, **steps)
    batch = next(iter(loader))
    assert batch["weight"].sum() == 11 and batch["images"].isnan().flatten(1).all(1).sum() >= 4
    images = (batch["images"] - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    with torch.no_grad():
        expected = simmim_loss_by_hand(task.module, images, batch["mask"], batch["weight"])
    assert line["train/loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("engine", RANKS)
def test_ranks_and_micro_batches_take_the_step_of_the_whole_batch(engine, whole):
    """Also where one rank has nothing measured at all: the same loss, and the same finite gradients."""
    config, start, line, weights = whole
    ranks, micro = RANKS[engine]
    settings = config(engine, f"engine={engine}", f"train.micro_batch_size={micro}")
    found, moved = after_a_step(settings, ranks)
    assert found["train/loss"] == pytest.approx(line["train/loss"], rel=1e-6)
    assert found["train/grad_norm"] == pytest.approx(line["train/grad_norm"], rel=1e-5)
    way = torch.cat([(weights[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(weights[name] - moved[name]).flatten() for name in start])
    assert way.norm() > 0.01 and apart.norm() < 1e-5 * way.norm()
    if ranks == 3:
        keys = [json.loads(path.read_text())["keys"] for path in Path(settings.run_dir, "sample_keys").iterdir()]
        assert ["k04", "k05", "k06", "k07"] in map(sorted, keys)
