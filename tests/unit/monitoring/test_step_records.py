"""Lines per rank and step: whole, once, and none of a rank that a later start does not have."""

from __future__ import annotations

import json
from pathlib import Path

from swinv2_train.monitoring.step_records import StepRecord


def steps(folder: Path) -> dict[str, list[int]]:
    return {p.name: [json.loads(line)["step"] for line in p.read_text().splitlines()] for p in sorted(folder.iterdir())}


def test_steps_that_are_run_again_stand_there_once_whatever_the_number_of_ranks(tmp_path):
    """Four ranks reach step 6, the checkpoint is of step 4, and two ranks go on."""
    for rank in range(4):
        record = StepRecord(tmp_path, rank, 4, 0)
        for step in range(1, 7):
            record.write(step, keys=["a"])
        record.close()
    with (tmp_path / "rank_00001.jsonl").open("a") as file:
        file.write('{"step": 7, "ke')  # torn by a kill
    for rank in range(2):
        record = StepRecord(tmp_path, rank, 2, 4)
        record.write(5, keys=["b"])
        record.close()
    until_4, until_5 = [1, 2, 3, 4], [1, 2, 3, 4, 5]
    assert list(steps(tmp_path).values()) == [until_5, until_5, until_4, until_4]
