"""What of a run directory that somebody gave away reaches a server, or is written outside of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from swinv2_train import evaluate
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.load import config_yaml
from swinv2_train.data.shards.cache_files import is_our_cache
from swinv2_train.data.shards.cache_room import room_lock
from swinv2_train.evaluation.saved_places import SCHEMES, confined
from tests.support.configs import composed


def of_run(**data: object) -> Config:
    config = composed(["task=classify", "task.num_classes=3", "run_dir=THEIRS", "data.shards=unused.tar"])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def our_cache(folder: Path) -> str:
    folder.mkdir(mode=0o700)
    with room_lock(str(folder)):
        pass
    return str(folder)


def test_files_of_this_machine_are_read_without_a_word(tmp_path):
    config = of_run(eval_shards="/data/val-*.tar::file:///data/more.tar", cache_dir=str(tmp_path))
    assert confined(config, []) == (config, [])


def test_a_server_is_asked_and_that_is_said(tmp_path):
    """One's own run is evaluated as before."""
    config = of_run(
        eval_shards="https://me:REDACTED@host:8080/val.tar?REDACTED", cache_dir=our_cache(tmp_path / "cache")
    )
    same, notes = confined(config, [])
    assert same == config
    assert notes == ["note: asking host:8080 for images, as THEIRS/config.yaml says (data.eval_shards)"]


@pytest.mark.parametrize("address", ["smb://evil/x.tar", "dask://evil:1/x.tar", "git://a:b@/x.tar", "ssh://h/x.tar",
                                     "a.tar::reference://x.tar", "simplecache://x.tar", "pipe://x.tar"])  # fmt: skip
def test_protocols_that_do_more_than_read_are_the_command_lines_alone(address):
    config = of_run(eval_shards=address)
    with pytest.raises(ConfigError, match=r"data.eval_shards \(.*\) is out of THEIRS/config.yaml, from which only"):
        confined(config, ["data.shards"])
    assert confined(config, ["data.eval_shards"]) == (config, [])
    assert not set(SCHEMES) & {"ssh", "sftp", "file", "ftp", "smb", "dask", "git", "reference"}


def test_probes_and_further_splits_are_looked_at_too():
    for overrides in (
        ["+data.eval_splits.a.shards='smb://evil/a.tar'"],
        ["probe.methods=[knn]", "probe.shards='smb://evil/a.tar'"],
        ["probe.methods=[knn]", "data.shards='smb://evil/a.tar'"],
    ):
        arguments = ["task=classify", "task.num_classes=3", "run_dir=THEIRS", "data.shards=x.tar",
                     "data.eval_shards=y.tar"]  # fmt: skip
        taken = {each.partition("=")[0] for each in overrides}
        config = composed([*(each for each in arguments if each.partition("=")[0] not in taken), *overrides])
        with pytest.raises(ConfigError, match="smb://evil/a.tar"):
            confined(config, [])


def test_a_folder_is_written_into_where_it_is_a_cache_of_ours(tmp_path):
    """A run directory may name ~/.ssh, or a folder of everybody's, and say that it may hold a byte."""
    (tmp_path / "precious").mkdir(mode=0o700)
    open_to_all = Path(our_cache(tmp_path / "open"))
    open_to_all.chmod(0o777)
    linked = Path(our_cache(tmp_path / "linked"))
    (linked / "room.lock").unlink()
    (linked / "room.lock").symlink_to(tmp_path / "precious")
    for folder in (tmp_path / "precious", open_to_all, linked, tmp_path / "none"):
        config = of_run(eval_shards="https://host/val.tar", cache_dir=str(folder))
        changed, notes = confined(config, [])
        assert changed.data.cache_dir is None and f"data.cache_dir ({folder}) of THEIRS" in notes[1], folder
        assert not is_our_cache(folder)
        assert confined(config, ["data.cache_dir"])[0] == config
    assert os.listdir(tmp_path / "precious") == []


def test_the_evaluate_command_takes_a_saved_configuration_so(tmp_path):
    """Before any file of a checkpoint is looked at."""
    (tmp_path / "config.yaml").write_text(config_yaml(of_run(eval_shards="smb://evil/x.tar")))
    with pytest.raises(ConfigError, match="data.eval_shards"):
        evaluate.parse([f"run_dir={tmp_path}"])
    config, request = evaluate.parse([f"run_dir={tmp_path}", "data.eval_shards='https://host/x.tar'"])
    assert config.data.eval_shards == "https://host/x.tar" and request.notes == ()
    (tmp_path / "config.yaml").write_text(config_yaml(of_run(eval_shards="https://host/x.tar")))
    assert evaluate.parse([f"run_dir={tmp_path}"])[1].notes[0].startswith("note: asking host for images")
