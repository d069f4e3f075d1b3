"""The error that is the user's to fix."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy."""


class OutageError(ConfigError):
    """What a run needs is not to be had for now, and nothing that the user wrote is wrong: the same command may succeed
    later.  Its exit code is that of a failure, for a scheduler starts no run again whose input is wrong.
    """
