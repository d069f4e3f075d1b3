"""The reference of all keys, for ``--help KEY`` and docs/configuration.md: read off the schema and conf/."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.keys import Key, all_keys
from swinv2_train.config.near_names import did_you_mean_key
from swinv2_train.config.schema import TASKS, Config

_JSON_NAMES = {True: "true", False: "false", None: "null"}


class Entry(NamedTuple):
    """What there is to say about one key."""

    name: str
    """Dotted: optim.lr."""
    type: str
    """In words: "float or null"."""
    defaults: Mapping[str, str]
    """The value in conf/ by task, as it is written there; "???" must be given."""
    allowed: str
    """What the value may be besides its type; "" = anything."""
    meaning: str
    """In a sentence."""

    @property
    def default(self) -> str:
        """One text for all tasks, which names them where they differ."""
        if len(set(self.defaults.values())) == 1:
            (text,) = set(self.defaults.values())
            return text
        return ", ".join(f"{text} (task={task})" for task, text in self.defaults.items())


def reference(defaults: Mapping[str, DictConfig]) -> list[Entry]:
    """Every key in the schema's order; one that several tasks have stands once for each meaning that it has there.

    defaults: the configuration that each task composes to without any override.
    """
    found: dict[tuple[str, str, str, str], Entry] = {}
    for key in all_keys():
        own = [task for task, section in TASKS.items() if section is key.section] or list(defaults)
        entry = _entry(key, {task: defaults[task] for task in own})
        of_others = found.get((entry.name, entry.type, entry.allowed, entry.meaning))
        if of_others is not None:
            entry = entry._replace(defaults={**of_others.defaults, **entry.defaults})
        found[entry.name, entry.type, entry.allowed, entry.meaning] = entry
    return list(found.values())


def help_text(names: Iterable[str], entries: Iterable[Entry]) -> str:
    """What each named key, or each key of a named section, is: a few lines a key.

    Raises ConfigError for a name that is neither.
    """
    entries = list(entries)
    found: list[Entry] = []
    for name in names:
        chosen = [each for each in entries if each.name == name or each.name.startswith(f"{name}.")]
        if not chosen:
            hint = did_you_mean_key(name, [each.name for each in entries], otherwise="--help alone prints every key")
            raise ConfigError(f"--help {name}: there is no such key or section; {hint}")
        found += [each for each in chosen if each not in found]
    return "\n".join(map(_paragraph, found))


_HEAD = """# Configuration keys

Every key with its type, its default, what it may be and what it means. `python scripts/write_configuration.py` writes
this page from `swinv2_train/config/` (types, ranges, meanings) and `conf/` (defaults); change those and run it again.

- On the command line `KEY=VALUE` takes precedence over an experiment (`experiment=NAME`), and that over the defaults.
- The defaults are those of `model=base data=folder engine=zero1 hardware=this_machine`; `???` must be given.
- `data=FILE.yaml` (and `model`, `optim`, `engine`, `log`, `hardware` alike) takes keys of the group from a file of
  yours, on top of the option that would be chosen without it.
- `python -m swinv2_train.train --help KEY` (or `--help SECTION`) prints the same.
- Rules between keys are checked too, before anything else is done; a message then names the keys and the remedy.
"""

_COLUMNS = "| Key | Type | Default | Allowed | Meaning |\n|---|---|---|---|---|\n"


def markdown(entries: Iterable[Entry]) -> str:
    """docs/configuration.md: a table per section, and one per task for its own keys."""
    tables: dict[str, list[Entry]] = {}
    for entry in entries:
        section, _, leaf = entry.name.partition(".")
        own = section == "task" and len(entry.defaults) == 1
        tables.setdefault(f"task={next(iter(entry.defaults))}" if own else section if leaf else "", []).append(entry)
    meanings = _docstrings(Config)
    parts = [_HEAD]
    for title, rows in tables.items():
        heading = f"\n## {title}\n\n" if title else "\n"
        parts.append(heading + (f"{meanings[title]}\n\n" if title in meanings else "") + _COLUMNS)
        parts.append("".join(map(_row, rows)))
    return "".join(parts)


def _row(entry: Entry) -> str:
    defaults = {f"`{text}`" if text else "" for text in entry.defaults.values()}
    by_task = ", ".join(f"`{text}` ({task})" for task, text in entry.defaults.items())
    default = defaults.pop() if len(defaults) == 1 else by_task
    cells = (f"`{entry.name}`", entry.type, default, entry.allowed, entry.meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def _paragraph(entry: Entry) -> str:
    of_a_task = entry.name.startswith("task.") and len(entry.defaults) < len(TASKS)
    name = f"{entry.name} ({', '.join(f'task={task}' for task in entry.defaults)})" if of_a_task else entry.name
    lines = [name, f"    {entry.meaning}", f"    type: {entry.type}"]
    if entry.allowed:
        lines.append(f"    allowed: {entry.allowed}")
    return "\n".join([*lines, f"    default: {entry.default}", ""])


def _entry(key: Key, defaults: Mapping[str, DictConfig]) -> Entry:
    values = {task: _default(tree, key.name) for task, tree in defaults.items()}
    return Entry(
        key.name,
        next((rule.kind for rule in key.rules if rule.kind is not None), _type_text(key.kind)),
        {task: value for task, value in values.items() if value is not None},
        "; ".join(rule.allows for rule in key.rules),
        _docstrings(key.section)[key.name.rpartition(".")[2]],
    )


def _default(tree: DictConfig, name: str) -> str | None:
    """A key's value as YAML writes it in one line; None for a key of another task."""
    section, _, leaf = name.rpartition(".")
    node = OmegaConf.select(tree, section) if section else tree
    if leaf not in list(node):  # `in node` is False for what must be given
        return None
    return "???" if OmegaConf.is_missing(node, leaf) else _value_text(node[leaf])


def _value_text(value: Any) -> str:
    if OmegaConf.is_list(value):
        return f"[{', '.join(_value_text(each) for each in value)}]"
    if OmegaConf.is_dict(value):
        return "{}" if not value else str(OmegaConf.to_container(value))
    return _JSON_NAMES[value] if value is None or isinstance(value, bool) else str(value)


def _type_text(kind: Any) -> str:
    """float | None -> "float or null"; list[int] -> "list of int"."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_type_text(each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        return "list" if element is Any else f"list of {_type_text(element)}"
    if typing.get_origin(kind) is dict:
        return "mapping"
    if kind is Any:
        return "int or list of int"
    return "null" if kind is type(None) else str(kind.__name__)


@functools.cache
def _docstrings(section: type) -> dict[str, str]:
    """The string below each field, of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__[:-1]):
        definition = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(definition, ast.ClassDef), cls
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
                )
                found[field.target.id] = " ".join(str(text).split())
    return found
