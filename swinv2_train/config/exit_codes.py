"""How a command ends: its exit codes, which scripts and schedulers rely on."""

from __future__ import annotations

from swinv2_train.config.errors import ConfigError, MachineError

EXIT_DONE = 0


EXIT_FAILED = 1


EXIT_USER_ERROR = 2


EXIT_STOPPED = 3


def exit_code_of(error: ConfigError) -> int:
    """2 for wrong input, and 1 for an outage, after which the same command may succeed."""
    return EXIT_FAILED if isinstance(error, MachineError) else EXIT_USER_ERROR
