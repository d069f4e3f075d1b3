"""The error that is the user's to fix."""

from __future__ import annotations

from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy.

    What the message quotes may come from a file of somebody else, so it is escaped and cut here, where every message
    passes by: it may go to a terminal, a log, a status file or a page.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, MESSAGE_CHARACTERS, lines=True))
