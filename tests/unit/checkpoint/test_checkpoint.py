"""A checkpoint is complete or absent, retention keeps what it promises, and random states come back exactly."""

from __future__ import annotations

import json
import os
import random
import time
import zlib

import numpy as np
import pytest
import torch

from swinv2_train.checkpoint import (
    COMPLETE,
    Save,
    SaveError,
    device_note,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    verified_checkpoint,
)
from swinv2_train.config import ConfigError
from swinv2_train.distributed import World
from swinv2_train.storage.durable import write_durably
from tests.support.one_rank import ONE
from tests.support.toy import save_checkpoint


class OneTensor:
    """The smallest thing with state: saves and loads one real file."""

    copying = None

    def __init__(self, value=0.0, fail=False):
        self.value = torch.tensor(value)
        self.fail = fail

    def snapshot(self, copy):
        return OneTensor(float(self.value), self.fail)

    def write(self, directory):
        sums = {"value": write_durably(directory / "value", [str(float(self.value)).encode()])}
        if self.fail:
            raise OSError("disk full")
        return sums

    def load(self, directory, stop=None):
        self.value = torch.tensor(float((directory / "value").read_text()))


def save(run_dir, step, keep=2, best=None, value=0.0, world=ONE):
    return save_checkpoint(run_dir, OneTensor(value), {"step": step, "images_seen": 8 * step}, world, keep, best)


def steps(run_dir):
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 100, value=3.5)
    assert path == tmp_path / "checkpoints" / "step_00000100"
    assert newest_checkpoint(tmp_path) == path
    engine = OneTensor()
    state = load_checkpoint(path, engine, ONE, 0)
    assert (state["step"], state["images_seen"], float(engine.value)) == (100, 800, 3.5)
    marker = json.loads((path / COMPLETE).read_text())
    assert marker["step"] == 100
    assert marker["world_size"] == 1
    assert marker["files"]["engine/value"] == {"bytes": 3, "crc32": f"{zlib.crc32(b'3.5'):08x}", "rank": 0}
    assert set(marker["files"]) == {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {COMPLETE}


def test_random_states_continue_exactly(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draw()  # leaves a cached gaussian behind in python's and numpy's generators
    path = save(tmp_path, 1)
    expected = [draw(), draw()]
    load_checkpoint(path, OneTensor(), ONE, 0)
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


def test_the_best_by_an_error_of_numbers_is_the_lowest(tmp_path):
    for step, error in [(1, 3.0), (2, 1.0), (3, 2.0)]:
        save(tmp_path, step, keep=1, best=("val_ema/rmse", error))
    assert steps(tmp_path) == [2, 3]


def test_the_best_is_the_best_of_what_is_watched_now(tmp_path):
    """Another train.keep_best after a resume: 50 % and a loss of 1.0 do not compare."""
    save(tmp_path, 1, keep=1, best=("val/top1", 50.0))
    for step, loss in ((2, 1.0), (3, 2.0), (4, 3.0)):
        save(tmp_path, step, keep=1, best=("val_ema/loss", loss))
    assert steps(tmp_path) == [2, 4]


def test_checkpoints_without_a_value_leave_the_best_alone(tmp_path):
    """Not every checkpoint is evaluated."""
    save(tmp_path, 0, keep=1, best=("val/top1", 10.0))
    for step in (1, 2):
        save(tmp_path, step, keep=1)
    assert steps(tmp_path) == [0, 2]


@pytest.mark.parametrize("damage", ["no COMPLETE", "half a COMPLETE", "file gone", "file cut"])
def test_damaged_checkpoint_is_not_the_newest(damage, tmp_path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    value = bad / "engine" / "value"
    if damage == "no COMPLETE":
        (bad / COMPLETE).unlink()
    elif damage == "half a COMPLETE":
        os.truncate(bad / COMPLETE, 20)
    elif damage == "file gone":
        value.unlink()
    else:
        os.truncate(value, 1)
    assert newest_checkpoint(tmp_path) == good
    with pytest.raises(ConfigError, match="choose another"):
        load_checkpoint(bad, OneTensor(), ONE, 0)


def test_failed_save_leaves_the_previous_one_and_nothing_else(tmp_path):
    good = save(tmp_path, 1)
    with pytest.raises(SaveError, match="step_00000002: the checkpoint could not be written .disk full.; those before"):
        save_checkpoint(tmp_path, OneTensor(fail=True), {"step": 2}, ONE, 2, None)
    assert newest_checkpoint(tmp_path) == good
    assert steps(tmp_path) == [1]  # a full disk needs the room
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 3]


def test_remove_unfinished_touches_no_complete_checkpoint(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / "checkpoints" / "step_00000002.unfinished"
    left.mkdir()
    half_removed = tmp_path / "checkpoints" / "step_00000000"
    half_removed.mkdir()
    assert remove_unfinished(tmp_path) == ([half_removed, left], [])
    assert steps(tmp_path) == [1]
    assert remove_unfinished(tmp_path / "no_such_run") == ([], [])
    assert newest_checkpoint(tmp_path / "no_such_run") is None


def test_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, value=1.0)
    path = save(tmp_path, 1, value=2.0)
    engine = OneTensor()
    load_checkpoint(path, engine, ONE, 0)
    assert float(engine.value) == 2.0
    assert steps(tmp_path) == [1]


def test_random_states_of_another_world_size_follow_from_seed_step_and_rank(tmp_path):
    """Nothing that was saved belongs to these ranks, and a restart must draw what the first start drew."""

    def drawn(step, rank, seed):
        path = save(tmp_path, step)
        load_checkpoint(path, OneTensor(), World(rank, rank, 4, 4, torch.device("cpu")), seed)
        return random.random(), np.random.rand(), float(torch.rand(()))

    cases = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 5)]
    found = [drawn(*case) for case in cases]
    assert found == [drawn(*case) for case in cases]
    assert all(len(set(column)) == 4 for column in zip(*found, strict=True))


def test_damaged_checkpoint_of_a_later_step_never_costs_the_last_good_one(tmp_path):
    """With keep=1 a damaged newest one, counted as the newest, would be all that stays."""
    good, bad = save(tmp_path, 1), save(tmp_path, 5)
    (bad / "engine" / "value").write_text("7.0")  # was 0.0: the same size
    assert newest_checkpoint(tmp_path) == bad
    assert verified_checkpoint(bad, ONE) == good
    assert save(tmp_path, 3, keep=1).exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000003",
        "step_00000005.damaged",
    ]
    assert verified_checkpoint(newest_checkpoint(tmp_path), ONE).name == "step_00000003"


def test_checkpoint_just_written_stays_whatever_else_there_is(tmp_path):
    """Checkpoints of later steps were written by a start that nobody goes on from; they may be damaged."""
    save(tmp_path, 7)
    save(tmp_path, 8)
    assert save(tmp_path, 2, keep=2).exists()
    assert steps(tmp_path) == [2, 7, 8]


def test_unreadable_state_of_an_old_checkpoint_does_not_end_a_save(tmp_path):
    """Retention reads its score; the disk's fault in an old file must not cost the new one."""
    old = save(tmp_path, 1, best=("val/top1", 10.0)) / "state.json"
    old.write_text("x" * old.stat().st_size)
    save(tmp_path, 2, keep=2)
    save(tmp_path, 3, keep=2)
    assert steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("where", ["run_dir", "checkpoints"])
def test_vanished_directory_is_named(where, tmp_path):
    """A run directory that is gone is not made anew: its history would be missing without a word."""
    run_dir = tmp_path / "run"
    if where == "checkpoints":
        run_dir.mkdir()
        (run_dir / "checkpoints").write_text("a file")
    with pytest.raises(SaveError, match=f"{run_dir}/checkpoints/step_00000001: .*(No such file|File exists)"):
        save(run_dir, 1)
    assert run_dir.exists() == (where == "checkpoints")


def test_save_in_the_background_is_complete_after_finish_and_tells_its_error(tmp_path):
    """Nobody waits for the writing; what goes wrong is known before and raised by finish."""
    saving = Save(tmp_path, OneTensor(2.0), {"step": 1}, ONE, 1, None, background=True)
    assert saving.finish() == newest_checkpoint(tmp_path) and saving.error is None
    saving = Save(tmp_path, OneTensor(fail=True), {"step": 2}, ONE, 1, None, background=True)
    deadline = time.monotonic() + 10
    while saving.error is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "disk full" in str(saving.error)
    with pytest.raises(SaveError, match="disk full"):
        saving.finish()
    assert steps(tmp_path) == [1]


def test_state_that_json_cannot_hold_is_an_error_and_no_checkpoint(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, OneTensor(), {"step": 1, "x": torch.ones(1)}, ONE, 2, None)
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_of_a_cpu_goes_on_on_a_gpu(tmp_path, monkeypatch):
    """It holds no random state of a GPU, whose numbers then follow from (seed, step, rank); it was a KeyError."""
    path = save(tmp_path, 1)
    seeds, restored = [], []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(device))
    gpu = World(0, 0, 1, 1, torch.device("cuda", 0))
    for seed in (0, 0, 5):
        load_checkpoint(path, OneTensor(), gpu, seed)
    assert seeds[0] == seeds[1] != seeds[2] and restored == []
    assert "was saved on a CPU and goes on on a GPU" in (device_note(path, gpu) or "")
    assert device_note(path, ONE) is None

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    path = save(tmp_path, 2, world=gpu)
    load_checkpoint(path, OneTensor(), gpu, 0)
    assert len(seeds) == 3 and restored == [gpu.device]
    assert "was saved on a GPU and goes on on a CPU" in (device_note(path, ONE) or "")
    assert device_note(path, gpu) is None
