"""A resumed run continues bit for bit, and a killed save leaves the checkpoint before it."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from harness import run_distributed
from toy import build, full_state, toy_config, train

import swinv2_train.checkpoint as checkpoint
from swinv2_train.checkpoint import load_checkpoint, newest_checkpoint, remove_unfinished, save_checkpoint

CASES = [
    ("local", 0, "fp32", 0),
    *[("deepspeed", stage, "fp32", 0) for stage in (0, 1, 2, 3)],
    *[("deepspeed", stage, "bf16", 0) for stage in (1, 2, 3)],
    *[("deepspeed", 3, precision, 100_000) for precision in ("fp32", "bf16")],  # nothing is ever released
]


@pytest.mark.parametrize(("name", "stage", "precision", "persistence"), CASES)
def test_resume_in_fresh_processes_is_bit_exact(name, stage, precision, persistence, tmp_path):
    """Losses, norms, weights and the drop path's random numbers, with accumulation and clipping; and saving does not
    disturb the run that saves."""
    size = 1 if name == "local" else 2

    def build_it(world):
        config = toy_config(name, stage, precision, clip=0.5, micro=8 // size, persistence=persistence)
        torch.manual_seed(100 + world.rank)
        return build(config, world, 2, drop=0.3)

    def uninterrupted(world):
        engine = build_it(world)
        torch.manual_seed(world.rank)
        return train(engine, world, 6, 2)[3:], full_state(engine)

    def first(world):
        engine = build_it(world)
        torch.manual_seed(world.rank)
        train(engine, world, 3, 2)
        save_checkpoint(tmp_path, engine, {"step": 3}, world, 2, None)
        return train(engine, world, 3, 2, first=3), full_state(engine)

    def second(world):
        engine = build_it(world)
        path = newest_checkpoint(tmp_path)
        assert load_checkpoint(path, engine, world) == {"step": 3, "best": None}
        return train(engine, world, 3, 2, first=3), full_state(engine)

    expected, weights = run_distributed(uninterrupted, size)[0]
    for part in (first, second):
        history, state = run_distributed(part, size)[0]
        assert history == expected
        assert all(torch.equal(state[key], weights[key]) for key in weights)


KILLS = [
    ("before its part", "_save_rng", {1}),
    ("before its part", "_save_rng", {0, 1}),
    ("while it flushes", "_sync", {1}),
    ("while it flushes", "_sync", {0}),
    ("before COMPLETE", "_commit", {0}),
    ("before the rename", "os.replace", {0}),
]


@pytest.mark.parametrize(("when", "where", "victims"), KILLS)
@pytest.mark.parametrize("stage", [1, 3])
def test_kill_9_in_the_middle_of_a_save_leaves_the_previous_checkpoint(when, where, victims, stage, tmp_path):
    """Trap 2: with DeepSpeed's own `latest` the newest checkpoint would lack the killed rank's part."""

    def run(world):
        engine = build(toy_config(stage=stage), world)
        train(engine, world, 1)
        save_checkpoint(tmp_path, engine, {"step": 1}, world, 2, None)
        train(engine, world, 1, first=1)
        if world.rank in victims:
            owner, _, name = where.rpartition(".")
            setattr(os if owner else checkpoint, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        save_checkpoint(tmp_path, engine, {"step": 2}, world, 2, None)

    results = run_distributed(run, 2, may_die=True, timeout_sec=90)
    assert results == [None, None]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())][0] == "step_00000001"
    assert newest_checkpoint(tmp_path).name == "step_00000001"
    assert [path.name for path in remove_unfinished(tmp_path)] == ["step_00000002.unfinished"]

    def resume(world):
        engine = build(toy_config(stage=stage), world)
        load_checkpoint(newest_checkpoint(tmp_path), engine, world)
        train(engine, world, 1, first=1)
        return save_checkpoint(tmp_path, engine, {"step": 2}, world, 2, None).name

    assert run_distributed(resume, 2) == ["step_00000002"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_cannot_write_stops_all_ranks(rank, tmp_path):
    """Without raise_together the other rank would wait for it until the timeout."""

    def run(world):
        engine = build(toy_config(), world)
        if world.rank == rank:

            def full(*_args):
                raise OSError("No space left on device")

            checkpoint._save_rng = full
        with pytest.raises(RuntimeError, match=f"rank {rank}: OSError: No space left on device"):
            save_checkpoint(tmp_path, engine, {"step": 1}, world, 2, None)

    run_distributed(run, 2, timeout_sec=30)
    assert newest_checkpoint(tmp_path) is None


def test_missing_checkpoint_stops_all_ranks(tmp_path):
    def run(world):
        from swinv2_train.config import ConfigError

        with pytest.raises(ConfigError, match="step_00000009 is no complete checkpoint"):
            load_checkpoint(tmp_path / "step_00000009", build(toy_config(), world), world)

    run_distributed(run, 2, timeout_sec=30)
