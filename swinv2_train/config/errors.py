"""The error that is the user's to fix, and the one that is the machine's."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy."""


class MachineError(RuntimeError):
    """The machine lacks what the work takes: memory, open files, a disk or network that answers, a permission.

    It says nothing of the input, so no policy for damaged input applies: the command stops with one message and exit
    code 1, and may be started again.
    """
