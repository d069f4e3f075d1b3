"""A configuration that was saved: RUN_DIR/config.yaml, of a run that somebody else may have made, read as data.

It holds plain values of our keys.  Whatever could do something (Hydra's own section, defaults lists, interpolations,
resolvers, tags) was resolved when the file was written, so it is refused by name, as is what takes more memory than the
file itself (aliases).  Nothing in it is ever imported, called, looked up in the environment or composed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.config.shown import shown

CONFIG_NAME = "config.yaml"
CONFIG_BYTES = 2**18
"""The most that a saved configuration may hold; ours are below 6 kB."""
CONFIG_DEPTH = 16
"""The most sections and lists inside of each other; ours have 4."""
CONFIG_NODES = 10_000
"""The most names, values, sections and lists together; ours have 400."""

_REFUSED = {"hydra": "Hydra's own section", "defaults": "a list of files to compose"}
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_LITERAL = re.compile(r"(?<!\\)(\\*)\$\{")
_NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F_]+|[0-9][-+.:_0-9eE]*)")
_LONGEST_NUMBER = 100
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


def read_saved_config(path: Path) -> DictConfig:
    """The values in a saved configuration file, not yet checked against the keys that there are.

    Raises ConfigError, naming the file and the place in it, for everything but plain YAML of mappings, lists and
    scalars with text as keys.
    """
    return parse_saved_config(read_config_text(path), str(path))


def read_config_text(path: Path) -> str:
    """The text of a saved configuration.  Raises ConfigError where it is no file, too large, or no UTF-8."""
    try:
        return read_bytes(path, CONFIG_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text ({error}); restore the run's own file") from error


def parse_saved_config(text: str, origin: str) -> DictConfig:
    """The values in the text of a saved configuration.  origin: what errors call it.  Raises ConfigError."""
    try:
        _check_events(text, origin)
        tree = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin} cannot be read ({shown(reason, 400)}); restore the run's own file") from error
    assert isinstance(tree, DictConfig), "what is no mapping was refused before"
    for name, what in _REFUSED.items():
        if name in tree:
            raise ConfigError(f"{origin}: {name} is {what}, which no saved configuration has; remove it from the file")
    return tree


def literal(value: Any) -> Any:
    """A value, or a tree of them, so written that read_saved_config gives the same text: ${ is no interpolation."""
    if isinstance(value, str):
        return _LITERAL.sub(lambda match: f"{match[1]}{match[1]}\\${{", value)
    if isinstance(value, dict):
        return {key: literal(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [literal(each) for each in value]
    return value


def _check_events(text: str, origin: str) -> None:
    """Refuse, before anything is built, what is not plain YAML, by the line in which it stands."""
    depth = nodes = 0
    in_mapping: list[bool] = []  # of each collection that is open
    key_is_next: list[bool] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{origin}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.DocumentStartEvent) and event.tags:
            raise ConfigError(f"{where}: a %TAG directive, which no saved configuration has; remove it")
        if not isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
                in_mapping.pop()
                key_is_next.pop()
                _turn(in_mapping, key_is_next)
            continue
        nodes += 1
        if nodes > CONFIG_NODES:
            raise ConfigError(f"{where}: more than {CONFIG_NODES:,} names and values; restore the run's own file")
        if not depth and not isinstance(event, yaml.MappingStartEvent):
            raise ConfigError(f"{origin} holds no sections of a configuration; restore the run's own file")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ConfigError(f"{where}: an anchor or alias (&{shown(event.anchor, 40)}); write the values themselves")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _PLAIN_TAGS:
            raise ConfigError(f"{where}: the tag {shown(tag, 80)}, which no saved configuration has; remove it")
        is_key = bool(in_mapping) and in_mapping[-1] and key_is_next[-1]
        if isinstance(event, yaml.ScalarEvent):
            _check_scalar(cast(str, event.value), event.style is None, where, is_key)
            _turn(in_mapping, key_is_next)
            continue
        if is_key:
            raise ConfigError(f"{where}: a key is a mapping or a list; write names as keys")
        depth += 1
        if depth > CONFIG_DEPTH:
            raise ConfigError(f"{where}: more than {CONFIG_DEPTH} sections inside of each other; restore the file")
        in_mapping.append(isinstance(event, yaml.MappingStartEvent))
        key_is_next.append(True)


def _turn(in_mapping: list[bool], key_is_next: list[bool]) -> None:
    """In a mapping, after a key comes its value, and after that a key."""
    if in_mapping and in_mapping[-1]:
        key_is_next[-1] = not key_is_next[-1]


def _check_scalar(value: str, plain: bool, where: str, is_key: bool) -> None:
    if _INTERPOLATION.search(value):
        raise ConfigError(
            f"{where}: the interpolation {shown(value, 80)}; a saved configuration holds values, and none is looked up"
        )
    if plain and len(value) > _LONGEST_NUMBER and _NUMBER.fullmatch(value):
        raise ConfigError(f"{where}: a number of {len(value):,} characters, which no key takes; restore the run's own")
    if is_key and value == "<<":
        raise ConfigError(f"{where}: a merge key (<<); write the values themselves")
    if is_key and len(value) > 100:
        raise ConfigError(f"{where}: a key of {len(value):,} characters, which no configuration has; remove it")
