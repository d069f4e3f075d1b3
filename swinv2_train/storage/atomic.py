"""Files that are complete or absent, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from swinv2_train.config import ConfigError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[str]:
    """A temporary name beside `path` that is renamed to it when the block succeeds."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256_of(path: str) -> str:
    """Of the whole file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old text or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would take the room of the next attempt
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside path, under a name that no other has, to be written; at the end it takes path's name.

    It is then on the disk.  When anything fails, it and the folders made for it are gone again.  Raises ConfigError
    when path cannot be written.
    """
    unfinished = path.with_name(f"{path.name[:40]}.{secrets.token_hex(8)}.unfinished")
    made: list[Path] = []
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        for folder in made:  # the innermost first; one that is in use by now stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
        raise
