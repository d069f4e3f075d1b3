"""What is told of a run while it works: metrics, progress, status, records of samples, stragglers, traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from swinv2_train.config import Config
from swinv2_train.distributed import World
from swinv2_train.engine.compile import seconds_compiling
from swinv2_train.monitoring.activity import DATA_WAIT, FIRST_STEP, RankActivity
from swinv2_train.monitoring.console import counted, ticking
from swinv2_train.monitoring.metrics import (
    Means,
    Throughput,
    device_peak_flops,
    each_rank,
    mfu,
    peak_memory_gib,
)
from swinv2_train.monitoring.profiling import DATA, StepProfiler, label
from swinv2_train.monitoring.run_log import UNFINISHED, RunLog, scores_unfinished
from swinv2_train.monitoring.step_records import Records, StepRecord
from swinv2_train.monitoring.stragglers import ComputeTimer, StragglerStreak, slowest
from swinv2_train.training.garbage_collection import ManualGC
from swinv2_train.training.position import Position


class Outcome(NamedTuple):
    """What came of a step that was taken."""

    losses: Means
    grad_norm: float
    """Before clipping."""
    lr: float


class Monitor:
    """Told by the training loop what happens, in order; says it to those who watch.  Decides nothing about training.

    In it are the clocks of a run (speed, each rank's own time), its trace and its records, and when Python's garbage
    collector may run, since that is a pause of all ranks too.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        position: Position,
        total_steps: int,
        multiply_adds: int,
        log: RunLog,
        activity: RankActivity,
    ) -> None:
        """multiply_adds: of one image's forward pass."""
        self.log, self.activity = log, activity
        self.manual_gc = ManualGC(config.runtime.gc_every_steps)
        self._config, self._world, self._position = config, world, position
        self._total_steps, self._multiply_adds = total_steps, multiply_adds
        self._speed = Throughput(config.train.global_batch_size)
        self._compute_timer = ComputeTimer(world.device)
        self._streak = StragglerStreak()
        self._step_began = 0.0
        self._is_first_step = True
        self._profiler = (
            StepProfiler(config.runtime, Path(config.run_dir), world.rank) if config.runtime.profile else None
        )
        self._records = Records(None, None)

    # What happens around the steps

    def start(self, saved_step: int | None) -> None:
        """The first step of this start comes next; it may compile.  saved_step: of the newest checkpoint."""
        self.open_records()
        self.activity.step = self._position.step
        self.activity.publish(
            total_steps=self._total_steps, images_seen=self._position.images_seen, checkpoint_step=saved_step
        )
        self.activity.enter(FIRST_STEP)

    def open_records(self) -> None:
        """Records that data.record_keys and data.on_bad_sample ask for, without steps that are run again."""
        self._records.close()
        data, run_dir = self._config.data, Path(self._config.run_dir)
        where = (self._world.rank, self._world.world_size, self._position.step)
        self._records = Records(
            StepRecord(run_dir / "sample_keys", *where) if data.record_keys else None,
            StepRecord(run_dir / "bad_samples", *where) if data.on_bad_sample == "replace" else None,
        )

    def micro_batch_done(self, number: int, count: int) -> None:
        """Micro-batch number 1 .. count of the next step is computed, or is about to be on the device."""
        self.activity.mark_progress()
        if number < count:
            seconds = time.monotonic() - self._step_began
            self.log.progress_within(self._position.step, self._total_steps, number, count, seconds)

    def step_begins(self) -> None:
        """Start or stop the profiler; that is no part of any step's time."""
        self._step_began = time.monotonic()
        if self._profiler is not None:
            with self._speed.paused():
                self._say_trace(self._profiler.next_step(self._position.step + 1))

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The time inside is spent waiting for the loader."""
        with (
            self.activity.doing(DATA_WAIT),
            self._speed.waiting_for_data(),
            self._compute_timer.excluded(),
            label(DATA),
        ):
            yield

    def own_time(self) -> AbstractContextManager[None]:
        """Inside is the work of the next step; each rank's own part of it is measured where the step is logged."""
        return self._compute_timer.measured(is_due(self._position.step + 1, self._config.train.log_every_steps))

    def between_steps(self) -> AbstractContextManager[None]:
        """The time inside is no part of any step."""
        return self._speed.paused()

    def close(self) -> None:
        """The run has come to its end, or stops."""
        if self._profiler is not None:
            self._say_trace(self._profiler.close())
        self._records.close()

    def _say_trace(self, written: Path | None) -> None:
        if written is not None:
            self.log.say(f"trace: {written}")

    # What comes out of a step

    def step_done(self, micro_batches: list[dict[str, Any]], outcome: Outcome | None, skipped: int) -> None:
        """The position has advanced.  Collective where it logs: every train.log_every_steps, first and last step.

        outcome: None for a step that was skipped; skipped: how many were, so far.
        """
        self._speed.step_done()
        self.activity.step_done(self._position.step)
        if self._is_first_step and (taken := seconds_compiling()) > 0:
            self.log.say(f"compiling the blocks took {taken:.1f} s; other sizes and the first evaluation compile anew")
        self._is_first_step = False
        self._records.write(self._position.step, micro_batches)
        step = self._position.step
        if outcome is None:
            self.log_metrics({"train/skipped_steps": skipped})
        elif is_due(step, self._config.train.log_every_steps) or step in (1, self._total_steps):
            values = outcome.losses.read() | {"train/lr": outcome.lr, "train/grad_norm": outcome.grad_norm}
            self._log_step(values, self._speed.read(), self._compute_timer.read())
        else:
            self.log.progress(step, self._total_steps)

    def log_metrics(self, values: dict[str, Any]) -> None:
        """A line of metrics of this step."""
        self.log.metrics(self._position.step, self._position.images_seen, values)

    def log_scores(self, scores: dict[str, float]) -> None:
        """A line of metrics and one on the console."""
        self.log_metrics(scores)
        said = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.log.say(f"step {self._position.step}: {said}")

    def marking_progress(self, batches: Iterable[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
        """The batches; each is a sign that the run does not hang.  Where they take long, they are counted."""
        for batch in counted(batches, count, "evaluating: batch", self.log.say):
            self.activity.mark_progress()
            yield batch

    def marking_probes(self) -> Callable[[], None]:
        """To be called after each batch of a probe, as a sign that the run does not hang."""
        tick = ticking("probing: batch", self.log.say)

        def mark() -> None:
            self.activity.mark_progress()
            tick()

        return mark

    def scores_are_due(self, due: bool) -> None:
        """Write down that this step's scores were cut short by a stop, or that they are made up for."""
        self.log_metrics({UNFINISHED: int(due)})
        if due:
            self.log.say(f"step {self._position.step}: its evaluation is cut short; the next start makes up for it")

    def scores_were_cut_short(self) -> bool:
        """Whether a stop has left this step without its scores.  On rank 0."""
        return scores_unfinished(Path(self._config.run_dir), self._position.step)

    def _log_step(self, values: dict[str, float], speed: dict[str, float], own_sec: float) -> None:
        """This step's loss over all ranks, the slowest rank's times and the fullest rank's memory.

        own_sec: what this rank took for the step without waiting for data or for other ranks; 0 = not measured.
        """
        device = self._world.device
        mine = {"mem/peak_gib": peak_memory_gib(device), "data/wait_sec": speed.get("data/wait_sec", 0.0)}
        ranks = each_rank(mine | {"perf/own_step_sec": own_sec}, self._world)
        self._position.count_bad_images()
        values |= speed | {name: max(ranks[name]) for name in mine}
        values["data/skipped_images"] = self._position.bad_images
        values |= self._position.source_counts()
        if self._world.world_size > 1 and speed and own_sec:
            values |= self._name_slowest(ranks["perf/own_step_sec"], ranks["data/wait_sec"])
        images_per_sec = speed.get("perf/images_per_sec")
        peak = device_peak_flops(device, self._config.engine.precision)
        utilisation = mfu(3 * 2 * self._multiply_adds, images_per_sec, peak, self._world.world_size)
        self.log_metrics(values | {"perf/mfu": utilisation})
        self.log.progress(self._position.step, self._total_steps, values["train/loss"], images_per_sec)
        self.activity.publish(
            images_seen=self._position.images_seen,
            loss=values["train/loss"],
            images_per_sec=images_per_sec,
            seconds_left=self.activity.seconds_left(self._total_steps),
        )

    def _name_slowest(self, own_sec: list[float], data_wait_sec: list[float]) -> dict[str, float]:
        """The rank that the others wait for: in metrics and status, and on the console if it stays the same."""
        found = slowest(own_sec, data_wait_sec)
        self.activity.publish(slowest_rank=found._asdict())
        if self._streak.add(found):
            self.log.say(f"step {self._position.step}: {found}")
        return {"perf/own_step_sec": found.own_sec, "perf/slowest_rank": found.rank}


def is_due(step: int, every: int | None) -> bool:
    """True at every multiple of a period; never without one."""
    return every is not None and step % every == 0
