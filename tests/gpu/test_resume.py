"""A resume on a GPU goes on bit for bit: twenty steps straight are ten and ten resumed.  Skipped without a device;
tests/distributed/test_elastic.py and test_train.py ask the same of CPUs."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from swinv2_train import train
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.shard_files import noise_shards
from tests.support.small_run import weights_of
from tests.unit.training.test_step import six_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 20
OWN = (
    "model.img_size=64", "model.window_size=12", "model.embed_dim=32", "model.drop_path_rate=0.3",
    "train.log_every_steps=1", "optim.schedule.warmup_epochs=0", "data.num_workers=2",
)  # fmt: skip


def trained(config: Any) -> int:
    """The run's exit code."""
    return guarded(lambda: train.train(config))


def in_new_process(config: Any) -> int:
    """A new interpreter, whose libraries choose everything anew."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(trained, config).result(timeout=300)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("engine", "precision", "attention"),
    [
        ("local", "fp32", "fused"),
        ("zero1", "bf16", "fused"),
        ("zero3", "bf16", "fused"),
        ("zero2", "bf16", "reference"),
    ],
)
def test_twenty_steps_are_ten_and_ten_resumed(engine, precision, attention, deterministic, tmp_path):
    """runtime.deterministic changes nothing where no operation varies: both ways must hold."""
    shards = noise_shards(tmp_path / "shards")
    own = (
        *OWN, f"engine.precision={precision}", f"model.attention={attention}",
        f"runtime.deterministic={str(deterministic).lower()}",
    )  # fmt: skip
    runs = {}
    for name, lengths in (("straight", (STEPS,)), ("again", (STEPS,)), ("resumed", (STEPS // 2, STEPS))):
        for steps in lengths:
            # the schedule's end is the run's: a constant rate is the same for ten steps as for twenty
            runs[name] = six_steps(
                engine,
                "simmim",
                tmp_path / name,
                shards,
                *own,
                "optim.schedule.name=constant",
                f"train.max_steps={steps}",
            )
            assert in_new_process(runs[name]) == EXIT_DONE
    losses = {name: [line["train/loss"] for line in read_metrics(tmp_path / name)] for name in runs}
    assert len(losses["straight"]) == STEPS
    assert losses["straight"] == losses["again"], "two runs differ, so no resume can be bit for bit"
    assert losses["straight"] == losses["resumed"]
    weights = {name: weights_of(config) for name, config in runs.items()}
    for name in ("again", "resumed"):
        assert all(torch.equal(weights["straight"][key], weights[name][key]) for key in weights["straight"])
