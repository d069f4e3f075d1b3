"""The terminal that a run speaks on: our own lines and the progress display.  Libraries speak to a log file instead.

Only rank 0 speaks; any rank may say in one line that it failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar, cast

from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import MESSAGE_CHARACTERS, NOTES, TRACEBACK_CHARACTERS, shown

T = TypeVar("T")

_LINE_EVERY_SEC = 5.0
_MOST_OF_A_FAILURE = 500
"""Characters of an error on the console; the log has all."""


class Console:
    """Our own lines on the terminal (or pipe) that the process was started with, or on what a notebook or a program has
    put in the place of sys.stdout and sys.stderr.  Made by :func:`open_console`.
    """

    def __init__(self, rank: int, log_path: Path, saved_stdout: int, saved_stderr: int) -> None:
        self.rank = rank
        self.log_path = log_path
        self._saved = (saved_stdout, saved_stderr)
        self._previous_hooks = sys.excepthook, sys.breakpointhook
        self._previous_streams = sys.stdout, sys.stderr
        self._out, self._err = (
            _text_on(saved) if _is_on(stream, number) else stream
            for stream, number, saved in zip(self._previous_streams, (1, 2), self._saved, strict=True)
        )
        self._buffered = [getattr(stream, "line_buffering", None) is False for stream in self._previous_streams]
        self._knew_crashes = faulthandler.is_enabled()
        self._bar: Any = None  # a tqdm bar that must step aside for a line
        self._closed = False
        self._notes = _Notes(self)
        logging.getLogger(NOTES).addHandler(self._notes)

    @property
    def err(self) -> TextIO:
        """The stderr that the process was started with, for the progress bar."""
        return self._err

    @property
    def is_terminal(self) -> bool:
        """True when a person watches: the original stderr is a terminal."""
        return self._err.isatty()

    def say(self, text: str) -> None:
        """One line on stdout, from rank 0 only; several where the text has line breaks of our own."""
        if self.rank == 0:
            self._write(self._out, shown(text, MESSAGE_CHARACTERS, lines=True))

    def fail(self, error: BaseException) -> None:
        """Traceback to this rank's log, and one short line on stderr that names rank, error and log; from any rank."""
        trace = "".join(traceback.format_exception(error))
        print(shown(trace, TRACEBACK_CHARACTERS, lines=True), end="", file=sys.stderr)
        sys.stderr.flush()
        first_line = (str(error).strip().splitlines() or [""])[0]
        what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        what = shown(what, _MOST_OF_A_FAILURE)
        self._write(self._err, f"rank {self.rank} failed: {what} (traceback in {self.log_path})")

    def attach_bar(self, bar: Any) -> None:
        """Lines are written above this tqdm bar from now on; None detaches it."""
        self._bar = bar

    def close(self) -> None:
        """Give the process its own stdout, stderr and exception hook back."""
        if self._closed:
            return
        self._closed = True
        logging.getLogger(NOTES).removeHandler(self._notes)
        sys.excepthook, sys.breakpointhook = self._previous_hooks
        sys.stdout, sys.stderr = self._previous_streams
        for stream, buffered in zip(self._previous_streams, self._buffered, strict=True):
            if buffered and isinstance(stream, io.TextIOWrapper):
                with contextlib.suppress(OSError, ValueError):  # it flushes, and its reader may have gone
                    stream.reconfigure(line_buffering=False)
        if hasattr(faulthandler, "unregister"):
            faulthandler.unregister(signal.SIGUSR2)
        if not self._knew_crashes:
            faulthandler.disable()
        _flush_streams()
        for target, saved, stream in zip((1, 2), self._saved, (self._out, self._err), strict=True):
            with contextlib.suppress(OSError, ValueError):  # the reader of a pipe has gone
                stream.flush()
            os.dup2(saved, target)
            os.close(saved)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _write(self, stream: TextIO, text: str) -> None:
        if self._closed:
            return
        text = without_secrets(text)
        try:
            if self._bar is not None:
                self._bar.clear()
            stream.write(text + "\n")
            stream.flush()
            if self._bar is not None:
                self._bar.refresh()
        except (OSError, ValueError) as error:  # `train | head`: the reader has gone; the run goes on, and has its log
            print(f"console lost ({error}): {text}", file=sys.stderr)

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.fail(error.with_traceback(trace))

    def _breakpointhook(self, *arguments: object, **more: object) -> None:
        """breakpoint() talks to the terminal, although stdout is the log."""
        import pdb  # noqa: T100  this is what breakpoint() is for

        pdb.Pdb(stdin=sys.stdin, stdout=self._out).set_trace(sys._getframe(1))


def open_console(run_dir: Path, rank: int) -> Console:
    """Keep the process's stdout and stderr for our own lines, and point descriptors 1 and 2 at the rank's log file.

    Where a notebook or a program has put something else in their place, that has our own lines.  What libraries and
    child processes print is appended to RUN_DIR/logs/rank_NNNNN.log.  An uncaught exception leaves its traceback there
    and one line on the console; `kill -USR2 PID` and crashes leave the stacks of all threads there.  ``close()`` undoes
    it.
    """
    log_path = run_dir / "logs" / f"rank_{rank:05d}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    _flush_streams()
    console = Console(rank, log_path, os.dup(1), os.dup(2))  # os.dup: not inherited by programs that we start
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    to_log = (_to_log(stream, number) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    sys.stdout, sys.stderr = (cast(TextIO, _WithoutSecrets(stream)) for stream in to_log)
    os.write(2, f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} pid {os.getpid()}\n".encode())
    sys.excepthook, sys.breakpointhook = console._excepthook, console._breakpointhook
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    return console


class _Notes(logging.Handler):
    """What is found while images are read: in the rank's log, and on the console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = f"note: {record.getMessage()}"
        print(text, file=sys.stderr)
        self._console.say(text)


class _WithoutSecrets:
    """A stream to which tracebacks and warnings of any library may go, with the addresses that they name."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_secrets(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_log(stream: TextIO, number: int) -> TextIO:
    """The stream whose words reach the log, of which the descriptor is one by now."""
    if not _is_on(stream, number):
        return _text_on(number)
    if isinstance(stream, io.TextIOWrapper):  # else block buffered, and a killed rank's last words lost
        stream.reconfigure(line_buffering=True)
    return stream


def _is_on(stream: TextIO, number: int) -> bool:
    """Whether the stream writes to the descriptor; a notebook's has none, or another one."""
    try:
        return stream.fileno() == number
    except (AttributeError, OSError, ValueError):
        return False


def _text_on(number: int) -> TextIO:
    return os.fdopen(number, "w", buffering=1, errors="replace", closefd=False)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its reader has gone
            stream.flush()


# --------------------------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """A tqdm bar on a terminal, a line every few seconds elsewhere, with the same numbers."""

    def __init__(self, mode: str, console: Console) -> None:
        if mode == "auto":
            mode = "bar" if console.is_terminal else "lines"
        self.mode = mode
        self.console = console
        self._bar: Any = None
        self._loss: float | None = None
        self._images_per_sec: float | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=200)  # recent (time, step)
        self._said_at = -math.inf
        self._said_step = -1

    def update(self, step: int, total: int, loss: float | None, images_per_sec: float | None) -> None:
        if self.mode == "none":
            return
        self._loss = loss  # of this very step, or none: the one of an earlier step would pass for it
        self._images_per_sec = self._images_per_sec if images_per_sec is None else images_per_sec
        now = time.monotonic()
        self._marks.append((now, step))
        if self.mode == "bar":
            self._move_bar(step, total, self._numbers(step, total))
        elif now - self._said_at >= _LINE_EVERY_SEC or (step >= total and step != self._said_step):
            self.console.say(f"step {step}/{total}  {self._numbers(step, total)}".rstrip())
            self._said_at, self._said_step = now, step

    def within(self, step: int, total: int, number: int, count: int, seconds: float) -> None:
        """Of the step after `step`, micro-batch `number` of `count` is done after so many seconds: shown where a step
        takes long.
        """
        now = time.monotonic()
        if self.mode == "none" or min(seconds, now - self._said_at) < _LINE_EVERY_SEC:
            return
        each = seconds / number
        text = f"micro-batch {number}/{count}  {each:.3g} s each, {duration_text(each * count)} a step"
        text += f"  {duration_text(each * (count * (total - step) - number))} left"
        self._said_at = now
        if self.mode == "bar":
            self._move_bar(step, total, text)
        else:
            self.console.say(f"step {step}/{total}  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self.console.attach_bar(None)
            self._bar.close()
            self._bar = None

    def _move_bar(self, step: int, total: int, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm  # here: not every run has a bar

            self._bar = tqdm(
                total=total, initial=step, file=self.console.err, mininterval=0.25, **_bar_size(self.console.err),
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {desc}",
            )  # fmt: skip
            self.console.attach_bar(self._bar)
        self._bar.set_description_str(text, refresh=False)
        moved = step - self._bar.n
        self._bar.update(moved)
        if step >= total or not moved:
            self._bar.refresh()

    def _numbers(self, step: int, total: int) -> str:
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if self._images_per_sec is not None:
            parts.append(f"{self._images_per_sec:,.0f} images/s" if self._images_per_sec >= 10 else
                         f"{self._images_per_sec:.2f} images/s")  # fmt: skip
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step > first_step:
            seconds = (last_time - first_time) / (last_step - first_step) * max(0, total - step)
            parts.append(f"{duration_text(seconds)} left")
        return "  ".join(parts)


def counted(items: Iterable[T], count: int, what: str, say: Callable[[str], None]) -> Iterator[T]:
    """The items, `count` of them; every few seconds it is said how many are done and how long the rest will take."""
    started = said_at = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - said_at >= _LINE_EVERY_SEC:
            left = (now - started) / number * (count - number)
            say(f"{what} {number} of {count}, {duration_text(left)} left")
            said_at = now
        yield item


def tracked(items: Iterable[T], count: int, what: str, unit: str, mode: str, say: Callable[[str], None]) -> Iterator[T]:
    """The items, `count` of them, with a bar on a terminal and counted's lines elsewhere.

    mode: log.progress.
    """
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    if mode == "bar":
        from tqdm import tqdm  # here: not every command has a bar

        yield from tqdm(items, what, count, unit=unit, mininterval=0.25, **_bar_size(sys.stderr))
    elif mode == "lines":
        yield from counted(items, count, f"{what}: {unit}", say)
    else:
        yield from items


def _bar_size(stream: TextIO) -> dict[str, Any]:
    """tqdm's arguments: as wide as the terminal, where that tells its size; tqdm would show nothing on others."""
    size = os.get_terminal_size(stream.fileno()) if stream.isatty() else (0, 0)
    known = min(size) > 0
    return {"dynamic_ncols": known, "ncols": None if known else 80, "nrows": None if known else 24}


def ticking(what: str, say: Callable[[str], None]) -> Callable[[], None]:
    """To be called after each piece of work of which nobody knows the number: says every few seconds how many were."""
    done, said_at = 0, time.monotonic()

    def tick() -> None:
        nonlocal done, said_at
        done += 1
        if time.monotonic() - said_at >= _LINE_EVERY_SEC:
            say(f"{what} {done}")
            said_at = time.monotonic()

    return tick


def duration_text(seconds: float) -> str:
    """4:05, 1:02:03 or 3 days 4 h, for people."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86400} days {whole % 86400 // 3600} h"
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
