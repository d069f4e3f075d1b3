"""The shipped configuration with a few keys changed, as the train command would compose it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from swinv2_train.config import Config
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.config.keys import known_keys
from swinv2_train.config.load import load_config


def make_config(**sections: dict[str, Any]) -> Config:
    """The demo's model on task=simmim, with some values changed: make_config(optim={"lr": 0.1}).

    Nothing checks the values: tests use some that a user may not.
    """
    config = copy.deepcopy(_shipped())
    for section, values in sections.items():
        for key, value in values.items():
            assert hasattr(getattr(config, section), key), f"there is no key {section}.{key}"
            setattr(getattr(config, section), key, value)
    return config


@functools.cache
def _shipped() -> Config:
    return compose_overrides(["model=demo", "data=cifar10", "task.mask_unit_px=4", "run_dir=runs/test"])


def composed(overrides: Sequence[str]) -> Config:
    """compose_overrides(overrides), for tests that compose much: Hydra composes each choice of files once.

    Hydra takes 0.3 s for the files and next to nothing for values on top, which it parses here too.  What it cannot
    parse, and keys that there are not, go through compose_overrides, for its message.
    """
    values, choices = _sorted_out(overrides)
    try:
        tree = copy.deepcopy(_files(choices))
        for override in OverridesParser.create().parse_overrides(values):
            OmegaConf.update(tree, override.key_or_group, override.value(), merge=True)
    except Exception:  # noqa: BLE001  whatever it is, a user gets another message for it
        return compose_overrides(list(overrides))
    return load_config(tree)


def compose_files(overrides: Sequence[str]) -> None:
    """What composed() would compose anew, so that forks of this process find it."""
    _files(_sorted_out(overrides)[1])


def _sorted_out(overrides: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(those of values, those that choose files)"""
    values = [override for override in overrides if override.partition("=")[0] in _keys()]
    return values, tuple(override for override in overrides if override not in values)


@functools.cache
def _keys() -> frozenset[str]:
    return frozenset(known_keys())


@functools.cache
def _files(choices: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", list(choices))
