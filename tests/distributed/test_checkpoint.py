"""A resumed run continues bit for bit, and a killed save leaves the checkpoint before it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time

import pytest
import torch

from swinv2_train.checkpoint import Save, load_checkpoint, newest_checkpoint, remove_unfinished, verified_checkpoint
from swinv2_train.config import ConfigError
from swinv2_train.distributed import barrier
from swinv2_train.engine.state import files
from swinv2_train.engine.state.files import Snapshot
from tests.support.harness import run_distributed
from tests.support.toy import build, full_state, save_checkpoint, toy_config, train

CASES = [
    ("local", 0, "fp32", 0),
    *[("deepspeed", stage, "fp32", 0) for stage in (0, 1, 2)],
    pytest.param("deepspeed", 3, "fp32", 0, marks=pytest.mark.smoke),
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
        save_checkpoint(tmp_path, engine, {"step": 3, "images_seen": 3}, world, 2, None)
        return train(engine, world, 3, 2, first=3), full_state(engine)

    def second(world):
        engine = build_it(world)
        path = newest_checkpoint(tmp_path)
        assert load_checkpoint(path, engine, world, 0) == {"step": 3, "images_seen": 3, "best": None}
        return train(engine, world, 3, 2, first=3), full_state(engine)

    expected, weights = run_distributed(uninterrupted, size)[0]
    for part in (first, second):
        history, state = run_distributed(part, size)[0]
        assert history == expected
        assert all(torch.equal(state[key], weights[key]) for key in weights)


KILLS = [
    ("before its part", {1}),
    ("before its part", {0, 1}),
    ("while it flushes", {1}),
    ("while it flushes", {0}),
    ("before it says so", {1}),
    ("before COMPLETE", {0}),
    ("before the rename", {0}),
]


def kill_in_save(when: str) -> None:
    """Let kill -9 meet this process at one point of its next save."""
    die = lambda *_a, **_k: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if when == "before its part":
        Snapshot.write = die
    elif when == "while it flushes":
        os.fsync = die
    elif when == "before COMPLETE":
        Save._commit = die
    else:
        ends = ".json" if when == "before it says so" else "step_00000002"
        replace = os.replace
        os.replace = lambda old, new: die() if str(new).endswith(ends) else replace(old, new)


@pytest.mark.parametrize(("stage", "background"), [(1, True), (3, False)])
@pytest.mark.parametrize(("when", "victims"), KILLS)
def test_kill_9_in_the_middle_of_a_save_leaves_the_previous_checkpoint(when, victims, stage, background, tmp_path):
    """Trap 2: with DeepSpeed's own `latest` the newest checkpoint would lack the killed rank's part."""

    def run(world):
        engine = build(toy_config(stage=stage), world)
        train(engine, world, 1)
        save_checkpoint(tmp_path, engine, {"step": 1, "images_seen": 1}, world, 2, None)
        train(engine, world, 1, first=1)
        if world.rank in victims:
            kill_in_save(when)
        Save(tmp_path, engine, {"step": 2, "images_seen": 2}, world, 2, None, background).finish()

    results = run_distributed(run, 2, may_die=True)
    assert results == [None, None]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())][0] == "step_00000001"
    assert newest_checkpoint(tmp_path).name == "step_00000001"
    left = [path.name for path in remove_unfinished(tmp_path)[0]]
    assert left == (["step_00000002.unfinished"] if 0 in victims else [])  # else rank 0 has heard of it

    def resume(world):
        engine = build(toy_config(stage=stage), world)
        load_checkpoint(newest_checkpoint(tmp_path), engine, world, 0)
        train(engine, world, 1, first=1)
        return save_checkpoint(tmp_path, engine, {"step": 2, "images_seen": 2}, world, 2, None).name

    assert run_distributed(resume, 2) == ["step_00000002"] * 2


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("trouble", ["full disk", "vanished folder"])
def test_rank_that_cannot_write_stops_the_save_on_all_ranks(trouble, rank, background, tmp_path):
    """The error names the path, the checkpoint before stays, nothing half-written is left, and the next save works.
    The limit on a file's size meets the writer in the middle of a file, as a full disk does."""

    def run(world):
        engine = build(toy_config(), world)
        save_checkpoint(tmp_path, engine, {"step": 1, "images_seen": 1}, world, 2, None)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == rank:
            if trouble == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            else:
                take = engine.snapshot

                def snapshot(copy):
                    shutil.rmtree(tmp_path / "checkpoints" / "step_00000002.unfinished")
                    return take(copy)

                engine.snapshot = snapshot
        with pytest.raises(RuntimeError) as caught:
            Save(tmp_path, engine, {"step": 2, "images_seen": 2}, world, 2, None, background).finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        engine.__dict__.pop("snapshot", None)
        left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        return (
            str(caught.value),
            left,
            save_checkpoint(tmp_path, engine, {"step": 3, "images_seen": 3}, world, 2, None).name,
        )

    (text, left, last), other = run_distributed(run, 2)
    reason = "File too large" if trouble == "full disk" else "No such file or directory"
    assert "step_00000002: the checkpoint could not be written ([Errno" in text and reason in text
    assert f"rank {rank}" in text or "ranks 0, 1" in text
    assert "those before it are as they were; mend the disk" in text
    assert left == ["step_00000001"] and last == "step_00000003"
    assert other[0] == text


def test_run_directory_that_vanished_is_not_made_anew(tmp_path):
    """The rest of the run's files would be gone without a word."""

    def run(world):
        engine = build(toy_config(), world)
        with pytest.raises(RuntimeError, match="run/checkpoints/step_00000001: .*No such file or directory"):
            save_checkpoint(tmp_path / "run", engine, {"step": 1, "images_seen": 1}, world, 2, None)

    run_distributed(run, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [1, 3])
def test_flipped_bit_in_any_file_is_found_by_some_rank_and_all_take_the_one_before(size, tmp_path):
    """Each rank reads a part; a file of any of the 2 ranks that saved is read by one of 1 or 3 that resume."""

    def save(world):
        engine = build(toy_config(), world)
        for step in (1, 2):
            save_checkpoint(tmp_path, engine, {"step": step, "images_seen": step}, world, 2, None)

    def choose(world):
        return verified_checkpoint(newest_checkpoint(tmp_path), world)

    run_distributed(save, 2)
    good, bad = (tmp_path / "checkpoints" / f"step_0000000{step}" for step in (1, 2))
    assert run_distributed(choose, size) == [bad] * size
    names = [path.relative_to(bad) for path in sorted(bad.rglob("*")) if path.is_file() and path.name != "COMPLETE"]
    assert len(names) == 8
    for name in names:
        content = bytearray((bad / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bad / name).write_bytes(content)
        assert run_distributed(choose, size) == [good] * size, name
        aside = bad.with_name("step_00000002.damaged")
        assert not bad.exists() and aside.exists()
        content[len(content) // 2] ^= 1
        (aside / name).write_bytes(content)
        os.replace(aside, bad)
    assert run_distributed(choose, size) == [bad] * size


def test_no_checkpoint_left_after_bit_flips_is_an_error_that_names_the_last_on_all_ranks(tmp_path):
    def run(world):
        engine = build(toy_config(), world)
        for step in (1, 2):
            path = (
                save_checkpoint(tmp_path, engine, {"step": step, "images_seen": step}, world, 2, None)
                / "rng"
                / "rank_0001.json"
            )
            if world.is_main:
                path.write_bytes(b"7" + path.read_bytes()[1:])
        barrier()  # or a rank reads its files before they are damaged
        with pytest.raises(
            ConfigError, match="no checkpoint of .* is whole; rank .*step_00000001/rng/rank_0001.json: dam"
        ):
            verified_checkpoint(newest_checkpoint(tmp_path), world)

    run_distributed(run, 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_save_in_the_background_holds_the_state_of_its_step(stage, tmp_path):
    """Training goes on while it is copied and written, and the checkpoint has nothing of it: it equals one that was
    waited for.  The copy takes longer than a forward and a backward pass, so the next step has to wait for it."""

    def run(world):
        engine = build(toy_config(stage=stage, precision="bf16"), world)
        train(engine, world, 1)
        Save(
            tmp_path / "b", engine, {"step": 1, "images_seen": 1}, world, 2, None, background=True
        ).finish()  # its memory is used again
        train(engine, world, 1, first=1)
        save_checkpoint(tmp_path / "a", engine, {"step": 2, "images_seen": 2}, world, 2, None)
        written = threading.Event()
        write = Snapshot.write
        Snapshot.write = lambda *arguments: (written.wait(), write(*arguments))[1]  # not before training went on
        copy = files._copy
        files._copy = lambda *arguments: (time.sleep(1.0), copy(*arguments))[1]
        saving = Save(tmp_path / "b", engine, {"step": 2, "images_seen": 2}, world, 2, None, background=True)
        train(engine, world, 2, first=2)
        assert not saving.path.exists()
        written.set()
        saving.finish()
        return saving.path

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    path = run_distributed(run, 2)[0]
    waited = tmp_path / "a" / "checkpoints" / path.name
    assert (path / "COMPLETE").read_bytes() == (waited / "COMPLETE").read_bytes()  # every file's size and checksum


def test_missing_checkpoint_stops_all_ranks(tmp_path):
    def run(world):
        with pytest.raises(ConfigError, match="step_00000009 is no complete checkpoint"):
            load_checkpoint(tmp_path / "step_00000009", build(toy_config(), world), world, 0)

    run_distributed(run, 2)
