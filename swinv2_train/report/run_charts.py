"""A run's metrics as charts, and what they are called."""

from __future__ import annotations

from pathlib import Path

from swinv2_train.monitoring.run_log import UNFINISHED
from swinv2_train.report.charts import Series, chart
from swinv2_train.report.plots import draw_curves, plots_problem
from swinv2_train.report.run_record import CURVES_PNG, RunRecord

_LOSSES = (("train/loss", "train"), ("val/loss", "validation"), ("val_ema/loss", "validation, averaged weights"))
_ACCURACIES = (
    *(("val/top1", "top-1"), ("val/top5", "top-5")),
    *(("val_ema/top1", "top-1, averaged weights"), ("val_ema/top5", "top-5, averaged weights")),
)
PROBES = (
    *(("probe/knn_top1", "k-NN top-1"), ("probe/knn_top5", "k-NN top-5")),
    *(("probe/linear_top1", "linear top-1"), ("probe/linear_top5", "linear top-5")),
)
_PRECISIONS = tuple(
    (f"val/{kind}_{name}", f"{words}{at}")
    for kind, words in (("box", "boxes"), ("mask", "masks"))
    for name, at in (("ap", ""), ("ap50", " at an overlap of 0.50"), ("ap75", " at 0.75"))
)
_TIMES = (
    *(("perf/step_sec", "step"), ("data/wait_sec", "of it waiting for data")),
    ("perf/own_step_sec", "the slowest rank's own work"),
)
# (title, unit, from zero, smoothed, names with their labels).  What is not named here gets a chart of its own.
CHARTS: tuple[tuple[str, str, bool, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "", False, True, _LOSSES),
    ("Accuracy", "%", False, False, _ACCURACIES),
    ("Accuracy of the frozen encoder", "%", False, False, PROBES),
    ("Average precision", "%", True, False, _PRECISIONS),
    ("Learning rate", "", True, False, (("train/lr", "lr"),)),
    ("Gradient norm", "before clipping", True, True, (("train/grad_norm", "norm"),)),
    ("Throughput", "images/s", True, False, (("perf/images_per_sec", "images/s"),)),
    ("Time per step", "s", True, False, _TIMES),
    ("Peak memory", "GiB", True, False, (("mem/peak_gib", "peak"),)),
    ("Model FLOP utilisation", "share of peak", True, False, (("perf/mfu", "MFU"),)),
    ("Steps not taken", "so far", True, False, (("train/skipped_steps", "skipped"),)),
)
_NO_CHART = {
    "step", "images_seen", "data/skipped_images", "checkpoint/stall_sec", "perf/slowest_rank", UNFINISHED,
}  # fmt: skip
_WORDS = {
    "images_seen": "images seen", "data/skipped_images": "damaged images left out", "checkpoint/stall_sec":
    "seconds that a checkpoint held training up", "perf/slowest_rank": "rank that the others waited for", UNFINISHED:
    "evaluation cut short by a stop",
}  # fmt: skip


def write_curves(run: RunRecord) -> Path | None:
    """Loss, accuracy and learning rate as one PNG, RUN_DIR/pictures/curves.png.

    None when there is nothing to draw, or matplotlib is missing: the page has the same charts.
    """
    if plots_problem():
        return None
    panels = [
        (f"{title} ({unit})" if unit else title, [Series(label, *run.curve(name)) for name, label in names])
        for title, unit, _, _, names in CHARTS[:3]
    ]
    return draw_curves(panels, run.run_dir / "pictures" / CURVES_PNG)


def charts_of(run: RunRecord, only: int | None = None) -> str:
    """The charts of a run; `only`: how many are in sight, the others folded away."""
    charts, named = [], set(_NO_CHART)
    x_range = (0, run.metrics[-1]["step"]) if len(run.metrics) > 1 else None
    for title, unit, from_zero, smooth, names in CHARTS:
        named |= {name for name, _ in names}
        series = [Series(label, *run.curve(name), smooth=smooth) for name, label in names]
        charts.append(chart(title, series, unit=unit, from_zero=from_zero, x_range=x_range))
    of_sources = [name for name in metric_names(run) if name.startswith("mix/")]
    named |= set(of_sources)
    series = [
        Series(name.split("/")[1], *run.curve(name), smooth=True) for name in of_sources if name.endswith("/loss")
    ]
    charts.append(chart("Loss of each source", series, x_range=x_range))
    for name in sorted(set(metric_names(run)) - named):
        charts.append(chart(metric_words(name), [Series(name, *run.curve(name))], x_range=x_range))
    charts = [drawn for drawn in charts if drawn]
    if not charts:
        return ""
    shown, folded = (charts, []) if only is None else (charts[:only], charts[only:])
    more = (
        f'<details><summary>More curves</summary><div class="charts">{"".join(folded)}</div></details>'
        if folded
        else ""
    )
    return f'<div class="charts">{"".join(shown)}</div>{more}'


def metric_names(run: RunRecord) -> list[str]:
    """Every name in any line of the run, sorted."""
    return sorted({key for line in run.metrics for key in line})


def metric_words(name: str) -> str:
    """A metric's name as a person reads it: train/loss -> Loss, train; data/queue_sec -> data: queue, s."""
    for title, _, _, _, names in CHARTS:
        if name in dict(names):
            return title if len(names) == 1 else f"{title}, {dict(names)[name]}"
    group, _, rest = name.rpartition("/")
    words = rest.removesuffix("_sec").replace("_", " ") + (", s" if rest.endswith("_sec") else "")
    return _WORDS.get(name, f"{group.replace('_', ' ')}: {words}" if group else words)
