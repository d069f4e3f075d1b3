"""A plan drawn: where the bytes go over a step, and what a step consists of on 8 to 1,024 GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swinv2_train.planning.memory import MemoryPlan
from swinv2_train.planning.scaling import Curve
from swinv2_train.report.plots import COLOURS, new_figure, save_figure, stacked_bars
from swinv2_train.runtime.environment import GIB


def draw_plan(plan: MemoryPlan, path: Path, title: str) -> Path:
    """Write the plan's phases as stacked bars, PNG.  Returns the path; OSError where it cannot be written."""
    names = list(dict.fromkeys(part for parts in plan.phases.values() for part in parts))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    bars = [{name: nbytes / GIB for name, nbytes in parts.items()} for parts in plan.phases.values()]
    figure = new_figure(9.5, max(4.8, 0.3 * len(names)))
    axes = figure.subplots()
    for place, total in enumerate(stacked_bars(axes, bars, colours)):
        axes.annotate(f"{total:.2f}", (place, total), (0, 3), textcoords="offset points", ha="center")
    available = axes.axhline(plan.available / GIB, color="#b3261e", linestyle="--", label="available")
    axes.set_xticks(range(len(bars)), plan.phases)
    axes.set(title=f"{title}: GiB of one rank over a step", ylabel="GiB")
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    handles = {handle.get_label(): handle for handle in axes.containers}
    largest = {name: max(bar.get(name, 0.0) for bar in bars) for name in names}
    figure.legend(
        [available, *(handles[name] for name in reversed(names))],
        ["available", *(f"{name}, {largest[name]:.2f}" for name in reversed(names))],
        loc="outside right upper",
    )
    return save_figure(figure, path)


def draw_curve(curve: Curve, path: Path, title: str) -> Path:
    """Write images/s over the GPUs beside what they would do alone, and the parts of their steps, PNG.

    Returns the path; OSError where it cannot be written.
    """
    figure = new_figure(13, 4.8)
    speeds, steps = figure.subplots(1, 2)
    figure.suptitle(f"{title}: {curve.kind} scaling")
    _draw_speeds(speeds, curve)
    _draw_steps(steps, curve)
    handles, labels = steps.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper")
    return save_figure(figure, path)


def _draw_speeds(axes: Any, curve: Curve) -> None:
    gpus = [each.num_gpus for each in curve.points]
    axes.plot(gpus, [each.speed.images / each.alone_sec for each in curve.points], "o-", color="#aaaaaa")
    axes.plot(gpus, [each.speed.images_per_sec for each in curve.points], "o-", color=COLOURS[0])
    axes.set(xscale="log", yscale="log", xlabel="GPUs: images/s, grey if nothing but the passes took time")
    axes.set_xticks(gpus, [f"{count:,}" for count in gpus])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd")


def _draw_steps(axes: Any, curve: Curve) -> None:
    shown = [name for name in curve.points[0].parts if any(each.parts[name] > 0 for each in curve.points)]
    colours = dict(zip(curve.points[0].parts, (COLOURS[i] for i in (0, 1, 3, 7, 12, 10)), strict=True))
    bars = [
        {name: 100 * sec / each.speed.step_sec for name, sec in each.parts.items() if sec > 0} for each in curve.points
    ]
    stacked_bars(axes, bars, {name: colours[name] for name in shown})
    axes.set_xticks(range(len(bars)), [f"{each.num_gpus:,}" for each in curve.points])
    axes.set(xlabel="GPUs: parts of a step", ylabel="%", ylim=(0, 100))
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
