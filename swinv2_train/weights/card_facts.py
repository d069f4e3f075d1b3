"""What a run directory says of the weights of one of its checkpoints: how long it was trained, and what it scored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from swinv2_train.checkpoint import read_state
from swinv2_train.checkpoint.finding import step_of
from swinv2_train.config import ConfigError
from swinv2_train.report.run_record import RunRecord, read_run_record
from swinv2_train.storage.json_files import anything, mapping, read_json

EVALUATION = "evaluation.json"
_EVALUATION_BYTES = 2**27
"""The most that it may hold: of 10,000 classes every pair that was mistaken."""


class Scores(NamedTuple):
    """Of one set of images."""

    split: str
    """evaluation, or the name of a split."""
    images: str | None
    """Where they are, without secrets; None where nothing says it."""
    num_images: int | None
    values: Mapping[str, float]
    """By the names of metrics, without val/."""


@dataclass(frozen=True)
class RunFacts:
    """Of a run, at the checkpoint that is exported."""

    record: RunRecord
    step: int
    images_seen: int
    averaged: bool
    scores: tuple[Scores, ...]
    """Of these weights alone."""


def read_facts(run_dir: Path, checkpoint: Path, averaged: bool) -> RunFacts | None:
    """The facts of a checkpoint; None for one that belongs to no run that can be read."""
    try:
        record, state = read_run_record(run_dir), read_state(checkpoint)
    except ConfigError:
        return None
    scores = _evaluated(run_dir, checkpoint, averaged) or _logged(record, step_of(checkpoint), averaged)
    return RunFacts(record, state["step"], state["images_seen"], averaged, scores)


def _evaluated(run_dir: Path, checkpoint: Path, averaged: bool) -> tuple[Scores, ...]:
    """What the evaluate command has written into the run, if that was of these weights."""
    for folder in (run_dir / "evaluation", run_dir):
        try:
            found: dict[str, Any] = read_json(folder / EVALUATION, _EVALUATION_BYTES, mapping(anything()))
        except (OSError, ConfigError):
            continue
        of_these = Path(str(found.get("checkpoint"))).name == checkpoint.name and found.get("ema") is averaged
        if not of_these:
            continue
        data, splits = found.get("data"), found.get("splits")
        images = data.get("eval_shards") if isinstance(data, dict) else None
        scores = [_scores("evaluation", images, found)]
        for name, each in splits.items() if isinstance(splits, dict) else ():
            if isinstance(each, dict):
                scores.append(_scores(str(name), each.get("shards"), each))
        return tuple(each for each in scores if each.values)
    return ()


def _scores(split: str, images: Any, found: Mapping[str, Any]) -> Scores:
    count = found.get("images")
    return Scores(
        split,
        images if isinstance(images, str) else None,
        count if isinstance(count, int) else None,
        _values(found, "val/"),
    )


def _logged(record: RunRecord, step: int, averaged: bool) -> tuple[Scores, ...]:
    """What the run itself measured at this step."""
    line = next((line for line in record.metrics if line["step"] == step), {})
    values = _values(line, "val_ema/" if averaged else "val/")
    images = record.value("data", "eval_shards")
    return (Scores("evaluation", images if isinstance(images, str) else None, None, values),) if values else ()


def _values(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): float(value)
        for name, value in line.items()
        if name.startswith(prefix) and isinstance(value, int | float) and math.isfinite(value)
    }
