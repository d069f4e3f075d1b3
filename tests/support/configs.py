"""The shipped configuration with a few keys changed, as the train command would compose it."""

from __future__ import annotations

import copy
import functools
from typing import Any

from swinv2_train.config import Config


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
    from swinv2_train.config.command_line import compose_overrides

    return compose_overrides(["model=demo", "data=cifar10", "task.mask_unit_px=4", "run_dir=runs/test"])
