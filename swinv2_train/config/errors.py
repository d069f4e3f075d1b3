"""The error that is the user's to fix."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy."""
