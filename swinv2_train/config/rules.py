"""Rules of one key's value.  They stand at the key, in the schema, beside its type:

    lr: Annotated[float, at_least(0)]

``Annotated`` is Python's own place for this: OmegaConf and mypy see a mandatory float, and the rule is there for who
looks for it (``config/keys.py``).  Rules between keys are functions of ``config/checks.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swinv2_train.config.errors import ConfigError

ABOVE_0, BELOW_1 = math.ulp(0.0), 1.0 - math.ulp(0.5)
"""The open ends of ranges."""


@dataclass(frozen=True)
class Rule:
    """What a value may be.  null is no matter of a rule, but of the key's type."""

    allows: str
    """In words, for the reference of all keys: "at least 0 and less than 1"."""
    check: Callable[[str, Any], None]
    """check(key, value) raises ConfigError where the value is not allowed."""
    kind: str | None = None
    """The type in words, where the field's own cannot say it."""


@dataclass(frozen=True)
class Place:
    """Marks a key whose text names a file or directory: a leading ~ is the user's home (``config/load.py``)."""


PATH = Place()


def at_least(low: float) -> Rule:
    """A finite number from low on."""
    return between(low, math.inf)


def positive() -> Rule:
    """A finite number of more than 0."""
    return between(ABOVE_0, math.inf)


def finite() -> Rule:
    """Any number but infinity and NaN."""
    return between(-math.inf, math.inf)


def between(low: float, high: float) -> Rule:
    """A finite number of low <= number <= high; ABOVE_0 and BELOW_1 leave 0 and 1 out."""
    least = "more than 0" if low == ABOVE_0 else f"at least {low:g}"
    most = "less than 1" if high == BELOW_1 else f"at most {high:g}"
    bounds = [text for text, bound in ((least, low), (most, high)) if math.isfinite(bound)]
    allows = " and ".join(bounds) or "a finite number"

    def check(key: str, value: float) -> None:
        if not (low <= value <= high and math.isfinite(value)):  # also refuses NaN
            raise ConfigError(f"{key} ({value}) must be {allows}")

    return Rule(allows, check)


def zero_or_at_least(low: float) -> Rule:
    """0, or a finite number from low on."""
    allows = f"0, or at least {low:g}"

    def check(key: str, value: float) -> None:
        if value != 0 and not (low <= value < math.inf):
            raise ConfigError(f"{key} ({value}) must be {allows}")

    return Rule(allows, check)


def non_empty() -> Rule:
    """A text of one character or more."""

    def check(key: str, value: str) -> None:
        if not value:
            raise ConfigError(f"{key} is empty; give a character")

    return Rule("at least one character", check)


def one_of(*choices: Any) -> Rule:
    """One of a few values."""
    names = ", ".join("null" if choice is None else str(choice) for choice in choices)

    def check(key: str, value: Any) -> None:
        if value not in choices:
            raise ConfigError(f"{key} ({value}) is none of {names}")

    return Rule(f"one of {names}", check)


def each(rule: Rule) -> Rule:
    """A list of which every element obeys a rule."""

    def check(key: str, values: list[Any]) -> None:
        for value in values:
            rule.check(key, value)

    return Rule(f"each {rule.allows}", check)


def number_or_each() -> Rule:
    """A finite number, or a list of them."""
    allows = "a finite number, or a list of one per band"

    def check(key: str, value: Any) -> None:
        values = value if isinstance(value, list) and value else [value]
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values):
            raise ConfigError(f"{key} ({value}) must be {allows}")

    return Rule(allows, check, "float or list of float or null")


def number_or_nan() -> Rule:
    """Any number but infinity."""

    def check(key: str, value: float) -> None:
        if math.isinf(value):
            raise ConfigError(f"{key} ({value}) must be a number or nan")

    return Rule("a number or nan", check)


def band_names() -> Rule:
    """Different indices from 0 on, or names."""
    allows = "different bands, each an index from 0 on or a name"

    def check(key: str, values: list[Any]) -> None:
        fits = [isinstance(v, str) and v.strip() or isinstance(v, int) and not isinstance(v, bool) and v >= 0
                for v in values]  # fmt: skip
        if not values or not all(fits) or len(set(values)) < len(values):
            raise ConfigError(f"{key} ({values}) must be {allows}")

    return Rule(allows, check)


def folder_names() -> Rule:
    """Two names of folders."""
    allows = "two names of folders, without /"

    def check(key: str, values: list[str]) -> None:
        if len(values) != 2 or any(not name or "/" in name or name in (".", "..") for name in values):
            raise ConfigError(f"{key} ({values}) must hold {allows}: of the images and of their label images")

    return Rule(allows, check)


def folder_path() -> Rule:
    """A path in which {name} stands for the name of a folder, and no other braces do."""
    allows = "a path, in which {name} may stand for the name of the images' folder"

    def check(key: str, value: str) -> None:
        if not value.strip() or {"{", "}"} & set(value.replace("{name}", "")):
            raise ConfigError(f"{key} ({value}) must be {allows}: ../annotations/instances_{{name}}.json, say")

    return Rule(allows, check)


def length(count: int) -> Rule:
    """A list of count numbers."""

    def check(key: str, values: list[Any]) -> None:
        if len(values) != count:
            raise ConfigError(f"{key} ({values}) must hold {count} numbers")

    return Rule(f"{count} numbers", check)


def one_per_stage() -> Rule:
    """A list of positive numbers, one for each of the model's stages."""
    allows = "one positive number per stage"

    def check(key: str, values: list[int]) -> None:
        if not values or min(values) < 1:
            raise ConfigError(f"{key} ({values}) must hold {allows}")

    return Rule(allows, check)


def low_high(most: float) -> Rule:
    """[low, high], both more than 0 and at most `most`."""
    limit = "" if most == math.inf else f" <= {most:g}"
    allows = f"[low, high] with 0 < low <= high{limit}"

    def check(key: str, values: list[float]) -> None:
        if len(values) != 2 or not (0 < values[0] <= values[1] <= most):
            raise ConfigError(f"{key} ({values}) must be {allows}")

    return Rule(allows, check)


def first_last(most: int, why: str) -> Rule:
    """[first, last] of at most `most` numbers from 1 on; why: there are not to be more."""
    allows = f"[first, last] with 1 <= first <= last and at most {most} steps"

    def check(key: str, values: list[int]) -> None:
        if len(values) != 2 or not 1 <= values[0] <= values[1] < values[0] + most:
            raise ConfigError(f"{key} ({values}) must be {allows}: {why}")

    return Rule(allows, check)


def size() -> Rule:
    """An int or a [height, width] pair (:func:`pair` reads it)."""

    def check(key: str, value: Any) -> None:
        pair(key, value)

    return Rule("a positive whole number or a pair [height, width] of them", check)


def size_or_0() -> Rule:
    """A size, or 0."""

    def check(key: str, value: Any) -> None:
        if value != 0 or isinstance(value, bool):
            pair(key, value)

    return Rule(f"0, {size().allows}", check)


def word_or_indices(*words: str) -> Rule:
    """One of a few words, or a list of whole numbers from 0."""
    allows = f"one of {', '.join(words)}, or a list of whole numbers from 0"

    def check(key: str, value: Any) -> None:
        listed = isinstance(value, (list, tuple)) and len(value) > 0
        if value not in words and not (listed and all(type(v) is int and v >= 0 for v in value)):
            raise ConfigError(f"{key} ({value}) must be {allows}: {key}=[2,1,0]")

    return Rule(allows, check)


def matching(pattern: str, allows: str, hint: str) -> Rule:
    """A text that a regular expression matches as a whole; hint: what the message ends with."""

    def check(key: str, value: str) -> None:
        if not re.fullmatch(pattern, value):
            raise ConfigError(f"{key} ({value}) is not {allows}; {hint}")

    return Rule(allows, check)


def directory() -> Rule:
    """A path that is not blank."""

    def check(key: str, value: str) -> None:
        if not value.strip():
            raise ConfigError(f"{key} is empty; name a directory: {key}=DIR")

    return Rule("not empty", check)


def pair(key: str, value: Any) -> tuple[int, int]:
    """A key that takes an int or a [height, width] pair, as a pair; ConfigError otherwise."""
    values = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ConfigError(f"{key} ({value!r}) must be a positive whole number or a pair [height, width] of them")
    return values[0], values[1]
