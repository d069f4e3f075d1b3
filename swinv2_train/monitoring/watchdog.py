"""Signs of life: what every rank does, written down while it works, and an end to a run that hangs.

RUN_DIR/status.json             the whole run, by rank 0; swinv2-status shows it
RUN_DIR/health/rank_00000.json  each rank's last sign of life, one line
RUN_DIR/stacks/rank_00000.txt   where every thread of a rank was when the run was found to hang

Threads do the writing and the watching, so that neither is waited for, and so that both go on while the main thread
hangs in C code.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

from swinv2_train.config import RuntimeConfig
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown
from swinv2_train.monitoring.activity import DATA_WAIT, ENDING, STARTING, STEP, RankActivity
from swinv2_train.monitoring.console import Console
from swinv2_train.monitoring.signs import (
    HEALTH,
    STATUS,
    child_processes,
    diagnose_hang,
    process_state,
    rank_file,
    rank_files,
    read_ranks,
    silent_ranks,
    thread_location,
)
from swinv2_train.storage.atomic import replace_text

HEARTBEAT_SEC = 10.0
_REPORT_SEC = 20.0
"""How long a hanging run may take to write where it hangs; its disk may be what it hangs on."""
_STATES = {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}


class HangError(RuntimeError):
    """No rank has moved for too long."""


def timeout_warning(config: RuntimeConfig, world_size: int) -> str | None:
    """A line for the user where the process group gives up before a hang could be diagnosed; None where it does not."""
    hang_sec, group_sec = config.hang_timeout_sec, config.process_group_timeout_sec
    if world_size == 1 or hang_sec is None or hang_sec < group_sec:
        return None
    return (
        f"runtime.hang_timeout_sec ({hang_sec:g}) is not below runtime.process_group_timeout_sec ({group_sec}): a hang "
        "ends the run by a collective's own limit, and nobody says which rank was waited for; lower the one or raise "
        "the other"
    )


class Heartbeat:
    """Writes a rank's signs of life until close(), and ends the process when the rank hangs.

    config.hang_timeout_sec is for a micro-batch, the optimizer's step or a wait for data.  A first step (which may
    compile), an evaluation batch, a picture and a checkpoint may take as long as config.process_group_timeout_sec where
    that is longer: the ranks that wait for them meet it anyway.  Start and end have no limit.
    """

    def __init__(
        self,
        activity: RankActivity,
        run_dir: Path,
        rank: int,
        world_size: int,
        config: RuntimeConfig,
        console: Console,
        incoming: Callable[[], object] = lambda: None,
    ) -> None:
        """incoming: what it gives changes while data is on its way to this host; a wait for it is no hang, and a long
        one has it on the console as text, unless it is false: nothing is on its way.
        """
        self._incoming, self._came = incoming, incoming()
        self._told_at = 0.0
        self.activity, self.run_dir, self.rank, self.world_size = activity, run_dir, rank, world_size
        self.hang_timeout_sec, self.console = config.hang_timeout_sec, console
        self._patience_sec = max(config.hang_timeout_sec or 0, config.process_group_timeout_sec)
        self.every_sec = min(HEARTBEAT_SEC, (config.hang_timeout_sec or math.inf) / 4)
        self._started_at = time.time()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._main = threading.get_ident()
        self._place: str | None = None  # where the main thread hangs

    def start(self) -> Self:
        """Write the first sign of life and begin to watch."""
        with suppress(OSError):  # _write will say so
            (self.run_dir / HEALTH).mkdir(parents=True, exist_ok=True)
            for path in rank_files(self.run_dir) if self.rank == 0 else ():
                if int(path.stem.removeprefix("rank_")) >= self.world_size:  # of an earlier start with more ranks
                    path.unlink(missing_ok=True)
        work = [self._beat] if self.hang_timeout_sec is None else [self._beat, self._watch]
        for function in work:
            thread = threading.Thread(target=function, name=function.__name__.strip("_"), daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def close(self, exit_code: int, reason: str | None = None, outage: bool = False) -> None:
        """Write how the run ended and stop; a second call does nothing.

        outage: no input is wrong and no code, so that the same command may succeed; launch files start it again.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self.activity.changed.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(_REPORT_SEC)
        self._write(_STATES.get(exit_code, "failed"), reason, outage)

    def _beat(self) -> None:
        """The thread that writes."""
        news = self.activity.changed if self.rank == 0 else self._closed  # the status has the figures
        while True:
            self.activity.changed.clear()
            if self._closed.is_set():
                return
            self._write("running", None)
            self._tell_incoming()
            if news.wait(self.every_sec):
                self._closed.wait(min(1.0, self.every_sec))  # not more often than that

    def _tell_incoming(self) -> None:
        """Say how far the data is that rank 0 waits for, each time that a beat has passed in waiting."""
        now = time.time()
        if self.rank == 0 and self.activity.current == DATA_WAIT:
            waited_sec = now - max(self.activity.since, self._told_at)
            if waited_sec >= self.every_sec and (coming := self._incoming()):
                self._told_at = now
                self.console.say(f"waiting for data: {coming}")

    def _write(self, state: str, reason: str | None, outage: bool = False) -> None:
        """This rank's sign of life and, on rank 0, the run's status.  A disk that fails is no reason to stop."""
        activity = self.activity
        mine = {
            "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "state": state,
            "reason": None if reason is None else without_secrets(reason),
            "doing": activity.current, "doing_since": activity.since, "step": activity.step,
            "moves": activity.progress_count, "place": self._place, "updated_at": time.time(),
        }  # fmt: skip
        try:
            replace_text(rank_file(self.run_dir, self.rank), json.dumps(mine) + "\n")
            if self.rank == 0:
                self._write_status({**mine, "outage": outage})
        except OSError as error:
            print(f"no sign of life could be written: {error}", file=sys.stderr)

    def _write_status(self, mine: Mapping[str, Any]) -> None:
        common = {name: value for name, value in mine.items() if name not in ("rank", "moves", "place")}
        figures = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value  # NaN is no JSON
            for name, value in self.activity.figures.items()
        }
        status = {
            **common, **figures, "world_size": self.world_size, "started_at": self._started_at,
            "heartbeat_sec": self.every_sec,
        }  # fmt: skip
        replace_text(self.run_dir / STATUS, json.dumps(status, indent=1) + "\n")

    # ----------------------------------------------------------------------------------------------------------------
    # The watchdog

    def _watch(self) -> None:
        """The thread that ends the process.

        Should the main thread hang in C code that keeps Python's lock, this thread hangs too; then faulthandler's,
        which needs no lock, writes the stacks to the rank's log and ends the process with exit code 1.
        """
        assert self.hang_timeout_sec is not None
        awake_at, progress, idle_sec = time.monotonic(), -1, 0.0
        moves: dict[int, int] | None = None
        while not self._closed.wait(self.every_sec):
            faulthandler.dump_traceback_later(3 * self.hang_timeout_sec, exit=True, file=2)
            now = time.monotonic()
            idle_sec += min(now - awake_at, self.every_sec)  # more, and the whole process was stopped meanwhile
            awake_at = now
            self._look_for_data()
            if self.activity.progress_count != progress or self._in_debugger():
                progress, idle_sec = self.activity.progress_count, 0.0
            before, moves = moves, self._moves_of_waiting() if idle_sec > self._limit_sec() / 2 else None
            if before is not None and moves is not None and moves != before:
                idle_sec = 0.0
            if idle_sec > self._limit_sec():
                self._closed.set()  # the last word is the report's
                self.activity.changed.set()
                what = f"rank {self.rank}: nothing has moved for {idle_sec:.0f} s; writing stacks"
                os.write(2, f"{what} to {self.run_dir}\n".encode())  # first, should that disk hang
                reporter = threading.Thread(target=self._report, args=(idle_sec,), name="hang report", daemon=True)
                reporter.start()
                reporter.join(self.every_sec + _REPORT_SEC)
                os._exit(EXIT_FAILED)
        faulthandler.cancel_dump_traceback_later()

    def _look_for_data(self) -> None:
        """Data that comes, however slowly, is a move of who waits for it."""
        if self.activity.current == DATA_WAIT and (came := self._incoming()) != self._came:
            self._came = came
            self.activity.mark_progress()

    def _moves_of_waiting(self) -> dict[int, int]:
        """The moves of other ranks that wait for data, for whom this one waits; by their signs of life."""
        others = read_ranks(self.run_dir) if self.activity.current in STEP else {}
        return {rank: sign["moves"] for rank, sign in others.items() if sign.get("doing") == DATA_WAIT}

    def _limit_sec(self) -> float:
        assert self.hang_timeout_sec is not None
        if self.activity.current in (STARTING, ENDING):
            return math.inf
        quick = self.activity.took_steps and self.activity.current in STEP
        return self.hang_timeout_sec if quick else self._patience_sec

    def _in_debugger(self) -> bool:
        return any(frame.f_code.co_filename.endswith(("/pdb.py", "/bdb.py")) for frame in self._main_frames())

    def _main_frames(self) -> Iterator[FrameType]:
        """The frames of the thread that trains, the innermost first."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            yield frame
            frame = frame.f_back

    def _report(self, quiet_sec: float) -> None:
        """Write where this rank hangs; then, with what the other ranks wrote, which of them the run waits for."""
        try:
            self._place = thread_location(list(self._main_frames()))
            self._dump_stacks(quiet_sec)
            self._write("running", None)
            time.sleep(self.every_sec)  # the others find out at about the same time
            everyone = read_ranks(self.run_dir)
            text = (
                f"nothing has moved for {quiet_sec:.0f} s (runtime.hang_timeout_sec) after step {self.activity.step}: "
                f"{diagnose_hang(everyone, self.world_size, time.time(), quiet_sec / 2)}; "
                f"stacks in {self.run_dir / 'stacks'}"
            )
            silent = silent_ranks(everyone, self.world_size, time.time(), quiet_sec / 2)
            speaker = min((rank for rank in range(self.world_size) if rank not in silent), default=self.rank)
            self._write("failed", text)
            if self.rank == speaker:
                if self.rank:  # rank 0 is silent, so its status is taken over
                    self._write_status({**everyone.get(0, everyone[self.rank]), "state": "failed", "reason": text})
                self.console.fail(HangError(text))
            else:
                print(shown(text, MESSAGE_CHARACTERS), file=sys.stderr)
        except Exception:  # noqa: BLE001  the process ends in any case, and the log is all that is left
            traceback.print_exc()

    def _dump_stacks(self, quiet_sec: float) -> None:
        path = self.run_dir / "stacks" / f"rank_{self.rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            print(
                f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank} pid {os.getpid()} on "
                f"{socket.gethostname()}: {self.activity.current}, step {self.activity.step}, "
                f"no move for {quiet_sec:.0f} s",
                file=file,
                flush=True,
            )
            faulthandler.dump_traceback(file=file, all_threads=True)
            for pid in child_processes():
                print(f"child process {pid}: {process_state(pid)}", file=file)
