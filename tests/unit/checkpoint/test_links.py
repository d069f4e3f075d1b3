"""Retention and links: nothing outside of a run directory is written or removed, and no save fails for an old one."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from swinv2_train.checkpoint import COMPLETE, Save, SaveError, newest_checkpoint, verified_checkpoint
from swinv2_train.checkpoint.finding import free_name, remove_folder, remove_unfinished
from swinv2_train.config import ConfigError
from swinv2_train.training.build import WRITTEN, make_run_dir
from tests.support.one_rank import ONE
from tests.unit.checkpoint.test_checkpoint import OneTensor, save


def saved(run_dir: Path, step: int, keep: int = 2) -> Save:
    saving = Save(run_dir, OneTensor(), {"step": step, "images_seen": step}, ONE, keep, None, background=False)
    saving.finish()
    return saving


def moved_and_linked(run_dir: Path, step: int, elsewhere: Path) -> Path:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_that_was_moved_and_linked_back_stays_whole(tmp_path):
    """Retention took its COMPLETE mark through the link, and then every save failed at the link."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "big_disk"
    elsewhere.mkdir()
    run_dir.mkdir()
    save(run_dir, 1)
    link = moved_and_linked(run_dir, 1, elsewhere)
    before = contents(elsewhere)
    assert saved(run_dir, 2).warnings == []  # it counts among the newest
    for step in (3, 4, 5):
        warnings = saved(run_dir, step).warnings
        assert len(warnings) == 1 and warnings[0].startswith(f"{link} is a link, which is left alone; ")
    assert contents(elsewhere) == before and link.is_symlink()
    assert newest_checkpoint(run_dir).name == "step_00000005"
    assert names(run_dir) == ["step_00000001", "step_00000004", "step_00000005"]
    assert verified_checkpoint(link, ONE) == link  # and is whole


def test_a_step_that_is_saved_again_takes_the_place_of_a_link(tmp_path):
    """After a resume from an earlier checkpoint; what the link leads to is not touched."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "big_disk"
    elsewhere.mkdir()
    run_dir.mkdir()
    save(run_dir, 1)
    moved_and_linked(run_dir, 1, elsewhere)
    before = contents(elsewhere)
    for _ in range(3):
        assert any("is a link" in warning for warning in saved(run_dir, 1).warnings) or _ > 0
    assert contents(elsewhere) == before
    assert not (run_dir / "checkpoints" / "step_00000001").is_symlink()
    shutil.rmtree(elsewhere)
    (run_dir / "checkpoints" / "step_00000002").symlink_to(elsewhere / "gone")  # one that leads nowhere
    save(run_dir, 2)
    assert newest_checkpoint(run_dir).name == "step_00000002"


def test_links_among_what_a_killed_save_left_are_left_alone(tmp_path):
    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    for name in ("step_00000001", "step_00000003.unfinished", "step_00000009.replaced.unfinished"):
        (tmp_path / "checkpoints" / name).symlink_to(elsewhere)
    save(tmp_path, 3)  # whose own unfinished folder has the name of a link
    save(tmp_path, 9)
    save(tmp_path, 9)  # and here the one that is replaced
    assert contents(elsewhere) == {"file": b"mine"}
    assert newest_checkpoint(tmp_path).name == "step_00000009"
    assert sum(path.is_symlink() for path in (tmp_path / "checkpoints").iterdir()) == 3
    assert remove_unfinished(tmp_path) == ([], [])


def test_a_damaged_checkpoint_is_set_aside_beside_a_link_of_that_name(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "precious"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    run_dir.mkdir()
    save(run_dir, 1)
    path = save(run_dir, 2)
    (run_dir / "checkpoints" / "step_00000002.damaged").symlink_to(elsewhere)
    value = path / "engine" / "value"
    value.write_text("9" * value.stat().st_size)
    assert verified_checkpoint(path, ONE).name == "step_00000001"
    assert contents(elsewhere) == {"file": b"mine"}
    assert (run_dir / "checkpoints" / "step_00000002.damaged.1").is_dir()


@pytest.fixture
def locked(tmp_path):
    """locked(path): nothing below can be removed, as on a file system that became read-only or keeps .nfs files."""
    with contextlib.ExitStack() as stack:
        yield lambda path: stack.enter_context(_immutable(path))


@contextlib.contextmanager
def _immutable(path: Path):
    """By mode where that counts; root needs a mount, or a file that is kept open elsewhere: a mount point will do."""
    if os.geteuid():
        path.chmod(0o500)
        yield
        path.chmod(0o700)
        return
    import subprocess

    done = subprocess.run(["mount", "--bind", path / "engine", path / "engine"], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("neither modes nor mounts protect a folder here")
    try:
        yield
    finally:
        subprocess.run(["umount", path / "engine"], check=True)


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_save(tmp_path, locked):
    """Read-only, busy, or with the .nfs files of another host: a warning names it, and the run goes on."""
    save(tmp_path, 1)
    old = tmp_path / "checkpoints" / "step_00000001"
    locked(old)
    save(tmp_path, 2)
    for step in (3, 4):
        warnings = saved(tmp_path, step).warnings
        assert len(warnings) >= 1 and all(f"{old} cannot be removed (" in warning for warning in warnings)
    assert newest_checkpoint(tmp_path).name == "step_00000004"
    assert {"step_00000003", "step_00000004"} <= set(names(tmp_path))


@pytest.mark.parametrize(
    "name", [*WRITTEN, "logs/rank_00000.log", "health/rank_00000.json", "sample_keys/rank_0.jsonl"]
)
def test_a_run_directory_that_leads_elsewhere_is_refused_at_the_start(tmp_path, name):
    """A run directory of somebody else could append to any file of the user's."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = run_dir / name
    path.parent.mkdir(parents=True)
    path.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=rf"{path} is a link \(to {elsewhere}\), and a run writes nothing outside"):
        make_run_dir(run_dir)


def test_a_linked_folder_of_checkpoints_is_not_written_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="is a link, and nothing is written outside of a run directory"):
        save(tmp_path / "run", 1)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_run_directory_may_itself_be_a_link(tmp_path):
    """It is the user's own command line that names it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    make_run_dir(tmp_path / "run")
    assert (save(tmp_path / "run", 1) / COMPLETE).exists()


def test_names_beside_each_other(tmp_path):
    assert free_name(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").symlink_to("nowhere")
    assert free_name(tmp_path / "a") == tmp_path / "a.1"
    assert "is a link" in remove_folder(tmp_path / "a") and remove_folder(tmp_path / "b") is None
