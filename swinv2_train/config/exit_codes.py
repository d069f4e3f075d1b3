"""How a command ends: its exit codes, which scripts and schedulers rely on.

Besides those below: 128 + N after signal N where nothing could be saved, 134 (128 + SIGABRT) where NCCL aborts a
process after its own time limit, 137 (128 + SIGKILL) where the kernel or the scheduler killed it.  torchrun ends with 1
whatever its ranks end with; launch/torchrun.sh with the code of the rank that ended first (monitoring/torchrun.py).
"""

from __future__ import annotations

from swinv2_train.config.errors import ConfigError, MachineError

EXIT_DONE = 0
"""Nothing is left to do."""

EXIT_FAILED = 1
"""A fault of the code or the machine, or an outage; of these status.json says ``"outage": true``."""

EXIT_USER_ERROR = 2
"""The input is wrong: the same command will not succeed."""

EXIT_STOPPED = 3
"""Stopped on request, with a complete checkpoint where there is something to save: the same command goes on."""


def exit_code_of(error: ConfigError | MachineError) -> int:
    """2 for wrong input, and 1 for an outage, after which the same command may succeed."""
    return EXIT_FAILED if isinstance(error, MachineError) else EXIT_USER_ERROR
