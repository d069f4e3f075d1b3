"""When a run's checkpoints are written, waited for and gone back to; what a checkpoint is stands in checkpoint/."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from swinv2_train.checkpoint import Save, load_checkpoint
from swinv2_train.config import Config
from swinv2_train.distributed import World, any_rank
from swinv2_train.engine import Engine
from swinv2_train.monitoring.activity import RankActivity
from swinv2_train.monitoring.profiling import CHECKPOINT, label
from swinv2_train.monitoring.run_log import RunLog
from swinv2_train.training.lora import adapter_state
from swinv2_train.training.position import Position


class Saver:
    """Writes checkpoints of a position and an engine, at most one at a time.  Every method is collective."""

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        position: Position,
        log: RunLog,
        activity: RankActivity,
        saved_step: int | None,
    ) -> None:
        """saved_step: of the checkpoint that the run resumes from; None = there is none."""
        self.saved_step = saved_step
        """Step of the newest complete checkpoint."""
        self._config, self._world, self._engine, self._position = config, world, engine, position
        self._log, self._activity = log, activity
        self._under_way: Save | None = None  # written in the background
        self._warned: set[str] = set()
        self._stall_sec: float | None = None  # how long the last save held training up so far; None once logged

    def save(self, score: float | None) -> None:
        """Write a checkpoint of this step.  score: this step's value of train.keep_best, where it was measured."""
        train, state = self._config.train, self._state()
        best = (train.keep_best, score) if train.keep_best is not None and score is not None else None
        self.finish()
        started = time.perf_counter()
        run_dir, background = Path(self._config.run_dir), train.background_save
        with self._activity.doing("saving"), label(CHECKPOINT):
            self._under_way = Save(run_dir, self._engine, state, self._world, train.keep_checkpoints, best, background)
        if not background:
            self.finish()
        self._stall_sec = time.perf_counter() - started
        if not background:
            self.wait_for_copy()

    def save_if_new(self) -> None:
        """Write a checkpoint of this step unless there is one."""
        self.finish()
        if self.saved_step != self._position.step:
            self.save(None)

    def save_apart(self, folder: Path) -> None:
        """Write the state of this step to folder/checkpoints, as the only one there; the run's own stay as they are."""
        self.finish()
        state = self._state()
        with self._activity.doing("saving"), label(CHECKPOINT):
            Save(folder, self._engine, state, self._world, 1, None, background=False).finish()

    def _state(self) -> dict[str, Any]:
        return self._position.state_dict() | adapter_state(self._config.optim)

    def wait_for_copy(self) -> None:
        """Wait until the optimizer may move, and log how long the last save held training up."""
        if self._stall_sec is None:
            return
        started = time.perf_counter()
        if self._under_way is not None:
            with self._activity.doing("saving"):
                self._under_way.wait_for_copy()
        stall_sec, self._stall_sec = self._stall_sec + time.perf_counter() - started, None
        self._log.metrics(self._position.step, self._position.images_seen, {"checkpoint/stall_sec": stall_sec})

    def poll(self) -> None:
        """Finish the checkpoint that is being written if every rank has written its part."""
        if self._under_way is not None and not any_rank(self._under_way.under_way):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any; what went wrong with it is raised on every rank."""
        self.wait_for_copy()
        if self._under_way is not None:
            saving, self._under_way = self._under_way, None
            with self._activity.doing("saving"), label(CHECKPOINT):
                saving.finish()
            for warning in saving.warnings:
                if warning not in self._warned:  # it would come with every save
                    self._warned.add(warning)
                    self._log.say(f"warning: {warning}")
            self.saved_step = saving.step
            self._activity.publish(checkpoint_step=self.saved_step)

    def roll_back(self, problem: Exception) -> None:
        """Put engine and position back to the newest checkpoint; raises the problem where there is none."""
        self.finish()
        if self.saved_step is None:
            raise problem
        checkpoint = Path(self._config.run_dir) / "checkpoints" / f"step_{self.saved_step:08d}"
        self._position.go_back(load_checkpoint(checkpoint, self._engine, self._world, self._config.seed))
        self._log.resume_at(self._position.step)
        self._log.say(f"back at {checkpoint}")
