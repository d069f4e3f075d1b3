"""The words of a command line before Hydra composes them: each key once, and texts as they were typed.

A shell takes words apart (braces, *, spaces), and Hydra's grammar reads values (20260101_120000 is a number to it, a
brace a dictionary).  So a key that is given twice, or a word without "=", is an error that says how to quote; and the
value of a key that holds text reaches the configuration letter by letter.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.keys import all_keys
from swinv2_train.config.load import one_line
from swinv2_train.config.schema import MIX, SPLITS
from swinv2_train.config.secret_texts import without_secrets

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_WITH_VALUE = {
    "-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir", "-i",
    "--info",
}  # fmt: skip
"""Flags of Hydra's that take the next word."""
_OF_LAUNCHER = re.compile(r"--local[-_]rank=\d+")
"""What deepspeed and torch.distributed.launch add for each process; its environment says the same."""
_QUOTE = "quote the whole word, so that the shell leaves braces, *, spaces and ~ alone"
_EXAMPLE = "'data.shards=DIR/train-{000000..000009}.tar'"


class _Given(NamedTuple):
    """One KEY=VALUE; of ~KEY the value is None."""

    prefix: str
    key: str
    value: str | None


def prepared(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra is to have them: values of keys that hold text are quoted for its grammar.

    Doing it twice changes nothing.  Raises ConfigError for a word that is neither a flag nor KEY=VALUE, and for what
    the grammar cannot read.
    """
    return [each if isinstance(each, str) else _word(each) for each in _parsed(arguments)]


def check_once(arguments: Sequence[str]) -> None:
    """Each key has one value, whichever of KEY=, +KEY=, ++KEY= and ~KEY gives it.

    Of what a user has typed: the last one would win in silence.  Raises ConfigError, as prepared does too.
    """
    first: dict[str, _Given] = {}
    for one in _parsed(arguments):
        if isinstance(one, str):
            continue
        other = first.setdefault(one.key, one)
        if (one.value, one.prefix == "~") != (other.value, other.prefix == "~"):
            raise ConfigError(
                f"{one.key} is given twice with different values ({_said(other)} and {_said(one)}); give it once, and "
                f"if the shell made several words of one, {_QUOTE}: {_EXAMPLE}"
            )
    for key, one in first.items():
        for above in (key[:i] for i, char in enumerate(key) if char == "."):
            value = first[above].value if above in first else None
            if value is not None and value.lstrip().startswith("{"):
                raise ConfigError(f"{above}={value} and {_said(one)} set the same section; give its keys in one way")


def unquoted(value: str) -> str:
    """A value without the quotes in which Hydra's grammar would take it: run_dir='my run'."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def without_launchers(arguments: Sequence[str]) -> list[str]:
    """What the user has typed, without the words that a launcher adds for each of its processes."""
    return [word for word in arguments if not _OF_LAUNCHER.fullmatch(word)]


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """A program's own overrides with others laid over them: of each key the last one."""
    words = {word if isinstance(word, str) else word.key: word for word in _parsed(arguments)}
    return [word if isinstance(word, str) else _said(word, whole=True) for word in words.values()]


def _parsed(arguments: Sequence[str]) -> Iterator[str | _Given]:
    """Flags, with the words that belong to them, as they are; the others taken apart."""
    takes_next, before = False, ""
    for word in without_launchers(arguments):
        if takes_next or (word.startswith("-") and "=" not in word) or word.startswith("--"):
            takes_next = word in _WITH_VALUE
            yield word
        else:
            one = _split(word, before)
            before = one.key
            yield one


def _split(word: str, before: str) -> _Given:
    mark = "~" if word.startswith("~") else word[: min(2, len(word) - len(word.lstrip("+")))]
    key, equals, value = word[len(mark) :].partition("=")
    if not equals and mark != "~":
        after = f" after {before}=" if before else ""
        raise ConfigError(
            f"{word!r}{after} is no KEY=VALUE; if the shell made it of a pattern or a space, {_QUOTE}: {_EXAMPLE}"
        )
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"{word}: Hydra's own settings are fixed here; leave it out")
    return _Given(mark, key, value if equals else None)


def _word(one: _Given) -> str:
    if one.value is None:
        return one.prefix + one.key
    value = one.value
    if one.key in _text_keys() or re.fullmatch(
        rf"({re.escape(SPLITS)}|{re.escape(MIX)})[^.]+\.(shards|labels)", one.key
    ):
        value = _as_text(value)
    elif one.key in _list_keys() and value.startswith("[") and value.endswith("]"):
        value = f"[{','.join(_as_text(each.strip()) for each in _elements(value[1:-1]))}]"
    word = f"{one.prefix}{one.key}={value}"
    try:
        OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = re.sub(r" See https://hydra\.cc\S*.*| for details", "", one_line(error))
        raise ConfigError(
            f"{one.key} ({one.value}) cannot be read: {reason}; {_QUOTE}, and a text in quotes once more: "
            f"\"{one.key}='VALUE'\""
        ) from error
    return word


def _as_text(value: str) -> str:
    """A value for Hydra's grammar that gives just this text; null stays null, and what is quoted already as it is."""
    if value == "" or value == "???" or value.lower() == "null" or _QUOTED.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{trailing * chr(92)}'"


def _elements(text: str) -> list[str]:
    """The parts between commas that stand in no quotes or brackets."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "[{(") - (char in ")}]")
        if char == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts if text.strip() else []


def _said(one: _Given, whole: bool = False) -> str:
    """As it was typed, but, unless it is wanted whole, for what may be secret in an address."""
    typed = f"{one.prefix}{one.key}" + ("" if one.value is None else f"={one.value}")
    return typed if whole else without_secrets(typed)


@functools.cache
def _text_keys() -> frozenset[str]:
    return frozenset(key.name for key in all_keys() if key.is_text)


@functools.cache
def _list_keys() -> frozenset[str]:
    return frozenset(key.name for key in all_keys() if key.is_text_list)
