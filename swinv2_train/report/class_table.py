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


class _Kind(NamedTuple):
    """A table of classes: what is counted of them, and percentages, by the names of evaluation.json."""

    counts: str
    counted: str
    columns: dict[str, str]
    """The first one is what classes are sorted by."""


_KINDS = (
    _Kind("class_pixels", "pixels", {"class_iou": "IoU, %", "class_accuracy": "accuracy, %"}),
    _Kind("class_images", "images", {"class_ap": "average precision, %", "class_f1": "F1, %"}),
    _Kind("class_images", "images", {"class_accuracy": "accuracy, %"}),
)
_SHAPE = record(
    {},
    {
        "classes": optional(listing(text(1000), MOST_CLASSES)),
        **{kind.counts: listing(whole(), MOST_CLASSES) for kind in _KINDS},
        **{name: NUMBERS for kind in _KINDS for name in kind.columns},
    },
)


def classes_of(run_dir: Path) -> str:
    """As the evaluate command found them with out=RUN_DIR/evaluation, the worst first; "" where it was not.

    Of pixels, of a classifier, and of one by which several classes may apply.
    """
    try:
        found: dict[str, Any] = read_json(run_dir / FOLDER / "evaluation.json", MOST_BYTES, _SHAPE)
    except (FileNotFoundError, NotADirectoryError, ConfigError):  # damaged: the page does without
        return ""
    kind = next((each for each in _KINDS if {each.counts, *each.columns} <= found.keys()), None)
    if kind is None:  # of another task
        return ""
    names = found.get("classes") or [str(number) for number in range(len(found[kind.counts]))]
    columns = [found[name] for name in kind.columns]
    if len({len(column) for column in (names, found[kind.counts], *columns)}) > 1:
        return ""
    order = sorted(range(len(names)), key=lambda place: (columns[0][place] is None, columns[0][place] or 0.0))
    cells = [
        (
            names[place],
            *("–" if column[place] is None else f"{column[place]:.2f}" for column in columns),
            f"{found[kind.counts][place]:,}",
        )
        for place in order
    ]
    titles = ("class", *kind.columns.values(), kind.counted)
    head = "<tr><th>" + "</th><th>".join(map(esc, titles)) + "</th></tr>"
    body = "".join("<tr><td>" + "</td><td>".join(map(esc, each)) + "</td></tr>" for each in cells)
    table = f'<div class="wide"><table class="numbers">{head}{body}</table></div>'
    picture = run_dir / FOLDER / "confusion.png"
    return table + (figure(picture, "which class is taken for which") if picture.is_file() else "")
