"""Stop signals and time limits, as a flag that the training loop reads between micro-batches; and at once a word."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from swinv2_train.config.exit_codes import EXIT_STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_WAKE = signal.SIGURG
"""Wakes the main thread for what another thread has to say; where nobody answers it, the kernel ignores it."""


class StopNow(BaseException):
    """A stop (the name of its signal, or another reason) came while something was waited for that may be given up."""

    def exit_code(self, saved: bool) -> int:
        """Of a run that ends before its first step.  saved: a complete checkpoint is there; else as a shell says it."""
        return EXIT_STOPPED if saved else 128 + signal.Signals.__members__.get(str(self), signal.SIGTERM)


class StopRequest:
    """Turns SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and a time limit into a flag that the training loop reads between
    micro-batches.

    So does the death of torchrun, which ends its ranks by a signal unless it is killed itself.  Without torchrun a
    parent that ends means nothing: the shell of a nohup or an srun may.  A further signal only sets the flag again, so
    an impatient second Ctrl-C cannot tear a checkpoint.  Each rank sees its own signals: the loop agrees over the ranks
    (``distributed.any_rank(stop.requested is not None)``).

    A handler of Python's runs when the main thread comes back from what it computes, which may take minutes; a thread
    of its own hears of the signal at once, sets the flag and calls `told`.

        with StopRequest() as stop:
            ...
            if any_rank(stop.requested is not None): save and leave with EXIT_STOPPED
    """

    def __init__(self, after_sec: float | None = None) -> None:
        """after_sec: seconds from now after which a stop is requested; None = never."""
        self._deadline = math.inf if after_sec is None else time.monotonic() + after_sec
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._signal: str | None = None
        self._waiting = False
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._woken = -1
        self.told: Callable[[str, bool], None] = lambda name, again: None
        """Called in another thread as soon as a signal arrives: its name, and whether it is not the first."""

    @property
    def requested(self) -> str | None:
        """Name of the last stop signal, e.g. "SIGTERM", or another reason; None while nothing asks to stop."""
        if self._signal is None and self._torchrun not in (None, os.getppid()):
            return "the death of torchrun"
        return self._signal or ("the time limit" if time.monotonic() >= self._deadline else None)

    def install(self) -> Self:
        """Install the handlers, in the main thread: by a rule of Python's no other one can, nor hears of signals."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._previous[_WAKE] = signal.signal(_WAKE, self._wake)
        read, write = self._pipe = os.pipe()
        os.set_blocking(write, False)
        self._woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), name="stop signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Put the handlers back that were there before install."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        self._hear_no_more()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a stop signal raises StopNow, at once where a stop is asked for already: for a wait that may take for
        ever, and whose result a stop drops.
        """
        self._waiting = True
        try:
            if (reason := self.requested) is not None:
                raise StopNow(reason)
            yield
        finally:
            self._waiting = False

    def interrupt(self, reason: str) -> None:
        """A stop that came to another rank, or the time limit's, told by another thread: it ends what interrupting()
        holds, as a signal would.
        """
        if self._signal is None:
            self._signal = reason
            self.told(reason, False)
        if self._waiting:
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        if self._waiting and (reason := self.requested) is not None:
            self._waiting = False
            raise StopNow(reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if self._waiting:
            self._waiting = False
            raise StopNow(self._signal)

    def _listen(self, read: int) -> None:
        """Runs in a thread, until the other end of the pipe is closed."""
        heard = 0
        while numbers := os.read(read, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._signal, heard = signal.Signals(number).name, heard + 1
                    self.told(self._signal, heard > 1)
        os.close(read)

    def _hear_no_more(self) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._woken)  # of an event loop, perhaps
            os.close(self._pipe[1])
            self._pipe = None

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, *exc_info: object) -> None:
        if self._signal is None:
            self.uninstall()
        else:  # the process is about to end, and an impatient signal must not change how
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)
            self._hear_no_more()
