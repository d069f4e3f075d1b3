"""The table of classes on a run's page, from what the evaluation writes of pixels, of one class and of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swinv2_train.report.class_table import classes_of
from swinv2_train.report.page import write_report
from tests.unit.report.test_page import Page

NAMES = ["ape", "<b>cat", "dog"]
KINDS = {
    "pixels": {"class_iou": [50.0, 20.25, None], "class_accuracy": [60.0, 30.0, None], "class_pixels": [4000, 20, 0]},
    "several": {"class_ap": [90.0, 20.25, None], "class_f1": [80.0, 30.0, 0.0], "class_images": [40, 2, 0]},
    "one": {"class_accuracy": [90.0, 20.25, None], "class_images": [40, 2, 0], "confusion": [[0, 1, 2]]},
}


def evaluated(run_dir: Path, content: dict[str, Any]) -> Path:
    (run_dir / "evaluation").mkdir(parents=True)
    (run_dir / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    return run_dir


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("pixels", "class IoU, % accuracy, % pixels <b>cat 20.25 30.00 20 ape 50.00 60.00 4,000 dog – – 0"),
        ("several", "class average precision, % F1, % images <b>cat 20.25 30.00 2 ape 90.00 80.00 40 dog – 0.00 0"),
        ("one", "class accuracy, % images <b>cat 20.25 2 ape 90.00 40 dog – 0"),
    ],
)
def test_every_class_has_a_row_the_worst_first(kind: str, lines: str, tmp_path: Path) -> None:
    page = Page(write_report(evaluated(tmp_path, {"classes": NAMES, **KINDS[kind]}), curves=False).read_text())
    assert lines in page.text


@pytest.mark.parametrize(
    "change", [{"class_ap": [1.0]}, {"class_f1": "all"}, {"class_images": None}, {"classes": ["ape"]}]
)
def test_a_damaged_table_is_left_out(change: dict[str, Any], tmp_path: Path) -> None:
    assert "0</td><td>90.00" in classes_of(evaluated(tmp_path / "whole", {"classes": None, **KINDS["several"]}))
    assert classes_of(evaluated(tmp_path / "damaged", KINDS["several"] | change)) == ""


def test_without_an_evaluation_there_is_no_table(tmp_path: Path) -> None:
    assert classes_of(tmp_path) == ""
    assert classes_of(evaluated(tmp_path / "simmim", {"val/loss": 0.3})) == ""
