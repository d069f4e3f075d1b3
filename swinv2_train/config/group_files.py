"""A file of the user's in place of an option of a group: data=DIR/bands.yaml, hardware=our_nodes.yaml.

It holds plain values of the group's keys, and lies on top of the option that would be chosen without it (that of an
experiment, or the default): an experiment and the command line still come after it, as after every option.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from swinv2_train.config.arguments import unquoted
from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.config.errors import ConfigError
from swinv2_train.config.load import home_expanded
from swinv2_train.config.saved import read_saved_config

ENDINGS = (".yaml", ".yml")
_GROUPS = ("model", "data", "optim", "engine", "log", "hardware")
"""Groups of conf/ whose options hold values alone; a task's and an experiment's choose others."""
_NAME = "file_of_yours"
"""What Hydra calls the file, in each group."""


def with_group_files(words: Sequence[str]) -> list[str]:
    """The words of a command line, GROUP=FILE.yaml as the option that the file has become.

    Hydra must be initialised.  Raises ConfigError, naming the file, where it cannot be read or holds more than values.
    """
    files = {group: path for word in words if (path := _file_of(word, group := word.partition("=")[0]))}
    if not files:
        return list(words)
    settings = [word for word in words if "=" in word and not word.startswith("-")]  # and no flag, such as --cfg job
    others = [word for word in settings if word.partition("=")[0] not in files]
    chosen = compose("train", others, return_hydra_config=True).hydra.runtime.choices
    for group, path in files.items():
        if not path.is_file():
            options = ", ".join(sorted(each.stem for each in (conf_dir() / group).glob("*.yaml")))
            raise ConfigError(f"{group}={path}: there is no such file; name another, or one of {options}")
        values = OmegaConf.to_container(read_saved_config(path))
        assert isinstance(values, dict), "what is no mapping was refused before"
        ConfigStore.instance().store(_NAME, {"defaults": [chosen[group]], **values}, group)
    return [f"{key}={_NAME}" if (key := word.partition("=")[0]) in files else word for word in words]


def _file_of(word: str, group: str) -> Path | None:
    """The file that a word chooses for its group; None where it chooses an option by its name, or sets a key."""
    value = unquoted(word.partition("=")[2])
    return Path(home_expanded(group, value)) if group in _GROUPS and value.endswith(ENDINGS) else None
