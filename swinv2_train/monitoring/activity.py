"""What a rank does at the moment: written by its main thread, read by the threads that watch it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STARTING, FIRST_STEP, TRAINING, ENDING = "starting", "first step", "training", "ending"
DATA_WAIT, RANK_WAIT = "waiting for data", "waiting for other ranks"
STEP = (TRAINING, DATA_WAIT, RANK_WAIT)
"""What a rank does within a step, to which runtime.hang_timeout_sec applies."""


class RankActivity:
    """What this rank does at the moment.  The main thread changes it and other threads read it; it writes nothing."""

    def __init__(self) -> None:
        self.current = STARTING
        self.since = time.time()
        """When the current activity began, in seconds since 1970."""
        self.progress_count = 0
        """Changes of activity, micro-batches and steps: on a rank that is ahead of another there are more."""
        self.step = 0
        """Completed optimizer steps of the run."""
        self.took_steps = False
        """True after the first step of this start, which may compile."""
        self.figures: dict[str, Any] = {}
        """What rank 0 knows of the run: total_steps, loss, images_per_sec, checkpoint_step, ..."""
        self.changed = threading.Event()
        """Set when the figures are new."""
        self._marks: deque[tuple[float, int]] = deque(maxlen=200)  # recent (time, step)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Inside, the rank does this; afterwards what it did before."""
        before = self.current
        self.enter(activity)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, activity: str) -> None:
        """From now on the rank does this."""
        self.current, self.since = activity, time.time()
        self.mark_progress()

    def mark_progress(self) -> None:
        """Something got done: the run does not hang."""
        self.progress_count += 1

    def step_done(self, step: int) -> None:
        """The optimizer has taken step number `step`."""
        self.step, self.took_steps = step, True
        self._marks.append((time.monotonic(), step))
        self.enter(TRAINING)

    def publish(self, **figures: Any) -> None:
        """Publish new figures of the run in status.json; what is not named stays."""
        self.figures = self.figures | figures
        self.changed.set()

    def seconds_left(self, total_steps: int) -> float | None:
        """Seconds to the end of the run, at the pace of the last 200 steps with everything between them; None before
        a second step.
        """
        if len(self._marks) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step <= first_step:  # back to a checkpoint
            return None
        return (last_time - first_time) / (last_step - first_step) * max(0, total_steps - last_step)
