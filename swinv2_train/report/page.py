"""The page a person looks at after (or during) a run: RUN_DIR/report.html, one file without any outside request.

It reads only what lies in the run directory (config.yaml, environment.json, metrics.jsonl, pictures/), so it can be
written again at any time and on any machine; of a fine-tuning run it also shows the pre-training run it came from.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swinv2_train.data.class_names import listed, read_run_classes
from swinv2_train.monitoring.console import duration_text
from swinv2_train.report.charts import value_text
from swinv2_train.report.class_table import classes_of
from swinv2_train.report.html import esc, folded, page_html, section
from swinv2_train.report.object_tables import objects_of
from swinv2_train.report.run_charts import PROBES, charts_of, metric_names, metric_words, write_curves
from swinv2_train.report.run_pictures import pictures_of
from swinv2_train.report.run_record import RunRecord, find_parent, read_run_record, state_of
from swinv2_train.storage.atomic import replace_text

# Shown in the tiles at the top, in this order, as far as the run has them: name, label, unit, decimals.
TILES = (
    ("val/top1", "top-1 accuracy", "%", 2),
    ("val/top5", "top-5 accuracy", "%", 2),
    ("val/miou", "mean IoU", "%", 2),
    ("val/box_ap", "box AP", "%", 2),
    ("val/mask_ap", "mask AP", "%", 2),
    ("val_ema/top1", "top-1 accuracy, averaged weights", "%", 2),
    ("probe/knn_top1", "k-NN top-1, frozen encoder", "%", 2),
    ("probe/linear_top1", "linear top-1, frozen encoder", "%", 2),
    ("val/loss", "validation loss", "", 4),
    ("train/loss", "training loss", "", 4),
    ("perf/images_per_sec", "throughput", "images/s", 0),
    ("mem/peak_gib", "peak memory", "GiB", 2),
)


def write_report(run_dir: Path, total_steps: int | None = None, curves: bool = True) -> Path:
    """Write RUN_DIR/report.html (and the loss curves as pictures/curves.png) and return its path.  Rank 0 calls it.

    total_steps: planned optimizer steps; None = train.max_steps of config.yaml (a run by epochs then shows no target).
    curves: also draw the picture, for which matplotlib is imported.
    """
    run = read_run_record(run_dir)
    path = run_dir / "report.html"
    replace_text(path, page_of(run, total_steps))
    if curves:
        write_curves(run)
    return path


def page_of(run: RunRecord, total_steps: int | None = None) -> str:
    """The page of a run.  total_steps: as write_report's."""
    parent_dir = find_parent(run)
    parent = read_run_record(parent_dir) if parent_dir is not None else None
    name = run.run_dir.resolve().name
    sections = [
        _header(run, total_steps),
        _tiles(run),
        section("What the frozen encoder was worth", _before_and_after(run)),
        section("Curves", charts_of(run)),
        section("Sources", _sources(run)),
        section("Ranks", _ranks(run)),
        section("Pictures", pictures_of(run)),
        section("Classes", classes_of(run.run_dir)),
        section("Objects", objects_of(run.run_dir)),
        _parent_section(parent) if parent is not None else "",
        section("Metrics", _metrics_table(run)),
        section("Configuration", folded("config.yaml", run.config_text)),
        section("Environment", _environment(run)),
    ]
    return page_html(f"{name}: training report", "".join(sections))


def _header(run: RunRecord, total_steps: int | None) -> str:
    images = run.metrics[-1].get("images_seen") if run.metrics else None
    state, text = state_of(run, total_steps)
    facts = [f"{images:,} images seen" if isinstance(images, int) else ""]
    classes = read_run_classes(run.run_dir)
    facts.append(f"{len(classes)} classes ({listed(classes)})" if classes else "")
    seconds = _training_seconds(run)
    facts.append(f"{duration_text(seconds)} in training steps" if seconds else "")
    if run.starts:
        start = run.starts[-1]
        facts.append(_plural(start.get("world_size"), "rank") + (f" on {_hardware(start)}" if _hardware(start) else ""))
        facts.append(f"started {len(run.starts)} times" if len(run.starts) > 1 else "")
        facts.append(f"first started {str(run.starts[0].get('started_at', ''))[:16].replace('T', ' ')} UTC")
    slow = run.starts[-1].get("start", {}).get("slow_bf16") if run.starts else None
    setup = [
        run.value("task", "name"),
        f"SwinV2 {run.value('model', 'name')}" if run.value("model", "name") else None,
        f"{_size_text(run.value('model', 'img_size'))} px" if run.value("model", "img_size") else None,
        _engine_text(run),
        f"batch {run.value('train', 'global_batch_size')}" if run.value("train", "global_batch_size") else None,
    ]
    return (
        f'<header><h1>{esc(run.run_dir.resolve().name)} <span class="state {state}">{esc(text)}</span></h1>'
        f"<p>{esc(' · '.join(str(part) for part in setup if part))}</p>"
        f'<p class="soft">{esc(" · ".join(fact for fact in facts if fact))}</p>'
        + (f"<p>{esc(str(run.status.get('reason')))}</p>" if state == "failed" and run.status.get("reason") else "")
        + (f"<p>Slow: {esc(str(slow))}</p>" if slow else "")
        + "</header>"
    )


def _tiles(run: RunRecord) -> str:
    tiles = []
    for name, label, unit, decimals in TILES:
        latest = run.latest(name)
        if latest is None:
            continue
        step, value = latest
        if name == "perf/images_per_sec":  # one reading is noise: the median over the run
            values = sorted(v for v in run.curve(name)[1] if math.isfinite(v))
            value = values[len(values) // 2]
        tiles.append(
            f'<div class="tile"><div class="soft">{esc(label)}</div><div class="big">{value:,.{decimals}f}'
            f'<small> {esc(unit)}</small></div><div class="soft small">'
            f"{'median of the run' if name.startswith('perf/') else f'step {step:,}'}</div></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _before_and_after(run: RunRecord) -> str:
    """The probes of the weights that the run started from beside the newest; "" for a run without the first."""
    rows, steps = [], set()
    for name, label in PROBES:
        first = next(iter(zip(*run.curve(name), strict=True)), None)
        latest = run.latest(name)
        if first is None or first[0] != 0 or latest is None or latest[0] == 0 or not math.isfinite(first[1]):
            continue
        steps.add(latest[0])
        rows.append((label, f"{first[1]:.2f} %", f"{latest[1]:.2f} %", f"{latest[1] - first[1]:+.2f}"))
    texts = [str(start.get("start", {}).get("initial_weights", "")) for start in run.starts]
    started = folded("Weights that the run started from", next(filter(None, texts), ""))
    if not rows:
        return started
    last = " and ".join(f"{step:,}" for step in sorted(steps))
    head = f"<tr><th></th><th>before the first step</th><th>after step {last}</th><th>difference</th></tr>"
    body = "".join("<tr><td>" + "</td><td>".join(map(esc, row)) + "</td></tr>" for row in rows)
    return f'<table class="numbers">{head}{body}</table>{started}'


def _sources(run: RunRecord) -> str:
    """What each source of a mixture has contributed."""
    names = [name.split("/")[1] for name in metric_names(run) if re.fullmatch(r"mix/[^/]+/images", name)]
    latest = {name: run.latest(f"mix/{name}/images") for name in names}
    images = {name: found[1] for name, found in latest.items() if found is not None}
    total = sum(images.values())
    rows = ""
    for name, count in images.items():
        passes, loss = run.latest(f"mix/{name}/passes"), run.latest(f"mix/{name}/loss")
        cells = (
            name,
            f"{100 * count / total:.2f} %" if total else "–",
            f"{count:,.0f}",
            value_text(passes[1] if passes else None),
            value_text(loss[1] if loss else None),
        )
        rows += "<tr><td>" + "</td><td>".join(map(esc, cells)) + "</td></tr>"
    head = "<tr><th>source</th><th>share</th><th>images so far</th><th>passes over it</th><th>training loss</th></tr>"
    return f'<table class="numbers">{head}{rows}</table>' if rows else ""


def _ranks(run: RunRecord) -> str:
    """How often the others waited for each rank: a curve through ranks' numbers would say nothing."""
    numbers = [int(value) for value in run.curve("perf/slowest_rank")[1] if math.isfinite(value)]
    if not numbers:
        return ""
    counts = Counter(numbers).most_common(16)
    rows = "".join(
        f'<tr><td>rank {rank}</td><td>{100 * count / len(numbers):.0f} %</td><td><div class="bar" style="width:'
        f'{240 * count / counts[0][1]:.0f}px"></div></td></tr>'
        for rank, count in counts
    )
    return f"<p>Which rank the others waited for, of {len(numbers):,} logged steps:</p><table>{rows}</table>"


def _parent_section(parent: RunRecord) -> str:
    name = parent.run_dir.resolve().name
    step = parent.metrics[-1]["step"] if parent.metrics else 0
    task = str(parent.value("task", "name") or "pre-training")
    intro = f"<p>This run started from the weights of <b>{esc(name)}</b> ({esc(task)}, {step:,} steps).</p>"
    return section(f"Before: {name}", intro + pictures_of(parent) + charts_of(parent, only=1))


def _metrics_table(run: RunRecord) -> str:
    rows = []
    for name in sorted({key for line in run.metrics for key in line} - {"step"}):
        latest = run.latest(name)
        finite = [v for v in run.curve(name)[1] if math.isfinite(v)]
        if latest is None:
            rows.append((metric_words(name), name, "–", "", "", ""))
        else:
            rows.append(
                (
                    metric_words(name),
                    name,
                    value_text(latest[1]),
                    f"{latest[0]:,}",
                    value_text(min(finite)),
                    value_text(max(finite)),
                )
            )
    body = "".join("<tr><td>" + "</td><td>".join(map(esc, row)) + "</td></tr>" for row in rows)
    head = "<tr><th>what</th><th>metric</th><th>last</th><th>at step</th><th>lowest</th><th>highest</th></tr>"
    return f'<div class="wide"><table class="numbers">{head}{body}</table></div>' if rows else ""


def _environment(run: RunRecord) -> str:
    if not run.starts:
        return ""
    rows = "".join(
        f"<tr><td>{esc(key.replace('_', ' '))}</td><td>{_environment_value(value)}</td></tr>"
        for key, value in run.starts[-1].items()
    )
    earlier = "".join(f"<li>{esc(_start_text(start))}</li>" for start in run.starts)
    starts = f"<details><summary>All {len(run.starts)} starts</summary><ul>{earlier}</ul></details>"
    return (
        f'<details><summary>Versions and hardware of the last start</summary><div class="wide"><table>{rows}</table>'
        f"</div></details>{starts if len(run.starts) > 1 else ''}"
    )


def _start_text(start: Mapping[str, Any]) -> str:
    return f"{start.get('started_at')}: {_plural(start.get('world_size'), 'rank')} on {start.get('hostname')}"


def _environment_value(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, Mapping):
        return "<br>".join(f"{esc(str(k))} {_inner_value(v)}" for k, v in value.items())
    if isinstance(value, list):
        return esc(" ".join(" ".join(map(str, v.values())) if isinstance(v, Mapping) else str(v) for v in value))
    return esc(str(value))


def _inner_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return esc("; ".join(f"{key}: {'–' if each is None else each}" for key, each in value.items()))
    return esc("–" if value is None else str(value))


def _training_seconds(run: RunRecord) -> float:
    """Steps times their measured duration: a log line speaks for all steps since the line before."""
    total, before = 0.0, 0
    for line in run.metrics:
        seconds = line.get("perf/step_sec")
        if isinstance(seconds, int | float):
            total += seconds * (line["step"] - before)
            before = line["step"]
    return total


def _hardware(start: Mapping[str, Any]) -> str:
    gpus = start.get("gpus") or []
    if gpus:
        return f"{len(gpus)} x {gpus[0].get('name')} per host"
    return f"{start.get('cpu_cores')} CPU cores" if start.get("cpu_cores") else ""


def _engine_text(run: RunRecord) -> str | None:
    name, precision = run.value("engine", "name"), run.value("engine", "precision")
    if name == "deepspeed":
        name = f"DeepSpeed ZeRO-{run.value('engine', 'zero_stage')}"
    return " ".join(part for part in (name, precision) if part) or None


def _size_text(size: Any) -> str:
    return " x ".join(str(side) for side in size) if isinstance(size, list) else str(size)


def _plural(count: Any, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
