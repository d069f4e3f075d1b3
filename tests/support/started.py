"""Processes that tests have started: none outlives its test, not even one that failed before its end was awaited."""

from __future__ import annotations

import contextlib
import subprocess

import psutil

STARTED: list[subprocess.Popen[str]] = []
"""By tests.support.processes and tests.support.commands, in this process."""


def end_since(first: int) -> None:
    """Kill those from number first on that still run, with all that they have started."""
    for process in STARTED[first:]:
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            process.wait()
    del STARTED[first:]
