"""The errors that are told in a message of their own: the user's to fix, and the machine's."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy."""


class MachineError(RuntimeError):
    """Something of this machine gave way: a process that was killed, memory that ran out.  The message says what."""
