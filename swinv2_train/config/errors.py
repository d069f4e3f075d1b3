"""The error that is the user's to fix, and the one that is the machine's."""

from __future__ import annotations

from swinv2_train.config.shown import MESSAGE_CHARACTERS, TRACEBACK_CHARACTERS, shown


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy.

    What the message quotes may come from a file of somebody else, so it is escaped and cut here, where every message
    passes by: it may go to a terminal, a log, a status file or a page.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, MESSAGE_CHARACTERS, lines=True))


class MachineError(RuntimeError):
    """The machine lacks what the work takes: memory, open files, a disk or network that answers, a permission; or a
    process of ours was killed.

    It says nothing of the input, so no policy for damaged input applies: the command stops with one message and exit
    code 1, and may be started again.  Its message is escaped and cut as that of a ConfigError is.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, TRACEBACK_CHARACTERS, lines=True))
