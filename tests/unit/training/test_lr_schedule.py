"""The learning rate is what the formulas of the official code say, to the last step."""

from __future__ import annotations

import dataclasses

import pytest

from swinv2_train.config import ConfigError, ScheduleConfig
from swinv2_train.training.lr_schedule import lr_at, total_steps, warmup_steps
from tests.support.configs import make_config


def schedule(**changes):
    base = ScheduleConfig("cosine", 10, None, 0.0, 0.0, [0.5, 0.875], 0.1)
    return dataclasses.replace(base, **changes)


def train(max_steps, epochs, batch=100):
    return make_config(train={"max_steps": max_steps, "epochs": epochs, "global_batch_size": batch}).train


def test_warm_up_is_linear_from_warmup_lr_and_reaches_the_peak_on_the_step_after_it():
    config = schedule(warmup_lr=1e-4)
    assert lr_at(0, 110, config, 10, 1e-3) == pytest.approx(1e-4)
    assert lr_at(5, 110, config, 10, 1e-3) == pytest.approx(5.5e-4)
    assert lr_at(10, 110, config, 10, 1e-3) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("step", "lr"), [(10, 1.0), (35, 0.1 + 0.9 * 0.8535533906), (60, 0.55), (110, 0.1), (999, 0.1)]
)
def test_cosine_runs_over_the_steps_after_the_warm_up(step, lr):
    """timm's WARMUP_PREFIX: at step 35 of 110 with 10 of warm-up a quarter of the cosine is done: (1+cos(pi/4))/2."""
    assert lr_at(step, 110, schedule(min_lr=0.1), 10, 1.0) == pytest.approx(lr)


@pytest.mark.parametrize(("step", "lr"), [(10, 1.0), (60, 0.6), (85, 0.4), (110, 0.2)])
def test_linear_falls_to_min_lr(step, lr):
    assert lr_at(step, 110, schedule(name="linear", min_lr=0.2), 10, 1.0) == pytest.approx(lr)


@pytest.mark.parametrize(("step", "lr"), [(10, 1.0), (39, 1.0), (40, 0.1), (69, 0.1), (70, 0.01), (79, 0.01)])
def test_multistep_falls_at_shares_of_the_whole_run(step, lr):
    """Milestones 0.5 and 0.875 of 80 steps are steps 40 and 70, counted from the start as in the official code."""
    assert lr_at(step, 80, schedule(name="multistep"), 10, 1.0) == pytest.approx(lr)


def test_constant_stays_and_an_unknown_name_is_rejected():
    assert lr_at(77, 80, schedule(name="constant"), 10, 0.3) == 0.3
    with pytest.raises(ConfigError, match=r"optim\.schedule\.name 'cosin' is unknown; choose cosine"):
        lr_at(77, 80, schedule(name="cosin"), 10, 0.3)


def test_total_steps_come_from_max_steps_or_else_from_epochs():
    assert total_steps(train(7, None), 1000) == 7
    assert total_steps(train(7, 3), 1000) == 7
    assert total_steps(train(None, 3), 1000) == 30
    assert total_steps(train(None, 0.1, batch=1), 30) == 3  # 0.1 x 30 = 3.0000000000000004
    assert total_steps(train(None, 1), 1001) == 11


def test_warm_up_in_epochs_becomes_steps_rounded_up():
    assert warmup_steps(schedule(warmup_steps=None, warmup_epochs=1.5), train(None, 3), 1000) == 15
    assert warmup_steps(schedule(warmup_steps=None, warmup_epochs=1.01), train(None, 3), 1000) == 11
    assert warmup_steps(schedule(warmup_steps=0), train(None, 3), 1000) == 0


def test_run_that_ends_inside_its_warm_up_still_warms_up():
    assert lr_at(5, 6, schedule(warmup_steps=10), 10, 1.0) == pytest.approx(0.5)
