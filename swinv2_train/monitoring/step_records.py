"""JSON lines that every rank writes about its own steps."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import open_regular
from swinv2_train.storage.atomic import replacing
from swinv2_train.storage.json_files import parse_json, record, whole

_MOST_LINE_BYTES = 2**26
"""The keys of a step: a million images of 60 bytes."""
_LINE = record({"step": whole()})


class StepRecord:
    """One JSONL file per rank, FOLDER/rank_00000.jsonl; every line has "step", and each is flushed.

    Opening it drops the lines of steps after last_step, also those of ranks that an earlier start had and this one has
    not: they are run again, so that a step never stands there twice.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, last_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _name(rank)
        _trim(path, last_step)
        if rank == 0:
            for gone in folder.glob("rank_*.jsonl"):
                if gone.name >= _name(world_size):
                    _trim(gone, last_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Records:
    """What every rank writes down about its samples: RUN_DIR/sample_keys/ and RUN_DIR/bad_samples/."""

    def __init__(self, keys: StepRecord | None, bad_samples: StepRecord | None) -> None:
        self.keys = keys
        self.bad_samples = bad_samples

    def write(self, step: int, micro_batches: list[dict[str, Any]]) -> None:
        """The keys of a step, and the damaged samples among them."""
        if self.keys is not None:
            self.keys.write(step, keys=[key for batch in micro_batches for key in batch["keys"]])
        if self.bad_samples is not None:
            for batch in micro_batches:
                for problem in batch.get("problems", ()):
                    self.bad_samples.write(step, **problem)

    def close(self) -> None:
        """Nothing more is written."""
        for written in (self.keys, self.bad_samples):
            if written is not None:
                written.close()


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.jsonl"


def _trim(path: Path, last_step: int) -> None:
    """Drop the lines of later steps, and what is no line of ours: a killed process may have torn the last one."""
    if not os.path.lexists(path):
        return
    with replacing(path) as kept, open(open_regular(path), "rb") as file:
        while line := file.readline(_MOST_LINE_BYTES):
            if line.endswith(b"\n") and _step(line) <= last_step:
                kept.write(line)


def _step(line: bytes) -> float:
    try:
        step = parse_json(line, "", _LINE)["step"]
    except ConfigError:
        return math.inf
    return int(step)
