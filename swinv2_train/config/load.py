"""The one strict loader of the typed configuration from a composed YAML tree.

``load_config`` merges the tree into the dataclasses of :mod:`swinv2_train.config`.  An unknown, missing, mistyped or
out-of-range key raises ConfigError before any process group or accelerator is touched, whether it came from the command
line, from an experiment file or from behind ``+``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swinv2_train.config.checks import check_config
from swinv2_train.config.errors import ConfigError
from swinv2_train.config.keys import Key, all_keys, keys_of, known_keys
from swinv2_train.config.near_names import did_you_mean_key
from swinv2_train.config.saved import literal
from swinv2_train.config.schema import OWN_ENTRIES, TASKS, Config, TaskConfig
from swinv2_train.config.secret_texts import public

_WANTED = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false", "bool": "true or false"}
"""How the types of OmegaConf's errors are called."""


def load_config(composed: DictConfig, needed: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Merge a composed tree strictly into the dataclasses and check every range; the only way to make a Config.

    needed: what a command cannot do without besides, and how its value is called: keys that have a value here unless
    it is null, and keys of the command's own that were not given.
    Raises ConfigError naming the key, what is wrong with its value and the remedy.
    """
    try:
        task_name = OmegaConf.select(composed, "task.name")
    except OmegaConfBaseException as error:  # task is a list
        raise ConfigError(_merge_error(error)) from error
    if task_name not in TASKS:
        options = " or ".join(f"task={name}" for name in TASKS)
        raise ConfigError(f"task.name ({task_name}) is none of {', '.join(TASKS)}; choose {options}")
    _check_keys(composed, TASKS[task_name])
    sections = {str(name) for name, value in composed.items_ex(resolve=False) if OmegaConf.is_dict(value)}
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(_schema(task_name, frozenset(sections)), composed))
        if merged.data.mix and OmegaConf.is_missing(merged.data, "shards"):
            merged.data.shards = ""
        missing = dict.fromkeys(sorted(OmegaConf.missing_keys(merged)), "VALUE")
        missing |= {key: value for key, value in needed.items() if OmegaConf.select(merged, key) is None}
        if missing:
            raise ConfigError(no_value(missing))
        _expand_homes(merged, TASKS[task_name])
        config = typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_merge_error(error)) from error
    check_config(config)
    return config


@functools.cache
def _schema(task: str, sections: frozenset[str]) -> DictConfig:
    """The dataclasses as OmegaConf merges a tree with these sections into them.  To make them is half of a merge."""
    schema: DictConfig = OmegaConf.structured(Config)
    schema.task = OmegaConf.structured(TASKS[task])
    for name, cls in typing.get_type_hints(Config).items():
        if name in sections - {"task"} and dataclasses.is_dataclass(cls):
            schema[name] = OmegaConf.structured(cls)
    return schema


def no_value(keys: Mapping[str, str]) -> str:
    """What is said of keys that need a value, by what that is called.  All of them at once: a user who is told one a
    time starts as often.
    """
    first, *others = [f"{'+' * key.startswith(tuple(OWN_ENTRIES))}{key}={value}" for key, value in keys.items()]
    more = f"; nor has {', '.join(list(keys)[1:])}: {' '.join(others)}" if others else ""
    return f"{next(iter(keys))} has no value; set it on the command line: {first}{more}"


def _expand_homes(merged: DictConfig, task: type[TaskConfig]) -> None:
    """Put the home in place of ~ in every key that names a file or directory; a shell does so at a word's begin."""
    keys = [key.name for key in all_keys(task) if key.is_path]
    for below, (_, cls) in OWN_ENTRIES.items():
        fields = [key.name for key in keys_of(cls) if key.is_path]
        keys += [f"{below}{name}.{field}" for name in OmegaConf.select(merged, below[:-1]) for field in fields]
    for key in keys:
        value = OmegaConf.select(merged, key)
        if isinstance(value, str) and "~" in value:
            OmegaConf.update(merged, key, "::".join(home_expanded(key, part) for part in value.split("::")))


def home_expanded(key: str, path: str) -> str:
    """A path with the user's home in place of a leading ~.  Raises ConfigError where there is no such home."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and expanded.partition("/")[0] == path.partition("/")[0] and not os.path.exists(path):
        raise ConfigError(f"{key} ({path}): there is no home directory of that name; write the path without ~")
    return expanded


def _check_keys(composed: DictConfig, task: type[TaskConfig]) -> None:
    """Name the first key that no dataclass has, before OmegaConf does it without a remedy."""
    known = known_keys(task)
    sections = {key[: i + 1] for key in (k + "." for k in known) for i, char in enumerate(key) if char == "."}
    for key in _leaves(OmegaConf.to_container(composed, resolve=False), ""):
        if key in known or key.startswith("engine.deepspeed_overrides."):
            continue
        below = next((below for below in OWN_ENTRIES if key.startswith(below)), None)
        if below is not None:
            _check_own_key(key, below)
            continue
        if key + "." in sections:
            raise ConfigError(
                f"{key} is a section, not a value; set one of its keys, such as {_first_below(key, known)}"
            )
        raise ConfigError(unknown_key(key, task))
    _check_texts(composed, task)
    _check_nulls(composed, task)


def _check_texts(composed: DictConfig, task: type[TaskConfig]) -> None:
    """A text that YAML or a dictionary on the command line has read as a number is another text: 1e-3 becomes 0.001."""
    texts = [key.name for key in all_keys(task) if key.is_text or key.is_text_list]
    for below, (_, cls) in OWN_ENTRIES.items():
        names = OmegaConf.select(composed, below.removesuffix("."))
        texts += [f"{below}{name}.{key.name}" for name in names or () for key in keys_of(cls) if key.is_path]
    for name in texts:
        value = OmegaConf.select(composed, name, throw_on_missing=False)
        for each in value if isinstance(value, ListConfig) else [value]:
            if isinstance(each, (int, float)):
                raise ConfigError(
                    f"{name} ({each}) is a text, and was read as a number; put it in quotes: {name}: '{each}'"
                )


def _check_nulls(composed: DictConfig, task: type[TaskConfig]) -> None:
    """null means something at some keys alone; at any other it is no value."""
    wanted = [key.name for key in all_keys(task) if not _may_be_null(key)]
    for below, (_, cls) in OWN_ENTRIES.items():
        names = OmegaConf.select(composed, below.removesuffix("."))
        wanted += [f"{below}{name}.{key.name}" for name in names or () for key in keys_of(cls) if not _may_be_null(key)]
    for name in wanted:
        section, _, field = name.rpartition(".")
        holder = OmegaConf.select(composed, section) if section else composed
        node = holder._get_node(field) if isinstance(holder, DictConfig) and field in holder else None
        if isinstance(node, Node) and node._is_none():
            raise ConfigError(f"{name} (null) needs a value; set it on the command line: {name}=VALUE")


def _may_be_null(key: Key) -> bool:
    return key.kind is Any or type(None) in typing.get_args(key.kind)


def _check_own_key(key: str, below: str) -> None:
    """data.eval_splits.NAME.shards and their like, the name fit for a file's."""
    what, cls = OWN_ENTRIES[below]
    name, *rest = key.removeprefix(below).split(".")
    known = [f"{below}{name}.{field.name}" for field in dataclasses.fields(cls)]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{below}{name}: a {what}'s name is made of letters, digits, _ and -")
    if not rest:
        raise ConfigError(f"{key} is a {what}, not a value; set its shards: +{key}.shards=PATTERN")
    if key not in known:
        raise ConfigError(f"unknown key {key}: {_nearest_keys(key, known)}")


NO_KEYS = {
    "num_channels": "the number of bands is model.in_chans",
    "resume": "the same command with the same run_dir resumes by itself",
    "resume_from": "the same command with the same run_dir resumes by itself; task.init_from starts from other weights",
    "accumulation_steps": "it follows from train.global_batch_size / (train.micro_batch_size x processes)",
    "gradient_accumulation_steps": "it follows from train.global_batch_size / (train.micro_batch_size x processes)",
}
"""Names that others have for what is no key here, and what to do."""


def unknown_key(key: str, task: type[TaskConfig] | None = None) -> str:
    """The message about a dotted key that the configuration (of one task, or of any) does not have."""
    if key.startswith("engine.deepspeed_overrides."):
        return f"{key} is not among our own keys; add it with a plus: +{key}=VALUE"
    for below, (what, _) in OWN_ENTRIES.items():
        if f"{key}.".startswith(below):
            return f"{key}: a {what} is added with a plus: +{below}NAME.shards=PATTERN"
    leaf = key.rsplit(".", 1)[-1]
    if leaf in NO_KEYS:
        return f"unknown key {key}: {NO_KEYS[leaf]}"
    owners = [name for name, cls in TASKS.items() if cls is not task and key in known_keys(cls)]
    if owners:
        return f"unknown key {key}: it belongs to task={owners[0]}"
    return f"unknown key {key}: {_nearest_keys(key, known_keys(task))}"


def _nearest_keys(key: str, known: list[str]) -> str:
    if "." not in key:
        sections = dict.fromkeys(each.partition(".")[0] for each in known)
        known = [*sections, *known]
    return did_you_mean_key(key, known, otherwise="`--cfg job` prints every key")


def _first_below(section: str, known: list[str]) -> str:
    return next(key for key in known if key.startswith(section + "."))


def _leaves(tree: Any, prefix: str) -> typing.Iterator[str]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, path + ".")
        elif not (isinstance(value, dict) and path == "engine.deepspeed_overrides"):
            yield path


def _merge_error(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or "the configuration"
    reason = str(getattr(error, "msg", None) or error).split("\n")[0]
    kind = re.search(r"could not be converted to (\w+)|is not a valid (\w+)", reason)
    wanted = _WANTED.get(kind[1] or kind[2]) if kind else None
    return f"{key}: {reason}" + ("" if wanted is None else f"; give {wanted}")


def config_yaml(config: Config) -> str:
    """The validated configuration as YAML: plain values, which read_saved_config and load_config read again.

    Without secrets, for it is written down.
    """
    return OmegaConf.to_yaml(OmegaConf.create(literal(public(dataclasses.asdict(config)))))


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
