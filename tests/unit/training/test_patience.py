"""A run whose score gets no better ends by itself, and is complete."""

from __future__ import annotations

import math

import pytest

from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.config import ConfigError
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.training.patience import Patience
from tests.support.configs import composed, make_config
from tests.support.shard_files import noise_shards
from tests.support.small_run import SMALL, run_alone


def patience(metric: str, limit: int) -> Patience:
    return Patience(make_config(train={"keep_best": metric, "patience": limit}).train, None)


@pytest.mark.parametrize(
    "metric,values,worse",
    [
        ("val/top1", [1, 3, 2, 3], [0, 0, 1, 2]),
        ("val/loss", [3, 1, 2, 0.5], [0, 0, 1, 0]),
        ("val_ema/rmse", [math.nan, 3, math.nan, 4], [1, 0, 1, 2]),
    ],
)
def test_equal_values_and_nan_are_no_better(metric, values, worse):
    """The count survives a checkpoint; steps that measure something else do not count."""
    found, watched = [], patience(metric, 2)
    for value in values:
        watched.add({metric: value, "val/other": 1.0})
        watched.add({"val/other": 2.0})
        watched = Patience(make_config(train={"keep_best": metric, "patience": 2}).train, watched.state_dict())
        found.append(watched.worse)
    assert found == worse and watched.is_exhausted == (worse[-1] >= 2)
    other = Patience(make_config(train={"keep_best": "val/acc", "patience": 2}).train, watched.state_dict())
    assert (other.best, other.worse) == (None, 0)


@pytest.mark.slow
def test_a_run_ends_by_patience_and_goes_on_with_more_of_it(tmp_path, capfd):
    """With a learning rate of 0 no score is better than the first: it ends at step 3, and the same command is done."""
    shards = noise_shards(tmp_path / "shards")

    def run(*overrides: str) -> str:
        capfd.readouterr()
        config = composed([
            "task=classify", "data=cifar10", "model=demo", "task.num_classes=4", *SMALL, *shards, "task.mixup_alpha=0",
            "task.cutmix_alpha=0", f"run_dir={tmp_path}/run", "train.max_steps=9", "train.epochs=null", "optim.lr=0",
            "optim.schedule.warmup_epochs=0", "optim.schedule.min_lr=0", "optim.schedule.warmup_lr=0",
            "train.eval_every_steps=1", "train.keep_best=val/loss", *overrides,
        ])  # fmt: skip
        assert run_alone(config) == EXIT_DONE, capfd.readouterr()
        return capfd.readouterr().out

    assert "step 3: the run ends by train.patience (2): val/loss was no better than" in run("train.patience=2")
    assert find_checkpoint(tmp_path / "run").name == "step_00000003"
    assert "complete: 3 steps" in (tmp_path / "run" / "report.html").read_text()
    assert "its 3 steps (24 images) are past train.patience (2)" in run("train.patience=2")
    assert "step 5: the run ends by train.patience (4)" in run("train.patience=4")
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "val/loss" in line]
    assert steps == [1, 2, 3, 4, 5]
    run("train.patience=null")
    assert find_checkpoint(tmp_path / "run").name == "step_00000009"


def test_patience_needs_a_score_and_evaluations():
    own = ("task=classify", "data=cifar10", "model=demo", "run_dir=u", "train.patience=2")
    with pytest.raises(ConfigError, match=r"train.keep_best is null; name one: train.keep_best=val/loss"):
        composed(own)
    with pytest.raises(ConfigError, match="train.eval_every_steps is null; set train.eval_every_steps=NUMBER"):
        composed([*own, "train.keep_best=val/top1"])
