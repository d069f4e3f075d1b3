"""What an evaluation found of objects, for a run's page: precision over recall, every class, and what is confused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.report.charts import COLOURS, Series, chart, value_text
from swinv2_train.report.class_table import FOLDER, MOST_BYTES, MOST_CLASSES, NUMBERS
from swinv2_train.report.html import esc
from swinv2_train.report.run_pictures import figure
from swinv2_train.storage.json_files import listing, number, optional, read_json, record, row, text, whole

KINDS = {"box": "boxes", "mask": "masks"}
_CURVE = listing(number(), 1001)
_CLASS = whole(-1, MOST_CLASSES)
_SHAPE = record(
    {"class_objects": listing(whole(), MOST_CLASSES)},
    {
        "classes": optional(listing(text(1000), MOST_CLASSES)),
        "confusions": listing(row(_CLASS, _CLASS, whole()), 1000),
        **{f"class_{kind}_{score}": NUMBERS for kind in KINDS for score in ("ap", "ap50")},
        **{f"{kind}_precision_at_recall": _CURVE for kind in KINDS},
        **{f"class_{kind}_precision_at_recall": listing(optional(_CURVE), MOST_CLASSES) for kind in KINDS},
    },
)
_NOTHING = ("nothing there", "not found")
"""Of a confusion: no right object, no detection."""


def objects_of(run_dir: Path) -> str:
    """As the evaluate command found them with out=RUN_DIR/evaluation; "" where it was not, or of another task."""
    try:
        found: dict[str, Any] = read_json(run_dir / FOLDER / "evaluation.json", MOST_BYTES, _SHAPE)
    except (FileNotFoundError, NotADirectoryError, ConfigError):  # of another task, or damaged: the page does without
        return ""
    count = len(found["class_objects"])
    columns = {
        f"{KINDS[kind]}, {score.upper()} %": found[f"class_{kind}_{score}"]
        for kind in KINDS for score in ("ap", "ap50") if f"class_{kind}_{score}" in found
    }  # fmt: skip
    if any(len(column) != count for column in columns.values()):
        return ""
    names = [*(found.get("classes") or [])[:count]]
    names += [str(place) for place in range(len(names), count)]
    picture = run_dir / FOLDER / "picture.png"
    return (
        _curves(found, names)
        + _class_table(names, found["class_objects"], columns)
        + _confusions(found.get("confusions", []), names)
        + (figure(picture, "right objects beside those that are found") if picture.is_file() else "")
    )


def _curves(found: dict[str, Any], names: Sequence[str]) -> str:
    """Precision over recall: the mean over classes, and each of the classes with the most objects."""
    means = [_series(words, found.get(f"{kind}_precision_at_recall")) for kind, words in KINDS.items()]
    charts = [_chart("Precision over recall, mean of the classes", [each for each in means if each is not None])]
    objects = found["class_objects"]
    largest = sorted(sorted(range(len(names)), key=lambda place: -objects[place])[:COLOURS])
    for kind, words in KINDS.items() if len(names) > 1 else ():
        curves = found.get(f"class_{kind}_precision_at_recall", [])
        each = [_series(names[place], curves[place]) for place in largest if place < len(curves)]
        charts.append(_chart(f"Precision over recall, {words}", [one for one in each if one is not None]))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _series(label: str, precision: Sequence[float] | None) -> Series | None:
    if not precision or len(precision) < 2:
        return None
    last = len(precision) - 1
    mean = sum(precision) / len(precision)
    return Series(
        f"{label} ({value_text(round(mean, 1))})", [100 * place / last for place in range(last + 1)], precision
    )


def _chart(title: str, series: Sequence[Series]) -> str:
    unit = "%, overlap 0.50"
    return chart(title, series, unit=unit, from_zero=True, x_range=(0, 100), axis="recall, %")


def _class_table(names: Sequence[str], objects: Sequence[int], columns: dict[str, list[float | None]]) -> str:
    """A row for each class; those of the lowest average precision first, those without objects last."""
    first = next(iter(columns.values()), [None] * len(names))
    order = sorted(range(len(names)), key=lambda place: (first[place] is None, first[place] or 0.0))
    rows = [
        (
            names[place],
            f"{objects[place]:,}",
            *("–" if each[place] is None else f"{each[place]:.2f}" for each in columns.values()),
        )
        for place in order
    ]
    return _table(("class", "objects", *columns), rows)


def _confusions(pairs: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """What is taken for what, the commonest first."""

    def name(place: int, nothing: str) -> str:
        return nothing if place < 0 else names[place] if place < len(names) else str(place)

    rows = [(name(right, _NOTHING[0]), name(said, _NOTHING[1]), f"{count:,}") for right, said, count in pairs]
    about = "<p>The commonest confusions, of detections with a score of 0.3 or more at an overlap of 0.50:</p>"
    return about + _table(("right class", "found as", "objects"), rows) if rows else ""


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "<tr><th>" + "</th><th>".join(map(esc, titles)) + "</th></tr>"
    body = "".join("<tr><td>" + "</td><td>".join(map(esc, each)) + "</td></tr>" for each in rows)
    return f'<div class="wide"><table class="numbers">{head}{body}</table></div>'
