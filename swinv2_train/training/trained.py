"""What a program is told of a run that it has trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from swinv2_train.checkpoint import read_state
from swinv2_train.checkpoint.finding import best_of, complete_checkpoints, step_of
from swinv2_train.config import Config
from swinv2_train.monitoring.run_log import UNFINISHED, read_metrics

_MEASURED = ("val", "probe")
"""How the names of scores begin, val_ema/top1 too."""


@dataclass(frozen=True)
class TrainedRun:
    """Where a run stands; swinv2_train.load(run_dir) has its model."""

    run_dir: Path
    step: int
    """Completed optimizer steps, of the newest checkpoint; 0 without one."""
    complete: bool
    """False where the run was stopped before its end: the same call goes on."""
    scores: dict[str, float]
    """The newest value of each score that the run measured, by the names of metrics.jsonl."""
    best_score: float | None
    """Of train.keep_best; None where nothing was measured or it is null."""
    best_checkpoint: Path | None
    """The checkpoint with that score, which load takes too."""


def trained_run(config: Config, complete: bool) -> TrainedRun:
    """Read it from config.run_dir.  complete: as the run has just ended."""
    run_dir = Path(config.run_dir)
    checkpoints, _ = complete_checkpoints(run_dir)
    scores: dict[str, float] = {}
    for line in read_metrics(run_dir):
        measured = {name: value for name, value in line.items() if name.startswith(_MEASURED) and name != UNFINISHED}
        scores |= {name: value for name, value in measured.items() if value is not None}
    best = best_of(checkpoints) if config.train.keep_best is not None else None
    return TrainedRun(
        run_dir=run_dir,
        step=step_of(checkpoints[-1]) if checkpoints else 0,
        complete=complete,
        scores=scores,
        best_score=None if best is None else read_state(best)["best"]["value"],
        best_checkpoint=best,
    )
