"""A trace of a few training steps that a person can open: what the host and the device did, and when.

RUN_DIR/profile/rank_00000_steps_00000004-00000006.json.gz   for ui.perfetto.dev or chrome://tracing
RUN_DIR/profile/rank_00000_steps_00000004-00000006.txt       the operations that took the most time
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from swinv2_train.config import RuntimeConfig

DATA, FORWARD, BACKWARD, OPTIMIZER = "data wait", "forward", "backward", "optimizer step"
EVALUATION, CHECKPOINT = "evaluation", "checkpoint"
"""The labelled ranges of a trace; `with label(FORWARD):` costs microseconds where nothing is traced."""

label = record_function

_ROWS = 30


class StepProfiler:
    """Traces the steps that runtime.profile_steps names; on rank 0, or on all with runtime.profile_all_ranks.

    A step's part of the trace goes on until the next step begins, so what is evaluated or saved after it is in it.
    """

    def __init__(self, config: RuntimeConfig, run_dir: Path, rank: int) -> None:
        wanted = config.profile and (rank == 0 or config.profile_all_ranks)
        self._first, self._last = config.profile_steps if wanted else (0, -1)
        self._folder, self._rank = run_dir / "profile", rank
        self._begun = 0
        self._running: profile | None = None
        self._first_step = self._last_step = 0

    def next_step(self, step: int) -> Path | None:
        """Step number `step` of the run begins.  Returns the trace that was written now, if one was."""
        self._begun += 1
        written = self.close() if self._begun > self._last else None
        if self._first <= self._begun <= self._last:
            self._last_step = step
            if self._running is None:
                self._first_step = step
                on_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                self._running = profile(activities=[ProfilerActivity.CPU, *on_cuda])
                self._running.start()
        return written

    def close(self) -> Path | None:
        """Write what is being traced, if anything, and return the trace's path."""
        if self._running is None:
            return None
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"rank_{self._rank:05d}_steps_{self._first_step:08d}-{self._last_step:08d}"
        path = self._folder / f"{name}.json.gz"
        running.export_chrome_trace(str(path))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
        (self._folder / f"{name}.txt").write_text(table + "\n")
        return path
