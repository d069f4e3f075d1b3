"""What an evaluation found of every class, for a run's page: the table and the picture of their confusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from swinv2_train.config import ConfigError
from swinv2_train.report.html import esc
from swinv2_train.report.run_pictures import figure
from swinv2_train.storage.json_files import listing, number, optional, read_json, record, text, whole

FOLDER = "evaluation"
"""Below a run's directory: where the evaluate command puts what the page shows (out=RUN_DIR/evaluation)."""
MOST_BYTES = 2**26
MOST_CLASSES = 30_000

NUMBERS = listing(optional(number()), MOST_CLASSES)
_SHAPE = record(
    {"class_iou": NUMBERS, "class_accuracy": NUMBERS, "class_pixels": listing(whole(), MOST_CLASSES)},
    {"classes": optional(listing(text(1000), MOST_CLASSES))},
)


class ClassRow(NamedTuple):
    """A class of pixels."""

    name: str
    iou: float | None
    """Percent; None where it is neither there nor predicted."""
    accuracy: float | None
    pixels: int


def classes_of(run_dir: Path) -> str:
    """Of pixels, as the evaluate command found them with out=RUN_DIR/evaluation; "" where it was not."""
    rows = _rows(run_dir)
    if not rows:
        return ""
    cells = [
        (row.name, *("–" if share is None else f"{share:.2f}" for share in (row.iou, row.accuracy)), f"{row.pixels:,}")
        for row in rows
    ]
    body = "".join("<tr><td>" + "</td><td>".join(map(esc, each)) + "</td></tr>" for each in cells)
    head = "<tr><th>class</th><th>IoU, %</th><th>accuracy, %</th><th>pixels</th></tr>"
    table = f'<div class="wide"><table class="numbers">{head}{body}</table></div>'
    return table + figure(run_dir / FOLDER / "confusion.png", "which class is taken for which")


def _rows(run_dir: Path) -> list[ClassRow]:
    """Those of the lowest IoU first; none where there is no such table."""
    try:
        found: dict[str, Any] = read_json(run_dir / FOLDER / "evaluation.json", MOST_BYTES, _SHAPE)
    except (FileNotFoundError, NotADirectoryError, ConfigError):  # of a classifier, or damaged: the page does without
        return []
    names = found.get("classes") or [str(number) for number in range(len(found["class_iou"]))]
    columns = (names, found["class_iou"], found["class_accuracy"], found["class_pixels"])
    if len({len(column) for column in columns}) > 1:
        return []
    rows = [ClassRow(*row) for row in zip(*columns, strict=True)]
    return sorted(rows, key=lambda row: (row.iou is None, row.iou or 0.0))
