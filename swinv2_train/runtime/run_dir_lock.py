"""One run in a run directory at a time."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Self


class RunDirLock:
    """Keeps a second run out of a run directory while this process lives; its end, however it comes, lets go.

    The lock is the kernel's, on the directory itself, and no file.  A file system without locks goes without.
    """

    def __init__(self, run_dir: Path, wait_sec: float = 30.0) -> None:
        """wait_sec: how long to wait for a run that is about to end, as one that is writing its last checkpoint."""
        self._run_dir = run_dir
        self._wait_sec = wait_sec
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock, where the directory exists and it is not ours yet.  Rank 0 only.

        Returns whether it was taken just now: what was found in the directory before may have changed meanwhile, and is
        to be looked at again.  Raises BlockingIOError when another run holds it for longer than wait_sec.
        """
        if self._descriptor is not None or not self._run_dir.is_dir():
            return False
        descriptor = os.open(self._run_dir, os.O_RDONLY)
        deadline = time.monotonic() + self._wait_sec
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise BlockingIOError(
                        f"run_dir ({self._run_dir}) is in use by another run; end that first, or choose another run_dir"
                    ) from None
                time.sleep(0.1)
            except OSError:  # no locks here
                break
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let another run in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
