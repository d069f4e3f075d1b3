"""A checkpoint is complete or absent, retention keeps what it promises, and random states come back exactly."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
import torch

from swinv2_train.checkpoint import (
    COMPLETE,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from swinv2_train.config import ConfigError
from swinv2_train.distributed import World

ONE = World(0, 0, 1, 1, torch.device("cpu"))


class OneTensor:
    """The smallest thing with state: saves and loads one real file."""

    def __init__(self, value=0.0, fail=False):
        self.value = torch.tensor(value)
        self.fail = fail

    def save(self, directory):
        directory.mkdir(parents=True)
        torch.save(self.value, directory / "value.pt")
        if self.fail:
            raise OSError("disk full")

    def load(self, directory):
        self.value = torch.load(directory / "value.pt", weights_only=True)


def save(run_dir, step, keep=2, best=None, value=0.0):
    return save_checkpoint(run_dir, OneTensor(value), {"step": step, "images_seen": 8 * step}, ONE, keep, best)


def steps(run_dir):
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 100, value=3.5)
    assert path == tmp_path / "checkpoints" / "step_00000100"
    assert newest_checkpoint(tmp_path) == path
    engine = OneTensor()
    state = load_checkpoint(path, engine, ONE)
    assert (state["step"], state["images_seen"], float(engine.value)) == (100, 800, 3.5)
    marker = json.loads((path / COMPLETE).read_text())
    assert marker["step"] == 100
    assert marker["world_size"] == 1
    assert set(marker["files"]) == {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {COMPLETE}


def test_random_states_continue_exactly(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draw()  # leaves a cached gaussian behind in python's and numpy's generators
    path = save(tmp_path, 1)
    expected = [draw(), draw()]
    load_checkpoint(path, OneTensor(), ONE)
    assert [draw(), draw()] == expected


def test_newest_n_and_the_best_are_kept(tmp_path):
    for step, top1 in enumerate([10.0, 50.0, 20.0, 30.0, 40.0]):
        save(tmp_path, step, keep=2, best=("val/top1", top1))
    assert steps(tmp_path) == [1, 3, 4]
    save(tmp_path, 5, keep=2, best=("val/top1", 60.0))
    assert steps(tmp_path) == [4, 5]


def test_the_best_by_loss_is_the_lowest_and_nan_is_never_best(tmp_path):
    for step, loss in enumerate([0.5, 0.1, float("nan"), 0.3]):
        save(tmp_path, step, keep=1, best=("val/loss", loss))
    assert steps(tmp_path) == [1, 3]


def test_checkpoints_without_a_value_leave_the_best_alone(tmp_path):
    """Not every checkpoint is evaluated."""
    save(tmp_path, 0, keep=1, best=("val/top1", 10.0))
    for step in (1, 2):
        save(tmp_path, step, keep=1)
    assert steps(tmp_path) == [0, 2]


@pytest.mark.parametrize("damage", ["no COMPLETE", "half a COMPLETE", "file gone", "file cut"])
def test_damaged_checkpoint_is_not_the_newest(damage, tmp_path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    value = bad / "engine" / "value.pt"
    if damage == "no COMPLETE":
        (bad / COMPLETE).unlink()
    elif damage == "half a COMPLETE":
        os.truncate(bad / COMPLETE, 20)
    elif damage == "file gone":
        value.unlink()
    else:
        os.truncate(value, 10)
    assert newest_checkpoint(tmp_path) == good
    with pytest.raises(ConfigError, match="choose another"):
        load_checkpoint(bad, OneTensor(), ONE)


def test_failed_save_leaves_the_previous_one_and_is_cleaned_up_by_the_next(tmp_path):
    good = save(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, OneTensor(fail=True), {"step": 2}, ONE, 2, None)
    assert newest_checkpoint(tmp_path) == good
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 3]


def test_remove_unfinished_touches_no_complete_checkpoint(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / "checkpoints" / "step_00000002.unfinished"
    left.mkdir()
    half_removed = tmp_path / "checkpoints" / "step_00000000"
    half_removed.mkdir()
    assert remove_unfinished(tmp_path) == [half_removed, left]
    assert steps(tmp_path) == [1]
    assert remove_unfinished(tmp_path / "no_such_run") == []
    assert newest_checkpoint(tmp_path / "no_such_run") is None


def test_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, value=1.0)
    path = save(tmp_path, 1, value=2.0)
    engine = OneTensor()
    load_checkpoint(path, engine, ONE)
    assert float(engine.value) == 2.0
    assert steps(tmp_path) == [1]


def test_another_world_size_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ConfigError, match="was saved by 1 ranks, this run has 4; start 1 ranks to resume it"):
        load_checkpoint(path, OneTensor(), World(0, 0, 4, 4, torch.device("cpu")))


def test_state_that_json_cannot_hold_is_an_error_and_no_checkpoint(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, OneTensor(), {"step": 1, "x": torch.ones(1)}, ONE, 2, None)
    assert newest_checkpoint(tmp_path) is None
