"""One place defines the keys: --help and docs/configuration.md say what the schema and conf/ say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import key_help, key_reference, run_command, run_on_weights
from swinv2_train.config.keys import known_keys
from swinv2_train.config.schema import TASKS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def entries():
    return {entry.name: entry for entry in key_reference()}


def test_the_page_of_all_keys_is_what_its_script_writes(tmp_path):
    """Else the page tells last month's ranges."""
    out = tmp_path / "configuration.md"
    script = ROOT / "scripts" / "write_configuration.py"
    subprocess.run([sys.executable, str(script), str(out)], check=True, stdout=subprocess.DEVNULL, timeout=300)
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert out.read_text() == page, "run: python scripts/write_configuration.py"
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 160


def test_every_key_has_a_meaning_and_a_default(entries):
    assert list(entries) == known_keys()
    for entry in entries.values():
        assert entry.meaning and entry.type and entry.defaults, entry.name
        assert all(entry.defaults.values()), entry.name


def test_an_entry_holds_what_stands_at_the_key_and_in_conf(entries):
    """A default is that of its task, and what must be given says so."""
    assert entries["optim.lr"].allowed == "at least 0"
    assert entries["optim.lr"].default == (
        "0.0008 (task=simmim), 0.005 (task=classify), 4e-05 (task=segment), 0.0001 (task=detect)"
    )
    assert entries["optim.betas"].allowed == "2 numbers; each at least 0 and less than 1"
    assert entries["engine.precision"].allowed == "one of fp32, bf16"
    assert entries["hardware.device"].allowed == "one of null, cuda, cpu"
    assert (entries["train.epochs"].type, entries["model.depths"].type) == ("float or null", "list of int or null")
    assert (entries["run_dir"].default, entries["data.eval_splits"].default) == ("???", "{}")
    assert (entries["log.wandb_artifacts"].default, entries["train.keep_best"].default) == ("[]", "null")


def test_a_key_that_tasks_understand_otherwise_is_told_for_each():
    """The last task's words stood for all: weights of a classifier's classes were called those of pixels."""
    told = {tuple(each.defaults): each for each in key_reference() if each.name == "task.num_classes"}
    assert {tasks: each.defaults[tasks[0]] for tasks, each in told.items()} == {
        ("classify",): "1000", ("segment",): "150", ("detect",): "80",
    }  # fmt: skip
    assert [told[task,].allowed for task in ("classify", "segment", "detect")] == [
        "at least 1", "at least 2", "at least 1",
    ]  # fmt: skip
    assert len({each.meaning for each in told.values()}) == 3
    same = [each for each in key_reference() if each.name == "task.init_from"]
    assert len(same) == 1 and len(same[0].defaults) == len(TASKS)
    heads = [line for line in key_help(["--help", "task.class_weights"]).splitlines() if line[:1].strip()]
    assert heads == ["task.class_weights (task=classify)", "task.class_weights (task=segment)"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_with_a_key_says_what_it_means(flag, monkeypatch, capsys):
    """The same for the train command, whose help is Hydra's, and for those with a usage of their own."""
    monkeypatch.setattr(sys, "argv", ["train", flag, "optim.lr", "experiment=cifar10_simmim"])
    told = []
    for start in (lambda: run_command(pytest.fail), lambda: run_on_weights("usage", pytest.fail, pytest.fail)):
        with pytest.raises(SystemExit) as left:
            start()
        assert left.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and told[0].startswith("optim.lr\n    Peak learning rate")
    assert "\n    type: float\n    allowed: at least 0\n    default: 0.0008 (task=simmim), 0.005" in told[0]


def test_help_with_a_section_says_it_of_each_of_its_keys():
    text = key_help(["--help", "optim.schedule", "seed"])
    heads = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert heads == [key for key in known_keys() if key.startswith("optim.schedule.")] + ["seed"]


def test_help_with_an_unknown_key_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"--help optim.lrr: there is no such key or section; did you mean optim.lr\?"
    ):
        key_help(["--help", "optim.lrr"])
    assert key_help(["--help", "--cfg", "job", "seed=1"]) == ""
