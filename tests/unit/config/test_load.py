"""load_config: every experiment composes, and wrong input of any kind gives one message that names the key."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys

import pytest
from omegaconf import OmegaConf

from swinv2_train.config import Config, ConfigError, EvalSplitConfig
from swinv2_train.config.command_line import compose_argv, compose_source, load_run_config
from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.config.keys import all_keys, known_keys
from swinv2_train.config.load import config_yaml, load_config
from tests.support.configs import composed

MINIMAL = ("run_dir=somewhere", "data.shards=x.tar")


@pytest.fixture
def compose(monkeypatch):
    """compose(*overrides): the configuration of a command line."""

    def compose_arguments(*overrides: str) -> Config:
        monkeypatch.setattr(sys, "argv", ["train", *overrides])
        config = compose_argv()
        assert config is not None
        return config

    return compose_arguments


@pytest.mark.parametrize("group", ["model", "engine", "task", "data", "optim", "log"])
def test_every_option_of_every_group_composes(group, compose):
    """An option that nobody composes rots."""
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        if path.stem == "common":
            continue
        extra = ("task.mask_unit_px=8",) if path.stem == "demo" else ()
        compose(*MINIMAL, f"{group}={path.stem}", *extra)


def test_command_line_beats_experiment_beats_defaults(compose):
    plain, experiment = compose(*MINIMAL), compose("experiment=cifar10_simmim")
    assert plain.train.global_batch_size != experiment.train.global_batch_size
    assert compose("experiment=cifar10_simmim", "train.global_batch_size=96").train.global_batch_size == 96


def test_what_tests_compose_is_what_a_command_line_does(compose):
    """tests/support/configs.composed, values on top of files."""
    overrides = (
        "experiment=cifar10_finetune", "seed=3", "run_dir='my run'", "model.depths=[1,1]", "optim.ema_decay=null",
        "+engine.deepspeed_overrides.comms_logger.enabled=true", "model.window_size=4",
    )  # fmt: skip
    assert composed(overrides) == compose(*overrides)


def test_every_key_has_a_docstring_and_no_default():
    """conf/ holds every value once; the dataclass says what it means."""
    for key in all_keys():
        (field,) = (field for field in dataclasses.fields(key.section) if field.name == key.name.rpartition(".")[2])
        assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING, key.name
        owner = next(cls for cls in key.section.__mro__ if field.name in vars(cls).get("__annotations__", {}))
        source = inspect.getsource(owner)
        assert re.search(rf'^    {field.name}: .+\n    """.+"""$', source, re.MULTILINE), (
            f"{key.name} is not documented"
        )


WRONG = {
    "typo in a known section": (("optim.lrr=1",), r"unknown key optim.lrr: did you mean optim.lr\?"),
    "typo behind a plus": (("+optim.lrr=1",), r"unknown key optim.lrr: did you mean optim.lr\?"),
    "key in the wrong place": (("+micro_batch_size=3",), r"unknown key .*did you mean train.micro_batch_size\?"),
    "key of the other task": (("task.num_classes=3",), r"unknown key task.num_classes: it belongs to task=classify"),
    "wrong type": (
        ("optim.lr=fast",),
        r"optim.lr: Value 'fast' of type 'str' could not be converted to Float; give a number",
    ),
    "wrong whole number": (("train.max_steps=1.5",), r"train.max_steps: .*1.5.* to Integer; give a whole number"),
    "wrong flag": (("data.verify=perhaps",), r"data.verify: .*perhaps.*; give true or false"),
    "no run_dir": (
        ("run_dir=null",),
        r"run_dir \(null\) needs a value; set it on the command line: run_dir=VALUE",
    ),
    "no rate": (("optim.lr=null",), r"optim.lr \(null\) needs a value"),
    "no batch": (("train.global_batch_size=null",), r"train.global_batch_size \(null\) needs a value"),
    "a split of nothing": (
        ("+data.eval_splits.v2.shards=null",),
        r"data.eval_splits.v2.shards \(null\) needs a value",
    ),
    "a number for a group": (("optim=4",), r"group override must be a string"),
    "a section as a value": (("+train.max_steps.x=4",), r"train.max_steps"),
    "value out of range": (("optim.lr=-1",), r"optim.lr \(-1.0\) must be at least 0"),
    "not a number": (("optim.lr=nan",), r"optim.lr \(nan\) must be at least 0"),
    "unknown choice": (("engine.precision=fp8",), r"engine.precision \(fp8\) is none of fp32, bf16"),
    "unknown engine": (("engine.name=fsdp",), r"engine.name \(fsdp\) is none of deepspeed, local"),
    "unknown stage": (("engine.zero_stage=4",), r"engine.zero_stage \(4\) is none of 0, 1, 2, 3"),
    "unknown offload": (("engine.offload_optimizer=disk",), r"offload_optimizer \(disk\) is none of none, cpu, nvme"),
    "no such experiment": (
        ("experiment=cifar10_simmin",),
        r"there is no such experiment; did you mean cifar10_simmim\?",
    ),
    "no such model": (("model=colossal",), r"model=colossal: there is no such model; there are base, demo, giant"),
    "no length": (("train.epochs=null",), r"train.max_steps and train.epochs are both null; set one"),
    "mask unit": (("task.mask_unit_px=20",), r"task.mask_unit_px \(20\) must be a multiple .* divide model.img_size"),
    "size as text": (("model.img_size=big",), r"model.img_size \('big'\) must be a positive whole number or a pair"),
    "three sizes": (("model.img_size=[1,2,3]",), r"model.img_size \(\[1, 2, 3\]\) must be"),
    "crop the wrong way round": (
        ("data.crop_scale=[1,0.5]",),
        r"data.crop_scale \(\[1.0, 0.5\]\) must be \[low, high\]",
    ),
    "momentum of 1": (("optim.betas=[1,0.9]",), r"optim.betas \(1.0\) must be at least 0 and less than 1"),
    "nothing hidden": (("task.mask_ratio=0",), r"task.mask_ratio \(0.0\) must be more than 0 and at most 1"),
    "infinite run": (("train.epochs=inf",), r"train.epochs \(inf\) must be more than 0"),
    "huge seed": (("seed=99999999999999999999",), r"seed \(99999999999999999999\) must be"),
    "every branch dropped": (("model.drop_path_rate=1",), r"model.drop_path_rate \(1.0\) must be .*less than 1"),
    "no crop": (("data.eval_crop_pct=0",), r"data.eval_crop_pct \(0.0\) must be more than 0"),
    "no stages": (("model.depths=[]",), r"model.depths \(\[\]\) must hold one positive number per stage"),
    "no heads": (("model.num_heads=[0,6]",), r"model.num_heads \(\[0, 6\]\) must hold one positive number"),
    "std that is no number": (("data.std=[nan,1,1]",), r"data.std \(nan\) must be more than 0"),
    "empty run_dir": (("run_dir=",), r"run_dir is empty; name a directory"),
    "two means": (("data.mean=[0,0]",), r"data.mean \(\[0.0, 0.0\]\) must hold 3 numbers"),
    "best without evaluation": (("train.keep_best=val/loss",), r"train.keep_best \(val/loss\) needs data.eval_shards"),
    "best by what is not measured": (
        ("train.keep_best=val/top1",),
        r"train.keep_best \(val/top1\) is none of val/loss",
    ),
    "broken grammar": (("optim.lr=[",), r"no viable alternative"),
    "unknown loss mean": (("train.loss_mean=mean",), r"train.loss_mean \(mean\) is none of local, global"),
    "unknown crop": (("data.eval_crop=center",), r"data.eval_crop \(center\) is none of centre, squash"),
    "split without a plus": (
        ("data.eval_splits.v2.shards=x",),
        r"data.eval_splits.v2.shards: a split is added with a plus: \+data.eval_splits.NAME.shards=PATTERN",
    ),
    "split of several keys without a plus": (("data.eval_splits={v2: {shards: x}}",), r"is added with a plus"),
    "split without shards": (
        ("+data.eval_splits.v2.labels=x",),
        r"data.eval_splits.v2.shards has no value; set it on the command line: \+data.eval_splits.v2.shards=VALUE",
    ),
    "split without anything": (("+data.eval_splits.v2={}",), r"data.eval_splits.v2 is a split, not a value"),
    "split with a typo": (
        ("+data.eval_splits.v2.shard=x",),
        r"unknown key data.eval_splits.v2.shard: did you mean data.eval_splits.v2.shards\?",
    ),
    "split that is a value": (("+data.eval_splits.v2=x",), r"data.eval_splits.v2 is a split, not a value"),
    "splits that are a value": (("data.eval_splits=x",), r"data.eval_splits: Cannot assign str"),
    "split of no name for a file": (("+data.eval_splits={a/b: {shards: x}}",), r"letters, digits, _ and -"),
    "labels for SimMIM": (
        ("+data.eval_splits.v2={shards: x, labels: y}",),
        r"data.eval_splits.v2.labels \(y\) needs task=classify",
    ),
    "override without plus": (
        ("engine.deepspeed_overrides.aio=1",),
        r"add it with a plus: \+engine.deepspeed_overrides",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_that_names_the_key(case):
    overrides, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        composed([*MINIMAL, *overrides])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "missing"), [((), "data.shards"), (("data.shards=x",), "run_dir")])
def test_missing_value_names_the_key_and_how_to_set_it(given, missing, compose):
    with pytest.raises(ConfigError, match=rf"{missing} has no value; set it on the command line: {missing}=VALUE"):
        compose(*given)


def test_unknown_key_in_an_experiment_file_is_rejected(tmp_path, monkeypatch, compose):
    """Hydra itself lets an experiment file add keys without a word."""
    folder = tmp_path / "conf"
    shutil.copytree(conf_dir(), folder)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  weight_decays: 0.1\n")
    monkeypatch.setattr("swinv2_train.config.command_line.conf_dir", lambda: folder)
    with pytest.raises(ConfigError, match=r"unknown key optim.weight_decays: did you mean optim.weight_decay\?"):
        compose(*MINIMAL, "experiment=mine")


def test_saved_configuration_is_loaded_and_checked_again(tmp_path, compose):
    """config.yaml in the run directory is what evaluation and a resume read."""
    config = compose("experiment=cifar10_finetune", "+engine.deepspeed_overrides.comms_logger.enabled=true")
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert load_run_config(tmp_path) == config
    text = (tmp_path / "config.yaml").read_text().replace("label_smoothing", "label_smoothin")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="unknown key task.label_smoothin: did you mean task.label_smoothing"):
        load_run_config(tmp_path)


def test_run_command_line_takes_overrides_on_the_runs_own_configuration(tmp_path, compose):
    """evaluate run_dir=DIR data.eval_shards=... : Hydra's grammar, the run's values."""
    (tmp_path / "config.yaml").write_text(config_yaml(compose("experiment=cifar10_finetune", "optim.lr=0.25")))
    config, extra = compose_source(
        [f"run_dir={tmp_path}", "data.eval_shards=other.tar", "checkpoint=c"], ("checkpoint",)
    )
    assert (config.optim.lr, config.data.eval_shards, extra) == (0.25, "other.tar", {"checkpoint": "c"})
    with pytest.raises(ConfigError, match="unknown key data.eval_shard: did you mean data.eval_shards"):
        compose_source([f"run_dir={tmp_path}", "data.eval_shard=x"], ())
    with pytest.raises(ConfigError, match="holds no config.yaml"):
        compose_source([f"run_dir={tmp_path / 'nowhere'}"], ())


def test_a_run_from_before_a_key_was_invented_has_its_default(tmp_path, compose):
    """A run of last week resumes and is evaluated after an upgrade; the new key can be given too."""
    config = compose("experiment=cifar10_finetune", "optim.lr=0.25", "data.eval_crop_pct=0.9")
    text = config_yaml(config)
    for key in ("loss_mean", "eval_crop", "init_head", "clamp_to_shorter_side"):
        assert f" {key}: " in text
        text = "".join(line for line in text.splitlines(keepends=True) if not line.strip().startswith(f"{key}:"))
    (tmp_path / "config.yaml").write_text(text)
    assert load_run_config(tmp_path) == config
    assert load_run_config(tmp_path, ["data.eval_crop=squash"]).data.eval_crop == "squash"
    with pytest.raises(ConfigError, match="unknown key data.eval_crops"):
        load_run_config(tmp_path, ["data.eval_crops=squash"])


def test_splits_are_the_users_own_names_and_come_back_from_a_run(tmp_path, compose):
    """Shards alone, or with a file of labels; one may take the shards of the evaluation."""
    config = compose(
        *MINIMAL, "task=classify", "data.eval_shards=val.tar", "+data.eval_splits.v2.shards=v2.tar",
        "+data.eval_splits.real={shards: '${data.eval_shards}', labels: real.json}",
    )  # fmt: skip
    v2, real = EvalSplitConfig("v2.tar", None), EvalSplitConfig("val.tar", "real.json")
    assert config.data.eval_splits == {"v2": v2, "real": real}
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert load_run_config(tmp_path) == config
    config, _ = compose_source([f"run_dir={tmp_path}", "data.eval_splits.v2.shards=other.tar"], ())
    assert config.data.eval_splits == {"v2": EvalSplitConfig("other.tar", None), "real": real}


def test_broken_yaml_is_one_message(tmp_path, monkeypatch, compose):
    folder = tmp_path / "conf"
    shutil.copytree(conf_dir(), folder)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\noptim: [1, 2\n")
    monkeypatch.setattr("swinv2_train.config.command_line.conf_dir", lambda: folder)
    with pytest.raises(ConfigError, match=r"mine.yaml") as caught:
        compose(*MINIMAL, "experiment=mine")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.yaml").write_text("optim: [1, 2\n")
    with pytest.raises(ConfigError, match=r"config.yaml"):
        load_run_config(tmp_path)


def test_known_keys_holds_the_contract():
    """Keys that other people's scripts stand on (DESIGN section 3)."""
    keys = set(known_keys())
    assert keys >= {
        "seed", "run_dir", "train.max_steps", "train.global_batch_size", "train.micro_batch_size",
        "train.log_every_steps", "train.checkpoint_every_steps", "optim.lr", "optim.weight_decay", "data.shards",
        "data.num_workers", "data.record_keys", "data.on_bad_sample", "model.img_size", "model.window_size",
        "model.recompute", "engine.name", "engine.zero_stage", "engine.precision", "log.wandb", "data.source",
    }  # fmt: skip


def test_load_config_refuses_what_no_command_line_composed():
    with pytest.raises(ConfigError, match=r"task.name \(None\) is none of simmim, classify"):
        load_config(OmegaConf.create({}))
