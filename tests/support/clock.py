"""A clock for code that measures how long things take."""

from __future__ import annotations


class Clock:
    """Time passes where somebody sleeps, and nowhere else: a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
