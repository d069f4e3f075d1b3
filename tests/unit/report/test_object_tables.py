"""What the page of a detector's run shows of its objects, from what the evaluation writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swinv2_train.report.object_tables import objects_of
from swinv2_train.report.page import write_report
from swinv2_train.tasks.detection_scores import detection_records
from swinv2_train.tasks.detection_tables import detection_tables
from swinv2_train.tasks.detections import Found, Truth
from tests.unit.report.test_page import Page

NAMES = ["bus", "<b>car", "tram", "none of these"]
SIZE = (100, 100)


def tables(images: int = 12) -> dict[str, Any]:
    """Of two objects an image: a bus that is always found, a car that is found as a tram in every third image."""
    box = np.array([[0, 0, 40, 40], [50, 50, 90, 90]], np.float32)
    truth = Truth(
        boxes=box, classes=np.array([0, 1]), crowd=np.zeros(2, bool), area=np.full(2, 1600.0), masks=[None, None]
    )
    found = [
        Found(box, np.array([0.9, 0.8], np.float32), np.array([0, 1 if number % 3 else 2]), None)
        for number in range(images)
    ]
    given = detection_records(range(images), [SIZE] * images, [truth] * images, found, len(NAMES), False)
    return detection_tables(given.values)


def evaluated(run_dir: Path, content: dict[str, Any]) -> Path:
    (run_dir / "evaluation").mkdir(parents=True)
    (run_dir / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    return run_dir


def test_curves_classes_and_confusions_of_an_evaluation_are_on_the_page(tmp_path: Path) -> None:
    page = Page(write_report(evaluated(tmp_path, {"classes": NAMES, **tables()}), curves=False).read_text())
    mean, each = page.charts
    assert mean["axis"] == each["axis"] == "recall, %" and mean["x"] == [0, 100]
    (line,) = mean["lines"]
    assert line["x"][0] == 0 and line["x"][-1] == 100 and len(line["x"]) == 101
    bus, car = each["lines"]
    assert [bus["label"], car["label"]] == ["bus (100)", "<b>car (66.3)"]
    assert set(bus["y"]) == {100.0}
    assert [y for x, y in zip(car["x"], car["y"], strict=True) if x > 67] == [0.0] * 33  # 8 of 12 cars are found
    assert "<b>car 12 66.34 66.34" in page.text and "bus 12 100.00 100.00" in page.text
    assert page.text.index("<b>car 12") < page.text.index("bus 12")  # the worst first
    assert "right class found as objects <b>car tram 4" in page.text


@pytest.mark.parametrize(
    "change",
    [{"class_objects": None}, {"class_box_ap": [1.0]}, {"confusions": [[0, "x", 1]]}, {"box_precision_at_recall": 3}],
)
def test_a_damaged_evaluation_is_left_out(change: dict[str, Any], tmp_path: Path) -> None:
    assert objects_of(evaluated(tmp_path / "whole", tables()))
    assert objects_of(evaluated(tmp_path / "damaged", tables() | change)) == ""


def test_nothing_found_and_nothing_to_find_have_a_page(tmp_path: Path) -> None:
    assert objects_of(tmp_path) == ""
    assert objects_of(evaluated(tmp_path / "none", {"classes": None, **detection_tables([])}))
