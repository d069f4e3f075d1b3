"""Where the bytes go, drawn: one bar for each phase of a step, one colour for each part."""

from __future__ import annotations

from pathlib import Path

from swinv2_train.charts import nice_ticks, tick_text
from swinv2_train.planning.memory import GIB, MemoryPlan

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
        x, below = _LEFT + _GAP + column * (_BAR + _GAP), 0.0
        for name in names:
            size = parts.get(name, 0) / GIB
            if size > 0:
                draw.rectangle((x, y(below + size), x + _BAR, y(below)), fill=colours[name])
                below += size
        draw.text((x + _BAR / 2, y(below) - 4), f"{below:.2f}", fill=_TEXT, font=font, anchor="mb")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path
