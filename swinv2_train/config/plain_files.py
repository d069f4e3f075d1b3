"""Files that somebody else may have made, read whole: regular ones alone, and never more of them than a bound."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from swinv2_train.config.errors import ConfigError


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading.  Raises as read_bytes does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # to open a pipe would wait for ever
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is no regular file; restore the file that belongs there")
    return descriptor


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of at most most_bytes.

    Raises OSError where it cannot be read; ConfigError, naming path, where it is a pipe, a device or a folder, or
    larger.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ConfigError(f"{path} holds more than {most_bytes:,} bytes, which such a file never does; restore it")
    return content
