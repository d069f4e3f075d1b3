"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, names: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: "did you mean NAME?", or otherwise where none is near."""
    near = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def did_you_mean_key(given: str, keys: Iterable[str], otherwise: str) -> str:
    """The same about a dotted key: near is the most similar one, and every one that ends in the same part."""
    keys = list(keys)
    near = difflib.get_close_matches(given, keys, n=1, cutoff=0.7)  # keys of one section are similar by that alone
    leaf = given.rsplit(".", 1)[-1]
    near += [key for key in keys if key.rsplit(".", 1)[-1] == leaf and key not in near]
    return f"did you mean {' or '.join(near[:3])}?" if near else otherwise
