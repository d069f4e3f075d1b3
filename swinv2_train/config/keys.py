"""The keys of the configuration, read off the schema: dotted name, type and rules of each."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.rules import Place, Rule
from swinv2_train.config.schema import TASKS, Config, TaskConfig


class Key(NamedTuple):
    """One field of a section."""

    name: str
    """Dotted from the top: optim.lr.  From keys_of, the field's own name: lr."""
    kind: Any
    """Its type, without the rules."""
    rules: tuple[Rule, ...]
    """What its value may be, besides its type."""
    section: type
    """The dataclass that defines it, and says below the field what it means."""
    is_path: bool = False
    """Whether its text names a file or directory."""

    @property
    def is_text(self) -> bool:
        """Whether its value is a text."""
        return self.kind in (str, str | None)

    @property
    def is_text_list(self) -> bool:
        """Whether its value is a list of texts."""
        return self.kind in (list[str], list[str] | None)

    @property
    def is_section(self) -> bool:
        """True for a section of keys, False for a value."""
        return dataclasses.is_dataclass(self.kind)


@functools.cache
def keys_of(section: type) -> tuple[Key, ...]:
    """The fields of one dataclass of the schema, under their own names."""
    hints, keys = typing.get_type_hints(section, include_extras=True), []
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        extras = getattr(hint, "__metadata__", ())  # of Annotated[kind, *rules]
        kind = hint.__origin__ if extras else hint
        rules = tuple(rule for rule in extras if isinstance(rule, Rule))
        keys.append(Key(field.name, kind, rules, section, any(isinstance(extra, Place) for extra in extras)))
    return tuple(keys)


def all_keys(task: type[TaskConfig] | None = None) -> Iterator[Key]:
    """Every key that holds a value, by its dotted name: of all tasks, or of one."""
    return _below(Config, "", task)


def known_keys(task: type[TaskConfig] | None = None) -> list[str]:
    """Every dotted key of the configuration (of all tasks, or of one)."""
    return list(dict.fromkeys(key.name for key in all_keys(task)))


def check_values(section: Any, prefix: str = "") -> None:
    """Check every value of a Config, or of a section of it, by the rules of its key.

    Raises ConfigError naming the key, its value and what it may be.
    """
    cls: type = type(section)
    for key in keys_of(cls):
        value = getattr(section, key.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{prefix}{key.name}.")
        elif value is not None:
            _check_elements(f"{prefix}{key.name}", key.kind, value)
            for rule in key.rules:
                rule.check(f"{prefix}{key.name}", value)


def _check_elements(key: str, kind: Any, value: Any) -> None:
    """A list of numbers or texts holds no section or list, which OmegaConf lets pass."""
    lists = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is list]
    element = typing.get_args(lists[0])[0] if lists else Any
    if element is not Any and isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        raise ConfigError(f"{key} ({value}) must be a list of values of type {element.__name__}")


def _below(section: type, prefix: str, task: type[TaskConfig] | None) -> Iterator[Key]:
    for key in keys_of(section):
        name = f"{prefix}{key.name}"
        if key.kind is TaskConfig:
            for option in TASKS.values() if task is None else (task,):
                yield from _below(option, f"{name}.", task)
        elif key.is_section:
            yield from _below(key.kind, f"{name}.", task)
        else:
            yield key._replace(name=name)
