"""A run whose disk fills up, turns read-only or is taken away: one clear error, and the old checkpoints go on."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from tests.support.commands import alone, command, finish, losses, start, wait_for_step

pytestmark = pytest.mark.slow
ENDLESS = ("train.max_steps=100000", "train.log_every_steps=2")


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., None]]:
    """mount(ARGUMENTS..., FOLDER), undone in the end; skips where this user may not."""
    mounted: list[str] = []

    def call(*arguments: str | Path) -> None:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
        while "busy" in done.stderr:  # a file of the run is open for writing at this moment
            time.sleep(0.01)
            done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
        if "remount" not in str(arguments):
            mounted.append(str(arguments[-1]))

    yield call
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


def goes_on(run_dir: Path, shards: tuple[str, ...], checkpoint: Path | None) -> None:
    """The same command resumes from the checkpoint and saves again."""
    assert checkpoint is not None
    steps = int(checkpoint.name.removeprefix("step_")) + 4
    code, output = finish(alone(run_dir, *shards, f"train.max_steps={steps}"))
    assert code == EXIT_DONE and f"resuming from {checkpoint}" in output, output
    assert newest_checkpoint(run_dir) == checkpoint.with_name(f"step_{steps:08d}")
    assert max(losses(run_dir)) == steps


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_stops_the_save_and_nothing_is_lost(background, mount, shards, tmp_path):
    """Room for the metrics but not for another checkpoint of 0.6 MB: what was half written makes room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=24m", "none", disk)
    run_dir, ballast = disk / "run", disk / "ballast"
    process = alone(run_dir, *shards, *ENDLESS, f"train.background_save={background}")
    wait_for_step(run_dir, 5, process)
    with open(ballast, "wb", buffering=0) as file:
        while shutil.disk_usage(disk).free > 300_000:
            file.write(bytes(min(2**20, shutil.disk_usage(disk).free - 290_000)))
    code, output = finish(process)
    assert code == EXIT_FAILED, output
    message = "the checkpoint could not be written ([Errno 28] No space left on device)"
    assert f"rank 0 failed: RankError: rank 0: SaveError: {run_dir}/checkpoints/step_" in output and message in output
    checkpoint = newest_checkpoint(run_dir)
    assert [path for path in disk.rglob("*") if "unfinished" in path.name or path.suffix == ".tmp"] == []
    assert shutil.disk_usage(disk).free > 200_000, "the half written checkpoint was left behind"
    ballast.unlink()
    goes_on(run_dir, shards, checkpoint)


def test_a_disk_that_turns_read_only_stops_the_save(mount, shards, tmp_path):
    """As file systems do after an error of the disk.  A start there is refused; when it is writable, it goes on."""
    run_dir = tmp_path / "run"
    process = alone(run_dir, *shards, *ENDLESS)
    wait_for_step(run_dir, 5, process)
    mount("--bind", run_dir, run_dir)
    mount("-o", "remount,bind,ro", run_dir)
    code, output = finish(process)
    assert code == EXIT_FAILED, output
    assert f"SaveError: {run_dir}/checkpoints/step_" in output and "[Errno 30] Read-only file system" in output
    checkpoint = newest_checkpoint(run_dir)
    code, output = finish(alone(run_dir, *shards))
    assert code == EXIT_USER_ERROR and f"error: run_dir ({run_dir}) is read-only" in output, output
    mount("-o", "remount,bind,rw", run_dir)
    goes_on(run_dir, shards, checkpoint)


def test_a_directory_that_vanishes_stops_the_run_on_all_ranks(shards, tmp_path):
    """Removed while it runs: no rank makes a new one with half a run in it, and none hangs."""
    run_dir = tmp_path / "run"
    process = start(*command(run_dir, *ENDLESS), *shards)
    wait_for_step(run_dir, 5, process)
    shutil.rmtree(run_dir.rename(tmp_path / "removed"))  # at once: what is made meanwhile would keep it
    code, output = finish(process)
    assert code == 1 and not run_dir.exists(), output
    for rank in range(2):
        assert f"rank {rank} failed: RankError: rank 0: SaveError: {run_dir}/checkpoints/step_" in output, output
    assert f"No such file or directory: '{run_dir}/checkpoints'" in output
