"""One run in a run directory at a time, on one host and on several that share the directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from swinv2_train.config import EXIT_FAILED, ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.storage.atomic import replace_text
from swinv2_train.storage.json_files import read_json, record, text, whole

LOCK_NAME = "run.lock"
"""Names the run that holds the directory, for other hosts; its date is that run's last sign of life."""
BEAT_SEC = 5.0
_MOST_BYTES = 4096
_HOLDER = record({"machine": text(300), "host": text(300), "pid": whole(), "token": text(100)})
SETTLE_SEC = 1.0
"""How long two hosts that take over at the same moment may not see each other's file."""


class RunDirLock:
    """Keeps a second run out of a run directory while this process lives; its end, however it comes, lets go.

    On one host the lock is the kernel's, on the directory itself.  Many network file systems do not pass that on to
    other hosts (or know no locks), so RUN_DIR/run.lock names host and process besides, and is touched every 5 s.
    Another host's that is not touched for wait_sec belongs to a run that was killed.  Clocks are never compared.
    """

    def __init__(self, run_dir: Path, wait_sec: float = 30.0, beat_sec: float = BEAT_SEC) -> None:
        """wait_sec: how long to wait for a run that is about to end, as one that is writing its last checkpoint."""
        self._run_dir, self._path = run_dir, run_dir / LOCK_NAME
        self._wait_sec, self._beat_sec = wait_sec, beat_sec
        self._descriptor: int | None = None
        self._own: dict[str, Any] = {
            "machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8),
        }  # fmt: skip
        self._released = threading.Event()

    def acquire(self) -> bool:
        """Take the lock, where the directory exists and it is not ours yet.  Rank 0 only.

        Returns whether it was taken just now: what was found in the directory before may have changed meanwhile, and is
        to be looked at again.  Raises BlockingIOError when another run holds it for longer than wait_sec.
        """
        if self._descriptor is not None or not self._run_dir.is_dir():
            return False
        deadline = time.monotonic() + self._wait_sec
        kernel_locks = self._lock_directory(deadline)
        try:
            self._claim(kernel_locks)
        except BlockingIOError:
            self.release()
            raise
        return True

    @property
    def held(self) -> bool:
        """Whether this process keeps others out."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let another run in."""
        self._released.set()
        if self._descriptor is not None:
            if self._holder() == self._own:
                with contextlib.suppress(OSError):
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    # On this host

    def _lock_directory(self, deadline: float) -> bool:
        """Take the kernel's lock; returns whether the file system has such."""
        while True:
            descriptor = os.open(self._run_dir, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if time.monotonic() > deadline:
                    raise self._in_use("another run") from None
                time.sleep(0.1)
                continue
            except OSError:  # no locks here
                self._descriptor = descriptor
                return False
            if self._is_run_dir(descriptor):
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # it was removed and made anew while this one waited

    def _is_run_dir(self, descriptor: int) -> bool:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        return os.path.samestat(os.fstat(descriptor), os.stat(self._run_dir))

    # On others

    def _claim(self, kernel_locks: bool) -> None:
        """Write our name where no living run of another host has written its own, and touch it from now on."""
        watched_since, first_seen, seen = time.monotonic(), self._seen(), None
        while (holder := self._holder()) is not None and not (kernel_locks and self._is_here(holder)):
            seen = self._seen()
            if time.monotonic() - watched_since > self._wait_sec:
                if seen != first_seen:
                    raise self._in_use(f"a run on {shown(holder['host'])} (process {holder['pid']})")
                break  # it was killed
            time.sleep(min(0.1, self._beat_sec))
        try:
            replace_text(self._path, json.dumps(self._own) + "\n")
        except OSError:  # a full or read-only disk: whoever writes a checkpoint says so
            return
        if holder is not None and not self._is_here(holder):
            time.sleep(SETTLE_SEC)
        if self._holder() != self._own:
            raise self._in_use("another run that started at this moment")
        self._released.clear()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _beat(self) -> None:
        """Show that this run lives; end it where another host has taken it for dead and writes here by now."""
        while not self._released.wait(self._beat_sec):
            holder = self._holder()
            if holder is not None and holder != self._own and not self._released.is_set():
                print(
                    f"error: run_dir ({self._run_dir}) was taken over by a run on {shown(holder['host'])} (process "
                    f"{holder['pid']}), which saw no sign of this one for {self._wait_sec:g} s; this one ends",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_FAILED)
            with contextlib.suppress(OSError):
                os.utime(self._path, follow_symlinks=False)

    def _holder(self) -> dict[str, Any] | None:
        """Who holds the directory, by the file; None where there is none, or none that can be read."""
        try:
            holder: dict[str, Any] = read_json(self._path, _MOST_BYTES, _HOLDER)
        except (FileNotFoundError, ConfigError):
            return None
        return holder

    def _is_here(self, holder: dict[str, Any]) -> bool:
        return bool(holder["machine"] == self._own["machine"])

    def _seen(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _in_use(self, by: str) -> BlockingIOError:
        return BlockingIOError(
            f"run_dir ({self._run_dir}) is in use by {by}; end that first, or choose another run_dir"
        )


def _machine() -> str:
    """The same in all processes of this kernel, whose locks exclude each other, and in no others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
