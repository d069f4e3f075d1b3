"""The results of scripts/ablations.py as Markdown, JSON and pictures.

"a ± b" is the mean over the seeds and their sample standard deviation.  A difference to ours is taken seed by seed:
both runs began with the same values and saw the same images.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swinv2_train.report.charts import Series, running_mean
from swinv2_train.report.plots import draw_curves

BLOCKS = {
    ("res-post-norm", "cosine"): "ours",
    ("res-post-norm", "dot product"): "post, dot",
    ("pre-norm", "dot product"): "pre, dot",
}
"""Norms and attention of question "blocks", and what the pictures call them."""
BIASES = {"log": "log (ours)", "linear": "linear", "table": "table"}
"""Position biases of question "windows", and what the pictures call them."""
PAPER_WINDOWS = (
    "The paper's Swin-T on ImageNet (table 1), windows 8, 12 and 16 at 256, 384 and 512 px without fine-tuning, top-1: "
    "log 81.8, 82.4, 81.7; linear 81.7, 82.0, 81.2; table 81.7, 79.4, 77.2."
)
LAST_SHARE = 0.2
"""Share of the steps, at the end, over which a loss is averaged."""
MORE = "more than ours: mean (lowest .. highest)"

Result = dict[str, Any]


def write(path: Path, results: Sequence[Result], about: dict[str, Any]) -> list[Path]:
    """Write path.md, path.json and a picture for each question that has results.  Returns what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = ", ".join([about["cpu"], *(f"{name} {version}" for name, version in about["versions"].items())])
    cpu_sec = sum(result["train_cpu_sec"] + result["eval_cpu_sec"] for result in results)
    images = sum(result["images"] for result in results)
    parts = [
        f"# The paper's ablations on CIFAR-10 ({about['date']})",
        f"    {about['command']}",
        f"{told}; bf16 autocast, one thread a run. {len(results)} runs, {images:,} training images, {cpu_sec:,.0f} s "
        "of CPU time in all. ± is the sample standard deviation over the seeds; differences to ours are taken seed by "
        "seed (same initial values, same batches). What is compared: `python scripts/ablations.py --help`.",
    ]
    written = [path.with_suffix(".md"), path.with_suffix(".json")]
    kinds = (("blocks", blocks_section, draw_blocks), ("windows", windows_section, draw_windows))
    for question, section, draw in kinds:
        own = [result for result in results if result["run"]["question"] == question]
        if own:
            image = path.with_name(f"{path.name}_{question}.png")
            parts += [section(own), f"![{question}]({image.name})"]
            draw(own, image)
            written.append(image)
    written[0].write_text("\n\n".join(parts) + "\n")
    written[1].write_text(json.dumps({**about, "results": list(results)}, allow_nan=False) + "\n")
    return written


# --------------------------------------------------------------------------------------------------------------------
# Question "blocks"


def blocks_section(results: Sequence[Result]) -> str:
    recipe = results[0]["run"]["recipe"]
    rows = []
    for lr in lrs_of(results):
        for (norm, attention), _ in BLOCKS.items():
            found = chosen(results, lr=lr, norm=norm, attention=attention)
            ours = chosen(results, lr=lr, norm="res-post-norm", attention="cosine")
            ends = [result["amplitudes"]["end"] for result in found if result["losses"][-1] is not None]
            losses = [final_loss(result) for result in found]
            rows.append([
                f"{lr:g}", f"{norm}, {attention}" + (" (ours)" if found == ours else ""),
                mean_of([amplitudes[-1] for amplitudes in ends]),
                mean_of([max(amplitudes) / min(amplitudes) for amplitudes in ends]),
                f"{sum(result['losses'][-1] is None for result in found)} of {len(found)}",
                mean_of([loss for loss in losses if loss is not None]),
                "" if found == ours else differences(losses, [final_loss(result) for result in ours]),
            ])  # fmt: skip
    head = ["lr", "blocks", "amplitude behind the last block", "largest over smallest amplitude", "diverged",
            f"training loss, last {LAST_SHARE:.0%} of the steps", MORE]  # fmt: skip
    return "\n\n".join([
        "## Norms and attention",
        f"Swin with {tuple(recipe['depths'])} blocks of {recipe['embed_dim']} and {2 * recipe['embed_dim']} channels, "
        f"patches of {recipe['patch_size']} px, window {recipe['window_size']}, the same position bias (log-CPB) in "
        f"all rows; {recipe['steps']} steps of {recipe['batch_size']} images, {recipe['warmup_steps']} of them warm-"
        f"up, {clipping(recipe)}. Amplitude: standard deviation of the main branch behind a block at the end of the "
        "training, on test images.",
        table(head, rows),
    ])  # fmt: skip


def draw_blocks(results: Sequence[Result], path: Path) -> None:
    charts = []
    for lr in lrs_of(results):
        amplitudes, losses = [], []
        for (norm, attention), label in BLOCKS.items():
            found = chosen(results, lr=lr, norm=norm, attention=attention)
            finite = [result for result in found if result["losses"][-1] is not None]
            ends = list(zip(*(result["amplitudes"]["end"] for result in finite), strict=True))
            amplitudes.append(Series(label, range(len(ends)), [statistics.mean(values) for values in ends]))
            curves = list(zip(*(padded(result) for result in found), strict=True))
            losses.append(Series(label, range(len(curves)), running_mean([statistics.mean(step) for step in curves])))
        charts += [(f"lr {lr:g}: amplitude behind block", amplitudes), (f"lr {lr:g}: training loss at step", losses)]
    draw_curves(charts, path)


# --------------------------------------------------------------------------------------------------------------------
# Question "windows"


def windows_section(results: Sequence[Result]) -> str:
    recipe = results[0]["run"]["recipe"]
    reach = ", ".join(
        f"{label} {mean_of([statistics.mean(result['bias_range']) for result in chosen(results, bias=bias)], 1)}"
        for bias, label in BIASES.items()
    )
    return "\n\n".join([
        "## Windows that grow without fine-tuning",
        f"Ours with another position bias: {tuple(recipe['depths'])} blocks of {recipe['embed_dim']} and "
        f"{2 * recipe['embed_dim']} channels, patches of {recipe['patch_size']} px, trained at {recipe['img_size']} px "
        f"with window {recipe['window_size']} on crops of {recipe['crop_scale'][0]:.0%} to "
        f"{recipe['crop_scale'][1]:.0%} of the area; {recipe['steps']} steps of {recipe['batch_size']} images, lr "
        f"{results[0]['run']['lr']:g}, of the table {recipe['table_lr_scale']:g} times that; {clipping(recipe)}. "
        "Scored on the test images, resized bicubically, at pixels/window; where a map is smaller than the window, the "
        f"window is the map. The learned biases reach, over the offsets of the trained window, in logits: {reach}. "
        f"{PAPER_WINDOWS} How this setting was chosen, and what a smoother table does: docs/LOG.md.",
        windows_table(results, "top1", "top-1, %", "points lost", 2),
        windows_table(results, "loss", "cross entropy", "rise", 4),
    ])  # fmt: skip


def windows_table(results: Sequence[Result], key: str, name: str, change: str, digits: int) -> str:
    """One score at every size, and how much worse it is at the larger ones."""
    first, *larger = results[0]["scores"]
    rows = []
    for bias, label in BIASES.items():
        found, ours = chosen(results, bias=bias), chosen(results, bias="log")
        row = [label] + [mean_of([r["scores"][size][key] for r in found], digits) for size in (first, *larger)]
        for size in larger:
            worse, ours_worse = ([worsening(result, key, first, size) for result in each] for each in (found, ours))
            row += [mean_of(worse, digits), "" if bias == "log" else differences(worse, ours_worse, digits)]
        rows.append(row)
    head = ["position bias", *(f"{size}: {name}" for size in (first, *larger))]
    for size in larger:
        head += [f"{change} from {first} to {size}", MORE]
    return table(head, rows)


def draw_windows(results: Sequence[Result], path: Path) -> None:
    sizes = list(results[0]["scores"])
    windows = [int(size.partition("/")[2]) for size in sizes]
    charts = []
    for title, key in (("top-1, %, at window", "top1"), ("cross entropy at window", "loss")):
        lines = [
            Series(label, windows, [
                statistics.mean(result["scores"][size][key] for result in chosen(results, bias=bias)) for size in sizes
            ])
            for bias, label in BIASES.items()
        ]  # fmt: skip
        charts.append((title, lines))
    draw_curves(charts, path)


def worsening(result: Result, key: str, start: str, end: str) -> float:
    """Points of top-1 lost, or cross entropy gained, from one size to another."""
    change: float = result["scores"][end][key] - result["scores"][start][key]
    return -change if key == "top1" else change


# --------------------------------------------------------------------------------------------------------------------
# Both


def chosen(results: Sequence[Result], **values: Any) -> list[Result]:
    """The results of the runs with these settings, by seed."""
    found = [r for r in results if all(r["run"][name] == value for name, value in values.items())]
    return sorted(found, key=lambda result: result["run"]["seed"])


def lrs_of(results: Sequence[Result]) -> list[float]:
    return sorted({result["run"]["lr"] for result in results})


def final_loss(result: Result) -> float | None:
    """Mean training loss over the last steps; None of a run that diverged."""
    losses = result["losses"]
    if losses[-1] is None:
        return None
    return statistics.mean(losses[-max(1, round(LAST_SHARE * len(losses))) :])


def padded(result: Result) -> list[float]:
    """The loss of every step of the recipe, nan from a divergence on."""
    losses = [math.nan if loss is None else loss for loss in result["losses"]]
    return losses + [math.nan] * (result["run"]["recipe"]["steps"] - len(losses))


def mean_of(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def differences(values: Sequence[float | None], ours: Sequence[float | None], digits: int = 3) -> str:
    """Theirs less ours, seed by seed; of the seeds in which neither diverged."""
    found = [a - b for a, b in zip(values, ours, strict=True) if a is not None and b is not None]
    if not found:
        return "-"
    return f"{statistics.mean(found):+.{digits}f} ({min(found):+.{digits}f} .. {max(found):+.{digits}f})"


def clipping(recipe: dict[str, Any]) -> str:
    limit = recipe["clip_grad_norm"]
    return f"gradients clipped to norm {limit:g}" if limit else "gradients not clipped"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
