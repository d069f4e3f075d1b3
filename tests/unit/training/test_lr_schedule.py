"""The learning rate is what the formulas of the official code say, to the last step."""

from __future__ import annotations

import dataclasses

import pytest

from swinv2_train.config import ConfigError, ScheduleConfig
from swinv2_train.training.lr_schedule import Reached, RunLength, lr_at, run_length, total_steps, warmup_steps
from tests.support.configs import make_config


def schedule(**changes):
    base = ScheduleConfig("cosine", 10, None, 0.0, 0.0, [0.5, 0.875], 0.1, 1.0)
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


@pytest.mark.parametrize(
    ("step", "power", "lr"),
    [(0, 1.0, 0.1), (5, 1.0, 0.55 * 95 / 100), (10, 1.0, 0.9), (50, 1.0, 0.5), (99, 1.0, 0.01), (50, 0.9, 0.5**0.9)],
)
def test_poly_runs_over_the_whole_run_and_the_warm_up_multiplies_it(step, power, lr):
    """mmcv's: of 100 steps with 10 of warm-up from a tenth, step 5 has poly(5) = 0.95 times 1 - 0.5 x 0.9 = 0.55."""
    config = schedule(name="poly", warmup_lr=0.1, power=power)
    assert lr_at(step, 100, config, 10, 1.0) == pytest.approx(lr)


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


@pytest.mark.parametrize(
    ("reached", "batch", "last_step"),
    [
        (Reached(0, 0, 8, 8), 8, 13),  # 100 images
        (Reached(6, 48, 8, 8), 8, 13),
        (Reached(6, 48, 8, 8), 16, 10),  # 52 images left: 4 steps of 16
        (Reached(6, 48, 8, 8), 4, 19),
        (Reached(19, 100, 8, 4), 8, 19),  # nothing is left
        (Reached(20, 160, 8, 8), 8, 20),  # train.epochs was more
    ],
)
def test_a_run_in_epochs_ends_by_images_whatever_the_batches_were(reached, batch, last_step):
    """The curve stays the one of the run as it began, so that no change of the batch moves the rate."""
    length = run_length(train(None, 1, batch), schedule(warmup_steps=None, warmup_epochs=0.2), 100, reached)
    assert length == RunLength(last_step, curve_steps=13, warmup_steps=3, images_per_curve_step=8)
    assert length.curve_step(reached.step, reached.images_seen) == reached.images_seen / 8


def test_a_run_in_steps_counts_steps_and_its_warm_up_in_epochs_does_not_move():
    length = run_length(train(20, 1, 50), schedule(warmup_steps=None, warmup_epochs=0.5), 100, Reached(6, 60, 10, 10))
    assert length == RunLength(20, curve_steps=20, warmup_steps=5, images_per_curve_step=None)
    assert length.curve_step(7, 110) == 7


def test_old_checkpoints_say_no_batch_sizes_and_the_mean_stands_for_them():
    assert Reached.of({"step": 0, "images_seen": 0}, 32) == Reached(0, 0, 32, 32)
    assert Reached.of({"step": 6, "images_seen": 48}, 32) == Reached(6, 48, 8, 8)
    new = {"step": 6, "images_seen": 48, "first_batch_size": 16, "batch_size": 4}
    assert Reached.of(new, 32) == Reached(6, 48, 16, 4)
