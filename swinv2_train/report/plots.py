"""Charts as PNG by matplotlib, an extra that is imported when something is drawn."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from swinv2_train.config import ConfigError
from swinv2_train.report.charts import Series, frame_of
from swinv2_train.storage.atomic import replacing

COLOURS = (
    "#2563c9", "#6ea8fe", "#a9c9ff", "#1b7f79", "#55b8a6", "#8e44ad", "#c39bd3", "#d9730d", "#f0a35e", "#f7cf9d",
    "#2e8b57", "#67c893", "#b3261e", "#e57368", "#8a6d3b", "#c9b079", "#555555", "#999999",
)  # fmt: skip
"""Of the parts of a bar."""
LINE_COLOURS = ("#2563c9", "#d9730d", "#2e8b57", "#8e44ad")
"""Of the lines of a chart, as in the report's."""
_PANEL_WIDTH, _PANEL_HEIGHT, _LEFT, _RIGHT = 4.5, 3.0, 0.75, 0.15
"""Of a chart among several, and what is beside its axes; inches."""


def plots_problem() -> str | None:
    """Why nothing can be drawn here and what helps; None where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed; in the repository: pip install -e '.[plots]'"
    return None


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """An empty matplotlib Figure of this size in inches; ConfigError where matplotlib is missing.

    layout: matplotlib's; None = the margins are given to the axes.
    """
    if problem := plots_problem():
        raise ConfigError(f"a picture cannot be drawn: {problem}")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces that it lists the fonts
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    return Figure((width, height), dpi=100, layout=layout)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, in a folder that is made for it; returns the path.  OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return path


def draw_curves(charts: Sequence[tuple[str, Sequence[Series]]], path: Path) -> Path | None:
    """Write line charts side by side as one PNG; returns the path, None when no series has a finite point.

    Highest values that would flatten the rest are cut off, as in the report.
    """
    drawn = [(title, frame) for title, series in charts if (frame := frame_of(series, False, None)) is not None]
    if not drawn:
        return None
    figure = new_figure(_PANEL_WIDTH * len(drawn), _PANEL_HEIGHT, layout=None)
    panels = figure.subplots(1, len(drawn), squeeze=False, gridspec_kw=_margins(len(drawn)))[0]
    for axes, (title, frame) in zip(panels, drawn, strict=True):
        for index, series, points in frame.lines:
            xs, ys = zip(*points, strict=True)
            marker = "o" if sum(map(math.isfinite, ys)) <= 30 else None
            axes.plot(xs, ys, color=LINE_COLOURS[index % 4], marker=marker, markersize=4, label=series.label)
        axes.set(title=title, ylim=(frame.y_low, frame.y_high))
        axes.grid(axis="y", color="#dddddd")
        if len(frame.lines) > 1:
            axes.legend()
    return save_figure(figure, path)


def _margins(panels: int) -> dict[str, float]:
    """Room for titles and the numbers at the axes.  To measure every text first takes twice as long as to draw."""
    width = _PANEL_WIDTH * panels
    return {
        "left": _LEFT / width,
        "right": 1 - _RIGHT / width,
        "bottom": 0.3 / _PANEL_HEIGHT,
        "top": 1 - 0.35 / _PANEL_HEIGHT,
        "wspace": (_LEFT + _RIGHT) / (_PANEL_WIDTH - _LEFT - _RIGHT),
    }


def stacked_bars(
    axes: Any, bars: Sequence[Mapping[str, float]], colours: Mapping[str, str], horizontal: bool = False
) -> list[float]:
    """Draw a bar for each mapping from part to size, at 0, 1, ...; returns their lengths.

    colours: by part, in the order in which parts lie on top of each other, or from left to right.
    """
    ends = [0.0] * len(bars)
    for part, colour in colours.items():
        sizes = [bar.get(part, 0.0) for bar in bars]
        if horizontal:
            axes.barh(range(len(bars)), sizes, 0.7, left=ends, color=colour, label=part)
        else:
            axes.bar(range(len(bars)), sizes, 0.7, bottom=ends, color=colour, label=part)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    return ends
