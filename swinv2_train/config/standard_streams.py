"""The three files that a process expects to be open, whoever started it."""

from __future__ import annotations

import os
import sys


def hold_standard_streams() -> None:
    """Where the process was started without stdin, stdout or stderr, the null device stands in.

    Otherwise the next file that is opened would get the number of one of them, and what is printed; and Python's own
    streams are None, so that the first word of anybody ends the command.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            assert null == number, null
            os.set_inheritable(number, True)  # programs that we start expect the same
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open as long as the process is
