"""Several runs on one page: what differs between their configurations, how they ended, and their curves together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.report.charts import COLOURS, Series, chart, value_text
from swinv2_train.report.html import esc, page_html
from swinv2_train.report.page import TILES
from swinv2_train.report.run_charts import CHARTS
from swinv2_train.report.run_record import RunRecord, read_run_record, state_of
from swinv2_train.storage.atomic import replace_text

_RANKED = (
    ("val/top1", max),
    ("probe/linear_top1", max),
    ("probe/knn_top1", max),
    ("val/loss", min),
    ("train/loss", min),
)
"""What runs are ranked by: the first of these that any of them has, and which is its best value."""
_OWN = ("run_dir", "data.source", "log.wandb_name")
"""Keys in which every run of a sweep differs, which says nothing."""


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page of several runs to `out` and return it.

    Raises ConfigError for a directory that holds no run, before anything is written.
    """
    for run_dir in run_dirs:
        if not any((run_dir / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            raise ConfigError(
                f"{run_dir} holds no run (neither config.yaml nor metrics.jsonl); name directories of runs"
            )
    runs = [read_run_record(run_dir) for run_dir in run_dirs]
    names = short_names(run_dirs)
    score = next((name for name, _ in _RANKED if any(run.latest(name) for run in runs)), None)
    order = sorted(range(len(runs)), key=lambda i: _rank(runs[i], score))
    runs, names = [runs[i] for i in order], [names[i] for i in order]
    ranked = f"ranked by the best {score}" if score else "no run has a score yet"
    body = (
        f"<header><h1>{len(runs)} runs compared</h1>"
        f'<p class="soft">{esc(ranked)}</p></header>'
        f"<section>{_table(runs, names, score)}</section>"
        f"<section><h2>Curves{_first(len(runs))}</h2>{_charts(runs[:COLOURS], names[:COLOURS])}</section>"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page_html(f"{len(runs)} runs compared", body))
    return out


def short_names(run_dirs: Sequence[Path]) -> list[str]:
    """The last parts of the directories' paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in run_dirs]


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys in which configurations differ, with each one's value; None where one has no such key."""
    flat = [dict(_leaves(config, "")) for config in configs]
    keys = dict.fromkeys(key for each in flat for key in each)
    found = {key: [each.get(key) for each in flat] for key in keys if key not in _OWN}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _leaves(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        below = isinstance(value, Mapping) and value
        found += _leaves(value, f"{prefix}{name}.") if below else [(f"{prefix}{name}", value)]
    return found


def _rank(run: RunRecord, score: str | None) -> float:
    values = [] if score is None else [value for value in run.curve(score)[1] if math.isfinite(value)]
    if not values:
        return math.inf
    best = dict(_RANKED)[str(score)]
    return -best(values) if best is max else best(values)


def _table(runs: Sequence[RunRecord], names: Sequence[str], score: str | None) -> str:
    scores = [
        (name, label, unit, decimals) for name, label, unit, decimals in TILES if any(r.latest(name) for r in runs)
    ]
    differences = differing([run.config for run in runs])
    head = ["run", "state", *differences]
    head += [f"best {score}"] if score is not None else []
    head += [f"{label}{f', {unit}' if unit else ''}" for _, label, unit, _ in scores]
    rows = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        best = _rank(run, score)
        cells = [name, state_of(run, None)[1], *(_value(values[number]) for values in differences.values())]
        cells += [value_text(abs(best) if math.isfinite(best) else None)] if score is not None else []
        for metric, _, _, decimals in scores:
            latest = run.latest(metric)
            cells.append("–" if latest is None else f"{latest[1]:,.{decimals}f}")
        rows.append("<tr><td>" + "</td><td>".join(map(esc, cells)) + "</td></tr>")
    columns = "".join(f"<th>{esc(each)}</th>" for each in head)
    return f'<div class="wide"><table>{f"<tr>{columns}</tr>"}{"".join(rows)}</table></div>'


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _first(count: int) -> str:
    return f" of the first {COLOURS}" if count > COLOURS else ""


def _charts(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Each metric of the charts of a run's page, with a line for each run."""
    charts = []
    for title, unit, from_zero, smooth, metrics in CHARTS:
        for metric, label in metrics:
            series = [Series(name, *run.curve(metric), smooth=smooth) for run, name in zip(runs, names, strict=True)]
            full = title if len(metrics) == 1 else f"{title}: {label}"
            charts.append(chart(full, series, unit=unit, from_zero=from_zero))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "<p>No step is logged yet.</p>"
