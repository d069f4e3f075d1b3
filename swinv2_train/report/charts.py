"""Line charts as inline SVG: no dependency, no request, light or dark with the page around them.

``chart`` draws one; the page needs ``CHART_CSS`` once for the looks and ``CHART_JS`` once for the read-out under the
pointer (without it the charts only lose the read-out).
"""

from __future__ import annotations

import html
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swinv2_train.config.shown import NAME_CHARACTERS, shown

_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 8, 34
STEPS = "step"
"""What a chart is drawn over where nothing else is said."""
COLOURS = 8
"""Lines of a chart that can be told apart."""
_MAX_POINTS = 300  # a chart is about 340 px wide


@dataclass(frozen=True)
class Series:
    """One line: points in order of x, nan where there is no value."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    smooth: bool = False
    """Draw the points pale and their running mean over them (from 60 points on)."""


def chart(
    title: str,
    series: Sequence[Series],
    unit: str = "",
    from_zero: bool = False,
    x_range: tuple[float, float] | None = None,
    axis: str = STEPS,
) -> str:
    """An SVG figure over the steps with axes, ticks and a legend; "" when no series has a finite point.

    unit: shown after the title, e.g. "images/s".  from_zero: the y axis starts at 0.  x_range: lowest and highest step
    of the axis (None = as far as the points go), so that all charts of a run line up.  axis: what is on the x axis; the
    last values stand beside the title where it is steps.
    """
    frame = frame_of(series, from_zero, x_range)
    if frame is None:
        return ""
    px, py, lines = frame.px, frame.py, frame.lines
    parts = []
    for tick in frame.y_ticks:
        y = py(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in frame.x_ticks:
        anchor = "end" if px(tick) > _WIDTH - 24 else "middle"
        parts.append(f'<text x="{px(tick):.1f}" y="{base + 15}" text-anchor="{anchor}">{tick_text(tick)}</text>')
    parts.append(f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}">{_esc(axis)}</text>')

    clip = f"clip-{zlib.crc32(repr((title, frame)).encode()):x}"  # one page holds many charts
    parts.append(
        f'<clipPath id="{clip}"><rect x="{_LEFT - 4}" y="{_TOP - 4}" width="{_WIDTH - _LEFT - _RIGHT + 8}" '
        f'height="{base - _TOP + 8}"/></clipPath><g clip-path="url(#{clip})">'
    )
    read_out = []
    for index, s, points in lines:
        colour = f"c{index % COLOURS}"
        smooth = s.smooth and len(points) >= 60
        thin = _thin(points)
        if smooth:
            parts.append(f'<path class="raw {colour}" d="{_path(thin, px, py)}"/>')
            thin = _every(
                list(zip([x for x, _ in points], running_mean([min(y, frame.y_high) for _, y in points]), strict=True))
            )
        parts.append(f'<path class="line {colour}" d="{_path(thin, px, py)}"/>')
        if len(points) <= 30:
            parts += [
                f'<circle class="{colour}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>'
                for x, y in points
                if math.isfinite(y)
            ]
        shown = [(x, y) for x, y in (thin if smooth else _every(points)) if math.isfinite(y)]
        read_out.append({"label": s.label, "x": [x for x, _ in shown], "y": [float(f"{y:.5g}") for _, y in shown]})
    parts.append('</g><line class="cursor" y1="8" y2="196"/>')

    last = {s.label: next(y for _, y in reversed(points) if math.isfinite(y)) for _, s, points in lines}
    legend = "".join(
        f'<span class="key"><i class="c{index % COLOURS}"></i>{_esc(s.label)}</span>' for index, s, _ in lines
    ) if len(lines) > 1 else ""  # fmt: skip
    note = (
        f'<span class="note">cut at the top; highest {value_text(frame.cut_off)}</span>'
        if frame.cut_off is not None
        else ""
    )
    unit_html = f' <span class="unit">{_esc(unit)}</span>' if unit else ""
    latest = ", ".join(f"{value_text(y)}" for y in last.values()) if axis == STEPS else ""
    box = [_LEFT, _WIDTH - _RIGHT, _WIDTH]
    data = html.escape(json.dumps({"lines": read_out, "x": [frame.x_low, frame.x_high], "box": box, "axis": axis}))
    over = "the steps" if axis == STEPS else _esc(axis)
    return (
        f'<figure class="chart" data-chart="{data}"><figcaption><b>{_esc(title)}</b>{unit_html}'
        f'<output data-latest="{latest}">{latest}</output></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_esc(title)} over {over}">'
        + "".join(parts)
        + f'</svg><div class="legend">{legend}{note}</div></figure>'
    )


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 5 x 10^k apart) from at or below `low` to at or above `high`, about `about` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), default=10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A short number for an axis: 20k, 1.5M, 0.25, 4e-5."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.6g}{letter}"
    if value and size < 5e-3:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.6g}"


def value_text(value: float | None) -> str:
    """A measured number for people: four significant digits, thousands grouped; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return tick_text(value)
    return f"{value:.4g}"


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twenty-fifth of the points; nan stays out of the mean, a window of nan gives nan."""
    half = max(1, len(values) // 50)
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for i in range(len(values)):
        start, stop = max(0, i - half), min(len(values), i + half + 1)
        count = counts[stop] - counts[start]
        means.append((sums[stop] - sums[start]) / count if count else math.nan)
    return means


@dataclass(frozen=True)
class Frame:
    """What a chart shows and where: the lines with their colours, the ranges of the axes and their ticks."""

    lines: list[tuple[int, Series, list[tuple[float, float]]]]
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    x_ticks: list[float]
    y_ticks: list[float]
    cut_off: float | None
    """The highest value, when outliers are cut off at the top."""

    def px(self, x: float) -> float:
        return _LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)


def frame_of(series: Sequence[Series], from_zero: bool, x_range: tuple[float, float] | None) -> Frame | None:
    """The frame around the series that have a finite point; None when none has."""
    lines = []
    for index, s in enumerate(series):
        points = [(float(x), float(y)) for x, y in zip(s.xs, s.ys, strict=True)]
        if any(math.isfinite(y) for _, y in points):
            lines.append((index, s, points))
    if not lines:
        return None
    xs = [x for _, _, points in lines for x, _ in points]
    low, high, cut_off = _y_range([[y for _, y in points if math.isfinite(y)] for _, _, points in lines], from_zero)
    y_ticks = nice_ticks(low, high, 4)
    x_low, x_high = x_range if x_range is not None else (min(xs), max(xs))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    x_ticks = [x for x in nice_ticks(x_low, x_high, 5) if x_low <= x <= x_high and x == int(x)]
    return Frame(lines, x_low, x_high, min(low, y_ticks[0]), max(high, y_ticks[-1]), x_ticks, y_ticks, cut_off)


def _y_range(lines: Sequence[Sequence[float]], from_zero: bool) -> tuple[float, float, float | None]:
    """Lowest and highest y to show, and the highest value when a few outliers are cut off (None when nothing is)."""
    values = sorted(y for ys in lines for y in ys)
    low, high = values[0], values[-1]
    clipped = None
    if len(values) >= 40 and low >= 0:
        usual = values[int(0.97 * (len(values) - 1))]
        if high > 3 * usual > 0:
            high, clipped = 1.3 * usual, values[-1]
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low if from_zero and low == 0 else low - margin), high + margin
    return low, high, clipped


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about _MAX_POINTS points that keep every stretch's lowest and highest value."""
    if len(points) <= _MAX_POINTS:
        return points
    kept: list[tuple[float, float]] = []
    stretch = math.ceil(2 * len(points) / _MAX_POINTS)
    for start in range(0, len(points), stretch):
        finite = [point for point in points[start : start + stretch] if math.isfinite(point[1])]
        if finite:
            kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
        else:
            kept.append((points[start][0], math.nan))
    return kept


def _every(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about _MAX_POINTS points, evenly taken, the last one among them."""
    stride = math.ceil(len(points) / _MAX_POINTS)
    return points[:-1:stride] + points[-1:]


def _path(points: Sequence[tuple[float, float]], px: Callable[[float], float], py: Callable[[float], float]) -> str:
    """SVG path through the points; a gap wherever y is not finite."""
    text, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            text.append(f"{'L' if pen_down else 'M'}{px(x):.1f} {py(y):.1f}")
        pen_down = math.isfinite(y)
    return "".join(text)


def escaped(text: str, most: int, lines: bool = False) -> str:
    """Text of at most `most` characters for a page, in which no character is markup or acts unseen."""
    return html.escape(shown(text, most, lines))


def _esc(text: str) -> str:
    return escaped(text, NAME_CHARACTERS)


CHART_CSS = """
:root{--c0:#2563c9;--c1:#d9730d;--c2:#2e8b57;--c3:#8e44ad;--c4:#c2185b;--c5:#00838f;--c6:#7a6a00;--c7:#5d4037}
@media (prefers-color-scheme:dark){:root{--c0:#6ea8fe;--c1:#f0a35e;--c2:#67c893;--c3:#c39bd3;--c4:#f48fb1;
--c5:#4dd0e1;--c6:#dce775;--c7:#bcaaa4}}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:14px}
.chart{margin:0;padding:10px 12px 6px;background:var(--card);border:1px solid var(--edge);border-radius:8px;min-width:0}
.chart figcaption{display:flex;align-items:baseline;gap:5px;font-size:14px;margin-bottom:4px}
.chart .unit{color:var(--soft);font-size:12px}
.chart output{margin-left:auto;font-size:13px;color:var(--soft);font-variant-numeric:tabular-nums;text-align:right}
.chart svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
.chart text{font:11.5px system-ui,sans-serif;fill:var(--soft)}
.chart text.label{text-anchor:middle}
.chart .grid{stroke:var(--edge);stroke-width:1}
.chart .axis{stroke:var(--soft);stroke-width:1;opacity:.6}
.chart .cursor{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3;visibility:hidden}
.chart path{fill:none;stroke-linejoin:round;stroke-linecap:round}
.chart path.line{stroke-width:2}
.chart path.raw{stroke-width:1;opacity:.3}
path.c0{stroke:var(--c0)}path.c1{stroke:var(--c1)}path.c2{stroke:var(--c2)}path.c3{stroke:var(--c3)}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}circle.c3{fill:var(--c3)}
i.c0{background:var(--c0)}i.c1{background:var(--c1)}i.c2{background:var(--c2)}i.c3{background:var(--c3)}
path.c4{stroke:var(--c4)}path.c5{stroke:var(--c5)}path.c6{stroke:var(--c6)}path.c7{stroke:var(--c7)}
circle.c4{fill:var(--c4)}circle.c5{fill:var(--c5)}circle.c6{fill:var(--c6)}circle.c7{fill:var(--c7)}
i.c4{background:var(--c4)}i.c5{background:var(--c5)}i.c6{background:var(--c6)}i.c7{background:var(--c7)}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:12px;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
.legend .note{margin-left:auto}
"""

CHART_JS = """
for (const figure of document.querySelectorAll('figure.chart')) {
  const {lines, x: [low, high], box: [left, right, width], axis} = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector('svg'), out = figure.querySelector('output');
  const cursor = figure.querySelector('.cursor');
  const nearest = (xs, x) => xs.reduce((best, v, i) => Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best, 0);
  svg.addEventListener('pointermove', event => {
    const frame = svg.getBoundingClientRect();
    const at = Math.min(right, Math.max(left, (event.clientX - frame.left) / frame.width * width));
    const x = low + (at - left) / (right - left) * (high - low);
    const first = lines[0].x[nearest(lines[0].x, x)];
    out.textContent = axis + ' ' + first.toLocaleString() + ': ' + lines.map(l => l.y[nearest(l.x, x)]).join(', ');
    const px = left + (first - low) / (high - low) * (right - left);
    cursor.setAttribute('x1', px); cursor.setAttribute('x2', px); cursor.style.visibility = 'visible';
  });
  svg.addEventListener('pointerleave', () => {
    out.textContent = out.dataset.latest; cursor.style.visibility = 'hidden';
  });
}
"""
