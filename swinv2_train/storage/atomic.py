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
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside path, under a name that no other has, to be written; at the end it takes path's name.

    It is then on the disk, so that a reader, or a crash, meets the old content or the new one, never half of it.  When
    anything fails, it is gone again: on a full disk it would take the space of the next attempt.
    """
    unfinished = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    """Give a file this content, in UTF-8, as replacing() does."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing_output(path: Path) -> Iterator[IO[bytes]]:
    """As replacing(), of a path that a user has named: folders are made for it, and gone with it when anything fails.

    Raises ConfigError when path cannot be written.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            yield file
    except BaseException as error:
        for folder in made:  # the innermost first; one that is in use by now stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
        raise


def sha256_of(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
