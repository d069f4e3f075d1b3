"""runtime: the processes, their threads, time limits and traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from swinv2_train.config.rules import at_least, first_last, positive

MOST_TRACED = 20
"""Steps of the longest trace."""


@dataclass
class RuntimeConfig:
    num_threads: Annotated[int | None, at_least(1)]
    """CPU threads per rank; null = cores / ranks on this host."""
    stop_after_sec: Annotated[float | None, positive()]
    """Seconds after which the run saves, ends with exit code 3 and can be resumed; null = no limit."""
    process_group_timeout_sec: Annotated[int, at_least(1)]
    """A collective that waits longer than this ends the run."""
    hang_timeout_sec: Annotated[float | None, at_least(1)]
    """A micro-batch, optimizer step or wait for data longer than this ends the run, with all stacks; null = never."""
    gc_every_steps: Annotated[int | None, at_least(1)]
    """Steps between Python's garbage collections, on all ranks at the same step; null = left to Python."""
    deterministic: bool
    """Refuse GPU operations that may sum in another order each time (docs/resume.md); slower where others stand in."""
    profile: bool
    """Write a trace of a few steps to RUN_DIR/profile/ (docs/profiling.md)."""
    profile_steps: Annotated[list[int], first_last(MOST_TRACED, "a trace of more is too large to open")]
    """[first, last] step to trace, counted from this start; the very first steps allocate and compile."""
    profile_all_ranks: bool
    """Trace every rank; otherwise rank 0 alone."""
