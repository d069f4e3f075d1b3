"""Which checkpoint a path means, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swinv2_train.checkpoint import COMPLETE, find_checkpoint, newest_checkpoint
from swinv2_train.config import ConfigError


def make(run_dir: Path, step: int) -> Path:
    """A complete checkpoint of one file."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    (path / COMPLETE).write_text(json.dumps({"step": step, "world_size": 1, "files": {"state.json": {"bytes": 2}}}))
    return path


def test_a_run_means_its_newest_checkpoint_and_a_checkpoint_itself(tmp_path):
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    assert find_checkpoint(tmp_path) == newer and find_checkpoint(older) == older


def test_a_damaged_or_missing_checkpoint_that_was_named_is_refused_by_name(tmp_path):
    """Who names one wants this one; weights that are torn must not be evaluated or fine-tuned."""
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    (older / "state.json").write_text("torn, and longer")
    with pytest.raises(ConfigError, match=rf"{older}/state.json: 16 bytes, COMPLETE says 2 bytes; choose another"):
        find_checkpoint(older)
    (newer / COMPLETE).unlink()
    with pytest.raises(ConfigError, match=rf"{newer} is no complete checkpoint \(COMPLETE is missing\)"):
        find_checkpoint(newer)
    with pytest.raises(ConfigError, match="step_00000011 is no complete checkpoint"):
        find_checkpoint(tmp_path / "checkpoints" / "step_00000011")


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(ConfigError, match="holds no complete checkpoint; name the directory of a run"):
        find_checkpoint(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(tmp_path, capsys):
    """That would overwrite its history; one whole checkpoint is enough, and the loss is said."""
    damaged = make(tmp_path, 10)
    (damaged / "state.json").write_text("torn")
    with pytest.raises(ConfigError, match="no checkpoint of .* is whole"):
        newest_checkpoint(tmp_path)
    whole = make(tmp_path, 9)
    assert newest_checkpoint(tmp_path) == whole
    assert f"damaged checkpoint passed over for {whole}" in capsys.readouterr().err
