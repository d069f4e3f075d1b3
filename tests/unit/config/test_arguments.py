"""What is typed is what is meant: a key once, a text letter by letter, a home for ~; messages say how to quote."""

from __future__ import annotations

import configparser
import importlib
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import swinv2_train
from swinv2_train import evaluate, export, plan
from swinv2_train.config import ConfigError
from swinv2_train.config.arguments import check_once, last_of_each, prepared
from swinv2_train.config.command_line import compose_argv, compose_overrides, compose_source
from swinv2_train.config.keys import all_keys
from swinv2_train.config.load import config_yaml, load_config
from tests.support.configs import composed

NEEDED = ("run_dir=r", "data.shards=s")
TYPED = (
    "20260101_120000", "1e-3", "0012", "1_000", "true", "0x1F", ".5", "inf", "a=b", "x (copy)", "a{000..003}.tar",
    "ü&b", "it's", "back\\", "a\\'b", "[x]", "{x}", "a,b", " padded ", "$x", "a:b", "#1", "!x", "2026-01-01",
)  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_a_text_is_what_was_typed(text):
    """run_dir=20260101_120000 made the directory 20260101120000, and run_dir=1e-3 made 0.001."""
    config = composed(prepared([f"run_dir={text}", f"data.shards={text}", f"log.wandb_name={text}"]))
    assert (config.run_dir, config.data.shards, config.log.wandb_name) == (text, text, text)


def test_every_key_that_holds_text_keeps_it():
    """Also those that may be null, lists, and the user's own splits; null stays null, and quotes may be typed too."""
    texts = [key.name for key in all_keys() if key.kind in (str, str | None) and not key.name.endswith("name")]
    for name in texts:
        (word,) = prepared([f"{name}=1e-3"])
        assert word == f"{name}='1e-3'", name
    assert prepared(["optim.no_decay=[1d,1e5, '1_0',\"x\"]"]) == ["optim.no_decay=['1d','1e5','1_0',\"x\"]"]
    for name in (key.name for key in all_keys() if key.is_text_list):
        assert prepared([f"{name}=[1e3,0x1,1_000]"]) == [f"{name}=['1e3','0x1','1_000']"], name
    assert prepared(["optim.no_decay=[]", "log.wandb_name=null", "run_dir="]) == [
        "optim.no_decay=[]", "log.wandb_name=null", "run_dir=",
    ]  # fmt: skip
    config = compose_overrides([
        *NEEDED, "optim.no_decay=[1d,1e5]", "+data.eval_splits.v2.shards=1e-3", "log.wandb_name='1e-3'",
        "data.eval_shards=null", "optim.lr=1e-3",
    ])  # fmt: skip
    assert config.optim.no_decay == ["1d", "1e5"] and config.data.eval_splits["v2"].shards == "1e-3"
    assert (config.log.wandb_name, config.data.eval_shards, config.optim.lr) == ("1e-3", None, 1e-3)


def test_a_text_that_was_read_as_a_number_before_it_came_here_is_refused():
    """In a dictionary, or in a YAML file: what was typed is not known any more."""
    with pytest.raises(ConfigError, match=r"data.eval_splits.v2.shards \(0.001\) is a text, and was read as a number"):
        compose_overrides([*NEEDED, "+data.eval_splits={v2: {shards: 1e-3}}"])
    with pytest.raises(ConfigError, match=r"task.class_names \(1000.0\) is a text, and was read as a number"):
        load_config(OmegaConf.create({"task": {"name": "segment", "class_names": [1e3]}}))


def test_the_other_commands_keep_it_too(tmp_path):
    run_dir = tmp_path / "1e-3"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(config_yaml(compose_overrides([f"run_dir={run_dir}", "data.shards=s"])))
    config, own = compose_source([f"run_dir={run_dir}", "data.eval_shards=1e-3", "out=0012"], ("out",))
    assert (config.run_dir, config.data.eval_shards, own) == (str(run_dir), "1e-3", {"out": "0012"})


@pytest.mark.parametrize(
    "words",
    [
        ("data.shards=a/train-000000.tar", "data.shards=a/train-000001.tar"),  # a brace that bash has taken apart
        ("experiment=cifar10_simmim", "experiment=simmim_base_192"),
        ("optim.lr=1", "+optim.lr=2"),
        ("++optim.lr=1", "optim.lr=2"),
        ("optim.lr=1", "~optim.lr"),
        ("hardware=h100", "hardware=cpu"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(words, monkeypatch):
    """The last one won in silence: a pattern that the shell had expanded trained on its last shard alone."""
    monkeypatch.setattr(sys, "argv", ["train", *words, "run_dir=r"])
    with pytest.raises(ConfigError, match=re.escape(f"({words[0]} and {words[1]}); give it once")) as refused:
        compose_argv()
    assert "quote the whole word" in str(refused.value) and "train-{000000..000009}.tar'" in str(refused.value)


def test_a_key_that_is_given_twice_alike_is_no_matter(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", *NEEDED, *NEEDED, "optim.lr=0.5", "++optim.lr=0.5"])
    assert compose_argv().optim.lr == 0.5


def test_a_programs_overrides_are_laid_over_each_other():
    """What the demo sets, and what its user sets instead."""
    assert last_of_each(["a=1", "b=2", "+a=3", "--cfg", "job"]) == ["+a=3", "b=2", "--cfg", "job"]


@pytest.mark.parametrize("command", [evaluate, export, plan])
def test_every_command_refuses_a_key_that_is_given_twice(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "run_dir=a", "run_dir=b", "out=c", "format=timm"])
    with pytest.raises(SystemExit) as left:
        command.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and "run_dir is given twice with different values (run_dir=a and run_dir=b)" in said


def test_a_section_and_a_key_of_it_are_refused():
    with pytest.raises(ConfigError, match="set the same section"):
        check_once(["+data.eval_splits.v2={shards: a}", "+data.eval_splits.v2.shards=b"])


def test_secrets_of_an_address_are_not_repeated():
    with pytest.raises(ConfigError) as refused:
        check_once(["data.shards=https://me:pw@host/a.tar?sig=secret", "data.shards=b"])
    assert "pw" not in str(refused.value) and "secret" not in str(refused.value) and "host/a.tar" in str(refused.value)


@pytest.mark.parametrize("words", [("data.shards=a.tar", "b.tar"), ("run_dir=my", "run"), ("run",)])
def test_a_word_without_a_value_says_how_to_quote(words):
    """`data.shards= *.tar`, or a space in a path: Hydra's words for it name a grammar."""
    with pytest.raises(ConfigError, match=rf"'{words[-1]}'.* is no KEY=VALUE; .*quote the whole word"):
        compose_overrides([*words, "train.epochs=1"])


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra/launcher"])
def test_hydras_own_settings_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key}=x: Hydra's own settings are fixed here"):
        prepared([f"{key}=x"])


def test_flags_and_their_words_pass(monkeypatch, capsys):
    assert prepared(["--cfg", "job", "-p", "optim"]) == ["--cfg", "job", "-p", "optim"]
    monkeypatch.setattr(sys, "argv", ["train", "--cfg", "job", "run_dir=1e-3"])
    assert compose_argv() is None and "run_dir: '1e-3'" in capsys.readouterr().out
    assert sys.argv == ["train", "--cfg", "job", "run_dir=1e-3"], "environment.json keeps what was typed"


def test_a_tilde_is_the_home_in_every_key_that_names_a_path(monkeypatch, tmp_path):
    """A shell expands it at the begin of a word alone, so run_dir=~/x made a directory called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [key.name for key in all_keys() if key.is_path and not key.name.startswith("data.eval_splits")]
    given = [f"{name}=~/x" for name in paths]
    config = compose_overrides(["experiment=cifar10_finetune", *given, "+data.eval_splits.v2.shards=~/x"])
    for name in paths:
        section, _, key = name.rpartition(".")
        assert getattr(getattr(config, section) if section else config, key) == f"{tmp_path}/x", name
    assert config.data.eval_splits["v2"].shards == f"{tmp_path}/x"
    assert compose_overrides(["run_dir=r", "data.shards=~/a.tar::~/b.tar"]).data.shards.count(str(tmp_path)) == 2
    assert compose_overrides(["run_dir=r~", "data.shards=a~b"]).data.shards == "a~b"
    with pytest.raises(ConfigError, match=r"run_dir \(~nobody-here/x\): there is no home directory of that name"):
        compose_overrides(["run_dir=~nobody-here/x", "data.shards=s"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optim.learning_rate=1",), "unknown key optim.learning_rate: did you mean optim.lr?"),
        (("batch_size=8",), "did you mean train.global_batch_size?"),
        (("hardware=a100",), "did you mean a100_40gb or a100_80gb?"),
        (("model.num_channels=4",), "the number of bands is model.in_chans"),
        (("modle=tiny",), "unknown key modle: did you mean model?"),
        (("experiment=simmim_base",), "did you mean simmim_base_192 or simmim_base_192_800ep?"),
        ((), "data.shards=VALUE; nor has run_dir: run_dir=VALUE"),
        (("optim.lr=1,2",), "optim.lr (1,2) is several values; give one"),
        (("+experiment=cifar10_simmim",), "experiment is chosen already; without the plus"),
    ],
)
def test_a_message_has_the_hint_that_helps(words, said, monkeypatch):
    """And none of Hydra's advice that is refused here: its --multirun, its pluses, its grammar."""
    monkeypatch.setattr(sys, "argv", ["train", *words])
    for compose in (compose_argv, lambda: compose_overrides(list(words))):
        with pytest.raises(ConfigError, match=re.escape(said)) as refused:
            compose()
        assert "multirun" not in str(refused.value) and "hydra.cc" not in str(refused.value)


def console_scripts() -> dict[str, str]:
    """What setup.cfg installs: names of commands, and module:function of each."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[3] / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    return {name.strip(): target.strip() for name, _, target in (line.partition("=") for line in lines) if target}


@pytest.mark.parametrize("name", console_scripts())
def test_the_version_is_ours(name, monkeypatch, capsys):
    """Of every command, whatever else is given, and without doing anything."""
    module, _, function = console_scripts()[name].partition(":")
    main = getattr(importlib.import_module(module), function)
    for words in (["--version"], ["run_dir=x", "--version"]):
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0 and capsys.readouterr().out == f"swinv2_train {swinv2_train.__version__}\n"


@pytest.mark.parametrize("word", ["--local_rank=1", "--local-rank=0"])
def test_the_words_of_other_launchers_are_let_by(word, monkeypatch, capsys):
    """deepspeed and torch.distributed.launch put them before what the user typed; the environment says the same."""
    monkeypatch.setattr(sys, "argv", ["train", word, *NEEDED])
    assert compose_argv() == compose_overrides(list(NEEDED))
    monkeypatch.setattr(
        sys, "argv", ["export", word, "weights=w", "format=timm", "out=o.pth", "task=classify", "--cfg", "job"]
    )
    with pytest.raises(SystemExit) as left:
        export.main()
    assert left.value.code == 0 and "num_classes" in capsys.readouterr().out
