"""JSON lines that every rank writes about its own steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swinv2_train.storage.atomic import replace_text


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
        for record in (self.keys, self.bad_samples):
            if record is not None:
                record.close()


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.jsonl"


def _trim(path: Path, last_step: int) -> None:
    kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= last_step]
    replace_text(path, "".join(kept))


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file that end in a newline: a killed process may have torn the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
