"""One kind of file of somebody else's, and what our commands do with it.

A target gets bytes and an empty folder of its own.  It may raise an error of ours (ConfigError and its kinds); anything
else, a second too many, a byte beyond a bound of memory, or a file touched outside is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    name: str
    seeds: Sequence[bytes]
    """Sound files, which must be accepted."""
    run: Callable[[bytes, Path], None]
    tokens: Sequence[bytes] = ()
