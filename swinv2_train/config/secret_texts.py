"""What must not be written down: passwords, tokens and signatures in addresses and commands, keys of the environment.

A run directory is copied, attached to reports and shown to others.  So whatever goes into it, into a log or onto the
console goes through without_secrets, and a resume takes its addresses from the command line.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "REDACTED"
"""Stands for what was left out."""

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:API_?KEY|ACCESS_?KEY|TOKEN|SECRET|PASS(?:WORD|WD|PHRASE)?|CREDENTIALS?|SIGNATURE|SAS)(?:$|_)"
)
_KEY_NAME = re.compile(r"(?:^|_)KEY(?:$|_)")
_WORD = re.compile(r"[a-z_-]+|[A-Z_-]+")
"""SORT_KEY=training is no secret, but without it no log could be read."""
_SHORTEST = 8
"""A shorter value of the environment may be any word."""
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s'\"]*@")
_QUERY = re.compile(  # :: joins shards
    r"([A-Za-z][A-Za-z0-9+.-]*://(?:(?!::)[^\s?#'\"<>|])*)[?#](?:(?!::)[^\s'\"<>|])+"
)
_WEB_PATH = re.compile(r"(?i)(https?://[^/?#\s'\"<>|]+)((?:(?!::)[^\s?#'\"<>|])+)")
_AFTER_NAME = re.compile(
    r"(?i)(/(?:[\w-]*[_-])?(?:token|sas|sig|signature|key|apikey|secret|password|passwd|pwd|credentials?)/)([^/]+)(?=(/?))"
)
_FILE_NAME = re.compile(r"\.[A-Za-z0-9]{1,5}\Z")
"""https://host/key/train-000000.tar: a last part that is a file's name is none."""
_ASSIGNED = re.compile(
    r"(?i)((?:\b(?:[\w-]*(?:token|secret|password|passwd|api[-_]?key|access[-_]?key(?:[-_]?id)?|signature|credential)"
    r"|sig|pwd)=|\b(?:authorization|[\w-]+-(?:token|key|secret))\s*:\s*)(?:(?:bearer|basic|token)\s+)?)[^\s'\"&;|,)]+"
)
_OPTION = re.compile(
    r"(?i)(\s(?:(?:-u|--user)[ =](?=[^\s:]+:)|(?:--password|--passwd|--token|--secret|--api-key)[ =]))[^\s'\"]+"
)
_SUSPECT = re.compile(
    r"(?i)://|(?:token|secret|password|passwd|api[-_]?key|access[-_]?key|id|signature|credential|sig|pwd)=|authorization"
    r"|-(?:token|key|secret)\s*:|\s(?:-u|--user|--password|--passwd|--token|--secret|--api-key)[ =]"
)


def without_secrets(text: str) -> str:
    """A text with REDACTED for the user, password, query and fragment of each address in it, for the part of a web
    address's path that follows one called token, sas, sig, key or the like, for what is assigned to a name like token
    or handed to a program as its password, and for the values of environment variables called so.

    A secret elsewhere in a path, which no word announces, cannot be told from a name (docs/security.md).
    """
    for value in secret_values():
        text = text.replace(value, REDACTED)
    if not _SUSPECT.search(text):
        return text
    text = _USER.sub(rf"\1{REDACTED}@", text)
    text = _WEB_PATH.sub(lambda found: found[1] + _AFTER_NAME.sub(_without_value, found[2]), text)
    text = _QUERY.sub(rf"\1?{REDACTED}", text)
    text = _ASSIGNED.sub(rf"\1{REDACTED}", text)
    return _OPTION.sub(rf"\1{REDACTED}", text)


def _without_value(found: re.Match[str]) -> str:
    is_file = not found[3] and _FILE_NAME.search(found[2]) is not None
    return found[0] if is_file else found[1] + REDACTED


@functools.lru_cache(maxsize=1)
def secret_values() -> tuple[str, ...]:
    """The values of this process's environment variables that are called KEY, TOKEN, ..., the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and not re.search(r"\s", value) and _is_secret(name.upper(), value)
    }
    return tuple(sorted((value for value in found if not os.path.exists(value)), key=len, reverse=True))


def _is_secret(name: str, value: str) -> bool:
    return _SECRET_NAME.search(name) is not None or (_KEY_NAME.search(name) is not None and not _WORD.fullmatch(value))


def is_redacted(address: str) -> bool:
    """Whether an address or a command has lost its secrets to without_secrets."""
    return re.search(rf"://{REDACTED}@|[?/]{REDACTED}\b|[=: ]{REDACTED}\b", address) is not None


def public(values: Any) -> Any:
    """Plain values, dicts and lists with each text that may hold a secret (an address, a command) without it."""
    if isinstance(values, Mapping):
        return {name: public(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [public(value) for value in values]
    if isinstance(values, str) and ("://" in values or values.startswith("pipe:") or _holds_key(values)):
        return without_secrets(values)
    return values


def _holds_key(text: str) -> bool:
    return any(value in text for value in secret_values())
