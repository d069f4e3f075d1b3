"""Histograms of bands as one PNG, a small chart for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swinv2_train.report.plots import LINE_COLOURS, new_figure, save_figure

_COLUMNS = 4


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width from low to high, of one band of one source; none where it has one value."""

    counts: Sequence[int]
    low: float
    high: float
    mean: float


def draw_histograms(bands: Mapping[str, Mapping[str, Histogram]], path: Path) -> Path:
    """Write a chart for each band, PNG: of each source an outline of area 1, and its mean as a dashed line.

    bands: by name, each source's by its name ("" where there is one).  Returns the path; ConfigError where matplotlib
    is missing, OSError where it cannot be written.
    """
    columns = min(_COLUMNS, len(bands))
    rows = math.ceil(len(bands) / columns)
    figure = new_figure(3.2 * columns, 2.2 * rows)
    places = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes, (name, sources) in zip(places, bands.items(), strict=False):
        for number, (source, each) in enumerate(sources.items()):
            if not each.counts:
                continue
            colour = LINE_COLOURS[number % len(LINE_COLOURS)]
            width, total = (each.high - each.low) / len(each.counts), max(1, sum(each.counts))
            edges = [each.low + width * place for place in range(len(each.counts) + 1)]
            axes.stairs([count / total / width for count in each.counts], edges, color=colour, label=source)
            axes.axvline(each.mean, color=colour, linestyle="--", linewidth=1)
        axes.set(title=name, ylim=(0, None), yticks=[])
    for axes in places[len(bands) :]:
        axes.remove()
    first = next(iter(bands.values()))
    if len(first) > 1:
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(first))
    return save_figure(figure, path)
