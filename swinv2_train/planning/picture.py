"""A plan drawn: where the bytes go over a step, and what a step consists of on 8 to 1,024 GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swinv2_train.planning.memory import MemoryPlan
from swinv2_train.planning.scaling import Curve
from swinv2_train.report.charts import nice_ticks, tick_text
from swinv2_train.runtime.environment import GIB

_COLOURS = (
    "#2563c9", "#6ea8fe", "#a9c9ff", "#1b7f79", "#55b8a6", "#8e44ad", "#c39bd3", "#d9730d", "#f0a35e", "#f7cf9d",
    "#2e8b57", "#67c893", "#b3261e", "#e57368", "#8a6d3b", "#c9b079", "#555555", "#999999",
)  # fmt: skip
_LEFT, _TOP, _HEIGHT, _BAR, _GAP, _LEGEND = 60, 46, 380, 96, 40, 330
_TEXT, _GRID = (60, 60, 60), (220, 220, 220)


def draw_plan(plan: MemoryPlan, path: Path, title: str) -> Path:
    """Write the plan's phases as stacked bars, PNG.  Returns the path; OSError where it cannot be written."""
    from PIL import Image, ImageDraw, ImageFont  # here: only a picture needs it

    names = list(dict.fromkeys(part for parts in plan.phases.values() for part in parts))
    highest = max(plan.peak, plan.available) / GIB * 1.05
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    width = _LEFT + len(plan.phases) * (_BAR + _GAP) + _GAP + _LEGEND
    image = Image.new("RGB", (width, max(_TOP + _HEIGHT + 50, _TOP + 18 * len(names) + 50)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    base = _TOP + _HEIGHT

    def y(gib: float) -> float:
        return base - gib / highest * _HEIGHT

    right = width - _LEGEND
    for tick in nice_ticks(0, highest, 6):
        draw.line((_LEFT, y(tick), right, y(tick)), fill=_GRID)
        draw.text((_LEFT - 8, y(tick)), tick_text(tick), fill=_TEXT, font=font, anchor="rm")
    draw.text((8, 8), f"{title}: GiB of one rank over a step", fill=_TEXT, font=ImageFont.load_default(16))
    for column, (phase, parts) in enumerate(plan.phases.items()):
        x = _LEFT + _GAP + column * (_BAR + _GAP)
        top = _stack(draw, x, _BAR, {name: parts.get(name, 0) / GIB for name in names}, colours, y)
        draw.text((x + _BAR / 2, y(top) - 4), f"{top:.2f}", fill=_TEXT, font=font, anchor="mb")
        draw.text((x + _BAR / 2, base + 8), phase, fill=_TEXT, font=font, anchor="mt")
    limit = y(plan.available / GIB)
    for start in range(_LEFT, right, 12):
        draw.line((start, limit, start + 6, limit), fill="#b3261e", width=2)
    draw.text((right + 8, limit), "available", fill="#b3261e", font=font, anchor="lm")
    for row, name in enumerate(reversed(names)):
        top = _TOP + 20 + 18 * row
        draw.rectangle((right + 80, top, right + 92, top + 12), fill=colours[name])
        largest = max(parts.get(name, 0) for parts in plan.phases.values()) / GIB
        draw.text((right + 98, top + 6), f"{name}, {largest:.2f}", fill=_TEXT, font=font, anchor="lm")
    return _save(image, path)


def draw_curve(curve: Curve, path: Path, title: str) -> Path:
    """Write images/s over the GPUs beside what they would do alone, and the parts of their steps, PNG.

    Returns the path; OSError where it cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont  # here: only a picture needs it

    names = [name for name in curve.points[0].parts if any(each.parts[name] > 0 for each in curve.points)]
    colours = dict(zip(curve.points[0].parts, (_COLOURS[i] for i in (0, 1, 3, 7, 12, 10)), strict=True))
    bar, plot, between = 44, 420, 90
    bars = len(curve.points) * (bar + 16) + 16
    right = _LEFT + plot + between
    image = Image.new("RGB", (right + bars + 150, _TOP + _HEIGHT + 56), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    base = _TOP + _HEIGHT
    draw.text((8, 8), f"{title}: {curve.kind} scaling", fill=_TEXT, font=ImageFont.load_default(16))

    speeds = [each.speed.images_per_sec for each in curve.points]
    alone = [each.speed.images / each.alone_sec for each in curve.points]
    gpus = [each.num_gpus for each in curve.points]
    x = _log_axis(min(gpus), max(gpus), _LEFT + 16, _LEFT + plot - 16)
    y = _log_axis(min(speeds), max(alone), base - 12, _TOP + 12)
    for tick in _log_ticks(min(speeds), max(alone)):
        draw.line((_LEFT, y(tick), _LEFT + plot, y(tick)), fill=_GRID)
        draw.text((_LEFT - 8, y(tick)), tick_text(tick), fill=_TEXT, font=font, anchor="rm")
    for each in gpus:
        draw.text((x(each), base + 8), f"{each:,}", fill=_TEXT, font=font, anchor="mt")
    draw.text((_LEFT + plot / 2, base + 28), "GPUs: images/s, grey if nothing but the passes took time", fill=_TEXT,
              font=font, anchor="mt")  # fmt: skip
    for values, colour in ((alone, (170, 170, 170)), (speeds, _COLOURS[0])):
        points = [(x(count), y(value)) for count, value in zip(gpus, values, strict=True)]
        draw.line(points, fill=colour, width=2)
        for px, py in points:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)

    def share(percent: float) -> float:
        return base - percent / 100 * _HEIGHT

    for tick in (0, 25, 50, 75, 100):
        draw.line((right, share(tick), right + bars, share(tick)), fill=_GRID)
        draw.text((right - 8, share(tick)), f"{tick} %", fill=_TEXT, font=font, anchor="rm")
    for column, point in enumerate(curve.points):
        left = right + 16 + column * (bar + 16)
        parts = {name: 100 * point.parts[name] / point.speed.step_sec for name in names}
        _stack(draw, left, bar, parts, colours, share)
        draw.text((left + bar / 2, base + 8), f"{point.num_gpus:,}", fill=_TEXT, font=font, anchor="mt")
    draw.text((right + bars / 2, base + 28), "GPUs: parts of a step", fill=_TEXT, font=font, anchor="mt")
    for row, name in enumerate(reversed(names)):
        top = _TOP + 20 + 20 * row
        draw.rectangle((right + bars + 20, top, right + bars + 32, top + 12), fill=colours[name])
        draw.text((right + bars + 38, top + 6), name, fill=_TEXT, font=font, anchor="lm")
    return _save(image, path)


def _stack(
    draw: Any,
    x: float,
    width: float,
    parts: Mapping[str, float],
    colours: Mapping[str, str],
    y: Callable[[float], float],
) -> float:
    """One bar of parts on top of each other; returns their sum."""
    below = 0.0
    for name, size in parts.items():
        if size > 0:
            draw.rectangle((x, y(below + size), x + width, y(below)), fill=colours[name])
            below += size
    return below


def _log_axis(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """From a value to its pixel."""
    scale = (stop - start) / (math.log(high / low) or 1.0)
    return lambda value: start + math.log(value / low) * scale


def _log_ticks(low: float, high: float) -> Sequence[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]


def _save(image: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path
