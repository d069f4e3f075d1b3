"""What lies beyond the end of a run is said at its start: nothing in the run would show it."""

from __future__ import annotations

import pytest

from swinv2_train.training.length_warnings import length_warnings
from swinv2_train.training.lr_schedule import Reached, run_length
from tests.support.configs import make_config

QUIET = {"log_every_steps": 1, "picture_every_steps": 1, "checkpoint_every_steps": 1, "global_batch_size": 10}


def warnings(step=0, images=100, train=None, schedule=None, **sections):
    """Of a run of 10 epochs of 10 steps."""
    config = make_config(train={**QUIET, "max_steps": None, "epochs": 10, **(train or {})}, **sections)
    for key, value in {"warmup_epochs": 1, **(schedule or {})}.items():
        setattr(config.optim.schedule, key, value)
    length = run_length(config.train, config.optim.schedule, images, Reached(step, step * 10, 10, 10))
    return list(length_warnings(config, length, step))


def test_a_run_with_everything_before_its_end_says_nothing():
    on = {"eval_shards": "x"}
    assert warnings(train={"eval_every_steps": 100}, data=on, optim={"ema_decay": 0.99}) == []
    assert warnings(runtime={"profile": True, "profile_steps": [4, 6]}) == []
    assert warnings(schedule={"name": "multistep", "milestones": [0.5, 0.99]}) == []


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"warmup_epochs": 20}, r"optim.schedule.warmup_epochs (20) is a warm-up of 200 steps in a run of 100"),
        ({"warmup_epochs": 10}, "warm-up of 100 steps in a run of 100"),
        ({"warmup_steps": 150}, "optim.schedule.warmup_steps (150)"),
    ],
)
def test_a_warm_up_that_reaches_the_end_is_said(schedule, said):
    """A warm-up of 20 epochs in a run of 10 leaves the rate at half its peak, and never lets it fall."""
    (line,) = warnings(schedule=schedule, optim={"lr": 1.0})
    assert line.startswith("warning: ") and said in line and "still rising to optim.lr (1)" in line
    if schedule == {"warmup_epochs": 20}:
        assert "ends at 0.495" in line


@pytest.mark.parametrize(("milestone", "where"), [(1.0, "at the end or after it"), (0.05, "in the warm-up of 10")])
def test_a_milestone_without_effect_is_said(milestone, where):
    (line,) = warnings(schedule={"name": "multistep", "milestones": [0.5, milestone]})
    assert f"optim.schedule.milestones ({milestone:g})" in line and where in line
    assert warnings(schedule={"name": "cosine", "milestones": [0.5, milestone]}) == []


@pytest.mark.parametrize(
    ("schedule", "lr"),
    [({"min_lr": 0.1}, 0.01), ({"min_lr": 0.1, "name": "poly"}, 0.01), ({"warmup_lr": 0.1, "name": "constant"}, 0.01)],
)
def test_a_rate_above_the_peak_is_said(schedule, lr):
    """optim.lr lowered on the command line, below the recipe's min_lr: the rate rises to the end."""
    (line,) = warnings(schedule=schedule, optim={"lr": lr})
    assert "_lr (0.1) is above optim.lr (0.01)" in line
    assert warnings(schedule={"min_lr": 0.1, "name": "constant"}, optim={"lr": lr}) == []
    assert warnings(schedule={"warmup_lr": 0.1, "warmup_epochs": 0}, optim={"lr": lr}) == []


def test_periods_beyond_the_end_are_said_together():
    lines = warnings(
        train={"eval_every_steps": 101, "log_every_steps": 1000, "checkpoint_every_steps": 500},
        data={"eval_shards": "x"}, probe={"methods": ["knn"], "every_steps": 200},
    )  # fmt: skip
    assert lines == [
        "warning: train.eval_every_steps (101), probe.every_steps (200): more than the run's 100 steps, so at the last "
        "step alone",
        "note: train.log_every_steps (1000), train.checkpoint_every_steps (500): more than the run's 100 steps, so at "
        "the last step alone",
    ]
    unused = {"eval_every_steps": 101}
    assert warnings(train=unused, data={"eval_shards": None}, probe={"methods": [], "every_steps": 200}) == []


def test_a_trace_that_this_start_does_not_come_to_is_said():
    """profile_steps count from this start: what is left of a resumed run counts."""
    profile = {"profile": True, "profile_steps": [4, 6]}
    assert "goes beyond the 5 steps of this start: the trace ends with step 5" in warnings(95, runtime=profile)[0]
    assert "goes beyond the 3 steps of this start: no trace is written" in warnings(97, runtime=profile)[0]
    assert warnings(97, runtime=profile | {"profile": False}) == []


def test_averages_that_are_mostly_the_first_weights_are_said():
    (line,) = warnings(optim={"ema_decay": 0.9999})
    assert "optim.ema_decay (0.9999) over 100 steps leaves 99% of the first weights" in line
