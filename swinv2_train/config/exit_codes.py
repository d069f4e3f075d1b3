"""How a command ends: its exit codes, which scripts and schedulers rely on."""

from __future__ import annotations

EXIT_DONE = 0


EXIT_FAILED = 1


EXIT_USER_ERROR = 2


EXIT_STOPPED = 3
