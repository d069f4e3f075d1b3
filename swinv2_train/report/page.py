"""The page a person looks at after (or during) a run: RUN_DIR/report.html, one file without any outside request.

It reads only what lies in the run directory (config.yaml, environment.json, metrics.jsonl, pictures/), so it can be
written again at any time and on any machine; of a fine-tuning run it also shows the pre-training run it came from.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import socket
import stat
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.config.saved import CONFIG_NAME, parse_saved_config, read_config_text
from swinv2_train.config.secret_texts import public, without_secrets
from swinv2_train.data.class_names import listed, read_run_classes
from swinv2_train.monitoring.console import duration_text
from swinv2_train.monitoring.run_log import UNFINISHED, read_metrics
from swinv2_train.monitoring.watchdog import MOST_SIGN_BYTES, SIGN_FIELDS, STATUS, process_ended
from swinv2_train.report.charts import CHART_CSS, CHART_JS, Series, chart, escaped, value_text
from swinv2_train.report.class_table import FOLDER, class_rows
from swinv2_train.report.plots import draw_curves, plots_problem
from swinv2_train.runtime import read_environment
from swinv2_train.storage.atomic import replace_text
from swinv2_train.storage.json_files import number, optional, read_json, record, whole

_CURVES_PNG = "curves.png"
_MAX_PICTURE_BYTES = 400_000
_MAX_PICTURE_PX = 1600
_LARGEST_PICTURE_BYTES, _LARGEST_PICTURE_PX = 2**26, 2**26
"""Of a picture that is read at all."""
_MOST_TEXT, _MOST_FOLDED = 2000, 100_000
"""Characters of one piece of text on the page, and of one that is folded away."""

_LOSSES = (("train/loss", "train"), ("val/loss", "validation"), ("val_ema/loss", "validation, averaged weights"))
_ACCURACIES = (
    *(("val/top1", "top-1"), ("val/top5", "top-5")),
    *(("val_ema/top1", "top-1, averaged weights"), ("val_ema/top5", "top-5, averaged weights")),
)
_PROBES = (
    *(("probe/knn_top1", "k-NN top-1"), ("probe/knn_top5", "k-NN top-5")),
    *(("probe/linear_top1", "linear top-1"), ("probe/linear_top5", "linear top-5")),
)
_TIMES = (
    *(("perf/step_sec", "step"), ("data/wait_sec", "of it waiting for data")),
    ("perf/own_step_sec", "the slowest rank's own work"),
)
# (title, unit, from zero, smoothed, names with their labels).  What is not named here gets a chart of its own.
CHARTS: tuple[tuple[str, str, bool, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "", False, True, _LOSSES),
    ("Accuracy", "%", False, False, _ACCURACIES),
    ("Accuracy of the frozen encoder", "%", False, False, _PROBES),
    ("Learning rate", "", True, False, (("train/lr", "lr"),)),
    ("Gradient norm", "before clipping", True, True, (("train/grad_norm", "norm"),)),
    ("Throughput", "images/s", True, False, (("perf/images_per_sec", "images/s"),)),
    ("Time per step", "s", True, False, _TIMES),
    ("Peak memory", "GiB", True, False, (("mem/peak_gib", "peak"),)),
    ("Model FLOP utilisation", "share of peak", True, False, (("perf/mfu", "MFU"),)),
    ("Steps not taken", "so far", True, False, (("train/skipped_steps", "skipped"),)),
)
# Shown in the tiles at the top, in this order, as far as the run has them: name, label, unit, decimals.
TILES = (
    ("val/top1", "top-1 accuracy", "%", 2),
    ("val/top5", "top-5 accuracy", "%", 2),
    ("val_ema/top1", "top-1 accuracy, averaged weights", "%", 2),
    ("probe/knn_top1", "k-NN top-1, frozen encoder", "%", 2),
    ("probe/linear_top1", "linear top-1, frozen encoder", "%", 2),
    ("val/loss", "validation loss", "", 4),
    ("train/loss", "training loss", "", 4),
    ("perf/images_per_sec", "throughput", "images/s", 0),
    ("mem/peak_gib", "peak memory", "GiB", 2),
)
_NO_CHART = {
    "step", "images_seen", "data/skipped_images", "checkpoint/stall_sec", "perf/slowest_rank", UNFINISHED,
}  # fmt: skip
_WORDS = {
    "images_seen": "images seen", "data/skipped_images": "damaged images left out", "checkpoint/stall_sec":
    "seconds that a checkpoint held training up", "perf/slowest_rank": "rank that the others waited for", UNFINISHED:
    "evaluation cut short by a stop",
}  # fmt: skip
_STATUS = record({**SIGN_FIELDS, "heartbeat_sec": number(0)}, may={"total_steps": optional(whole())})


@dataclass(frozen=True)
class RunRecord:
    """What a run directory tells about its run.  Everything may be empty: a run can be read at any moment."""

    run_dir: Path
    config: Mapping[str, Any]
    config_text: str
    starts: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, Sequence[tuple[int, Path]]]
    """Name -> (step, file) in order of steps."""
    status: Mapping[str, Any]
    """Of status.json: what the run does, or how it ended."""

    def value(self, *keys: str) -> Any:
        """A value of the configuration, None when it is not there."""
        node: Any = self.config
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; nan where it was written as null."""
        lines = [line for line in self.metrics if name in line and _is_number_or_null(line[name])]
        return [line["step"] for line in lines], [math.nan if line[name] is None else line[name] for line in lines]

    def latest(self, name: str) -> tuple[int, float] | None:
        """Step and value of the newest finite entry of a metric."""
        steps, values = self.curve(name)
        return next(((s, v) for s, v in zip(reversed(steps), reversed(values), strict=True) if math.isfinite(v)), None)


def read_run_record(run_dir: Path) -> RunRecord:
    """Read a run directory as far as it goes; what is missing stays empty."""
    config_path = run_dir / CONFIG_NAME
    text = read_config_text(config_path) if os.path.lexists(config_path) else ""
    config: Any = OmegaConf.to_container(parse_saved_config(text, str(config_path)))
    pictures: dict[str, list[tuple[int, Path]]] = {}
    folder = run_dir / "pictures"
    for path in sorted(folder.glob("*.png")) if not folder.is_symlink() else ():  # a link may lead to anybody's files
        found = re.fullmatch(r"(.{1,100})_([0-9]{1,18})", path.stem)
        if found and path.name != _CURVES_PNG and stat.S_ISREG(path.lstat().st_mode):
            pictures.setdefault(found.group(1), []).append((int(found.group(2)), path))
    return RunRecord(
        run_dir=run_dir,
        config=config if isinstance(config, dict) else {},
        config_text=without_secrets(text),  # an older run's has them
        starts=public(read_environment(run_dir)),
        metrics=read_metrics(run_dir),
        pictures={name: sorted(files) for name, files in pictures.items()},
        status=_read_status(run_dir),
    )


def _read_status(run_dir: Path) -> Mapping[str, Any]:
    try:
        status: Mapping[str, Any] = read_json(run_dir / STATUS, MOST_SIGN_BYTES, _STATUS)
    except (OSError, ConfigError):
        return {}
    return status


def find_parent(run: RunRecord) -> Path | None:
    """Directory of the run whose weights this one started from (task.init_from), when it is still there.

    init_from may name the run, one of its checkpoints or a file in it; a run that was moved is looked for beside
    this one.
    """
    init_from = run.value("task", "init_from")
    if not init_from:
        return None
    named = Path(str(init_from))
    beside = run.run_dir.resolve().parent
    for candidate in (named, *list(named.parents)[:3]):
        for path in (candidate, beside / candidate.name):
            is_run = any(os.path.exists(path / name) for name in ("metrics.jsonl", CONFIG_NAME))
            if candidate.name and is_run and path.resolve() != run.run_dir.resolve():
                return path
    return None


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
        _section("What the frozen encoder was worth", _before_and_after(run)),
        _section("Curves", _charts(run)),
        _section("Sources", _sources(run)),
        _section("Ranks", _ranks(run)),
        _section("Pictures", _pictures(run)),
        _section("Classes", _classes(run)),
        _parent_section(parent) if parent is not None else "",
        _section("Metrics", _metrics_table(run)),
        _section("Configuration", _folded("config.yaml", run.config_text)),
        _section("Environment", _environment(run)),
    ]
    return page_html(f"{name}: training report", "".join(sections))


def page_html(title: str, body: str) -> str:
    """A whole page, its looks and scripts within it."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_esc(title)}</title><style>{_PAGE_CSS}{CHART_CSS}</style></head><body><main>{body}"
        f"</main><script>{CHART_JS}</script></body></html>\n"
    )


def state_of(run: RunRecord, total_steps: int | None) -> tuple[str, str]:
    """How a run stands, as a class of the page's looks and in words: running, stopped, failed, complete, ...

    total_steps: planned optimizer steps; None = those that status.json or train.max_steps say.
    """
    status, planned = run.status, run.value("train", "max_steps")
    known = (total_steps, status.get("total_steps"), planned)
    total = next((each for each in known if isinstance(each, int)), None)
    step = run.metrics[-1]["step"] if run.metrics else 0
    where = "before the first step" if not run.metrics else f"at step {step:,}" + (f" of {total:,}" if total else "")
    state = status.get("state")
    if state == "failed":
        return "failed", f"failed {where}"
    if state == "stopped":
        return "open", f"stopped {where}"
    if state == "running" and not (total and step >= total and _lost(status)):
        return ("failed", f"ended without a word {where}") if _lost(status) else ("open", f"running, {where}")
    if not run.metrics:
        return "idle", "no step logged yet"
    return ("done", f"complete: {step:,} steps") if total is not None and step >= total else ("open", where)


def _lost(status: Mapping[str, Any]) -> bool:
    """Whether what should be running is no more; on another host, whether it was not heard of for long."""
    if status["host"] == socket.gethostname():
        return process_ended(status["pid"])
    return bool(time.time() - status["updated_at"] > 6 * status["heartbeat_sec"] + 60)


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
    return draw_curves(panels, run.run_dir / "pictures" / _CURVES_PNG)


# --------------------------------------------------------------------------------------------------------------------
# Parts of the page


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
        f'<header><h1>{_esc(run.run_dir.resolve().name)} <span class="state {state}">{_esc(text)}</span></h1>'
        f"<p>{_esc(' · '.join(str(part) for part in setup if part))}</p>"
        f'<p class="soft">{_esc(" · ".join(fact for fact in facts if fact))}</p>'
        + (f"<p>{_esc(str(run.status.get('reason')))}</p>" if state == "failed" and run.status.get("reason") else "")
        + (f"<p>Slow: {_esc(str(slow))}</p>" if slow else "")
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
            f'<div class="tile"><div class="soft">{_esc(label)}</div><div class="big">{value:,.{decimals}f}'
            f'<small> {_esc(unit)}</small></div><div class="soft small">'
            f"{'median of the run' if name.startswith('perf/') else f'step {step:,}'}</div></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _before_and_after(run: RunRecord) -> str:
    """The probes of the weights that the run started from beside the newest; "" for a run without the first."""
    rows, steps = [], set()
    for name, label in _PROBES:
        first = next(iter(zip(*run.curve(name), strict=True)), None)
        latest = run.latest(name)
        if first is None or first[0] != 0 or latest is None or latest[0] == 0 or not math.isfinite(first[1]):
            continue
        steps.add(latest[0])
        rows.append((label, f"{first[1]:.2f} %", f"{latest[1]:.2f} %", f"{latest[1] - first[1]:+.2f}"))
    texts = [str(start.get("start", {}).get("initial_weights", "")) for start in run.starts]
    started = _folded("Weights that the run started from", next(filter(None, texts), ""))
    if not rows:
        return started
    last = " and ".join(f"{step:,}" for step in sorted(steps))
    head = f"<tr><th></th><th>before the first step</th><th>after step {last}</th><th>difference</th></tr>"
    body = "".join("<tr><td>" + "</td><td>".join(map(_esc, row)) + "</td></tr>" for row in rows)
    return f'<table class="numbers">{head}{body}</table>{started}'


def _charts(run: RunRecord, only: int | None = None) -> str:
    """The charts of a run; `only`: how many are in sight, the others folded away."""
    charts, named = [], set(_NO_CHART)
    x_range = (0, run.metrics[-1]["step"]) if len(run.metrics) > 1 else None
    for title, unit, from_zero, smooth, names in CHARTS:
        named |= {name for name, _ in names}
        series = [Series(label, *run.curve(name), smooth=smooth) for name, label in names]
        charts.append(chart(title, series, unit=unit, from_zero=from_zero, x_range=x_range))
    of_sources = [name for name in _metric_names(run) if name.startswith("mix/")]
    named |= set(of_sources)
    series = [
        Series(name.split("/")[1], *run.curve(name), smooth=True) for name in of_sources if name.endswith("/loss")
    ]
    charts.append(chart("Loss of each source", series, x_range=x_range))
    for name in sorted(set(_metric_names(run)) - named):
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


def _metric_names(run: RunRecord) -> list[str]:
    return sorted({key for line in run.metrics for key in line})


def _sources(run: RunRecord) -> str:
    """What each source of a mixture has contributed."""
    names = [name.split("/")[1] for name in _metric_names(run) if re.fullmatch(r"mix/[^/]+/images", name)]
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
        rows += "<tr><td>" + "</td><td>".join(map(_esc, cells)) + "</td></tr>"
    head = "<tr><th>source</th><th>share</th><th>images so far</th><th>passes over it</th><th>training loss</th></tr>"
    return f'<table class="numbers">{head}{rows}</table>' if rows else ""


def metric_words(name: str) -> str:
    """A metric's name as a person reads it: train/loss -> Loss, train; data/queue_sec -> data: queue, s."""
    for title, _, _, _, names in CHARTS:
        if name in dict(names):
            return title if len(names) == 1 else f"{title}, {dict(names)[name]}"
    group, _, rest = name.rpartition("/")
    words = rest.removesuffix("_sec").replace("_", " ") + (", s" if rest.endswith("_sec") else "")
    return _WORDS.get(name, f"{group.replace('_', ' ')}: {words}" if group else words)


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


def _pictures(run: RunRecord) -> str:
    parts = []
    for name, files in run.pictures.items():
        step, newest = files[-1]
        parts.append(_figure(newest, f"{name}, step {step:,}"))
        earlier = _spread(files[:-1], 5)
        if earlier:
            shown = "".join(_figure(path, f"step {at:,}") for at, path in earlier)
            parts.append(f"<details><summary>{_esc(name)} at earlier steps</summary>{shown}</details>")
    return "".join(parts)


def _classes(run: RunRecord) -> str:
    """Of pixels, as the evaluate command found them with out=RUN_DIR/evaluation."""
    rows = class_rows(run.run_dir)
    if not rows:
        return ""
    cells = [
        (row.name, *("–" if share is None else f"{share:.2f}" for share in (row.iou, row.accuracy)), f"{row.pixels:,}")
        for row in rows
    ]
    body = "".join("<tr><td>" + "</td><td>".join(map(_esc, each)) + "</td></tr>" for each in cells)
    head = "<tr><th>class</th><th>IoU, %</th><th>accuracy, %</th><th>pixels</th></tr>"
    table = f'<div class="wide"><table class="numbers">{head}{body}</table></div>'
    return table + _figure(run.run_dir / FOLDER / "confusion.png", "which class is taken for which")


def _figure(path: Path, caption: str) -> str:
    try:
        source = _data_uri(path)
    except (OSError, ValueError, SyntaxError, ConfigError, Warning) as error:  # Pillow's too; the page does without
        return f'<p class="soft">{_esc(f"{path.name} cannot be shown: {error}")}</p>'
    return (
        f'<figure class="picture"><img src="{source}" alt="{_esc(caption)}">'
        f"<figcaption>{_esc(caption)}</figcaption></figure>"
    )


def _data_uri(path: Path) -> str:
    """The picture itself; a large one is made smaller and turned into JPEG first, so that the page stays a page."""
    data, kind = read_bytes(path, _LARGEST_PICTURE_BYTES), "png"
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG file")
    if len(data) > _MAX_PICTURE_BYTES:
        from PIL import Image

        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > _LARGEST_PICTURE_PX:
                raise ValueError(f"{image.width} x {image.height} pixels")
            small = image.convert("RGB")
        small.thumbnail((_MAX_PICTURE_PX, 4 * _MAX_PICTURE_PX))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _parent_section(parent: RunRecord) -> str:
    name = parent.run_dir.resolve().name
    step = parent.metrics[-1]["step"] if parent.metrics else 0
    task = str(parent.value("task", "name") or "pre-training")
    intro = f"<p>This run started from the weights of <b>{_esc(name)}</b> ({_esc(task)}, {step:,} steps).</p>"
    return _section(f"Before: {name}", intro + _pictures(parent) + _charts(parent, only=1))


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
    body = "".join("<tr><td>" + "</td><td>".join(map(_esc, row)) + "</td></tr>" for row in rows)
    head = "<tr><th>what</th><th>metric</th><th>last</th><th>at step</th><th>lowest</th><th>highest</th></tr>"
    return f'<div class="wide"><table class="numbers">{head}{body}</table></div>' if rows else ""


def _environment(run: RunRecord) -> str:
    if not run.starts:
        return ""
    rows = "".join(
        f"<tr><td>{_esc(key.replace('_', ' '))}</td><td>{_environment_value(value)}</td></tr>"
        for key, value in run.starts[-1].items()
    )
    earlier = "".join(f"<li>{_esc(_start_text(start))}</li>" for start in run.starts)
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
        return "<br>".join(f"{_esc(str(k))} {_inner_value(v)}" for k, v in value.items())
    if isinstance(value, list):
        return _esc(" ".join(" ".join(map(str, v.values())) if isinstance(v, Mapping) else str(v) for v in value))
    return _esc(str(value))


def _inner_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return _esc("; ".join(f"{key}: {'–' if each is None else each}" for key, each in value.items()))
    return _esc("–" if value is None else str(value))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_esc(title)}</h2>{body}</section>" if body else ""


def _folded(title: str, text: str) -> str:
    shown = escaped(text, _MOST_FOLDED, lines=True)
    return f"<details><summary>{_esc(title)}</summary><pre>{shown}</pre></details>" if text else ""


# --------------------------------------------------------------------------------------------------------------------
# Words and numbers


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


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly taken from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def escaped_text(text: str) -> str:
    """Text in which no character is markup."""
    return _esc(text)


def _esc(text: str) -> str:
    return escaped(text, _MOST_TEXT)


_PAGE_CSS = """
:root{--page:#f6f7f9;--card:#fff;--text:#1c2430;--soft:#667085;--edge:#e3e6eb;--good:#177245;--bad:#b42318;--wait:#9a6700}
@media (prefers-color-scheme:dark){
:root{--page:#12161c;--card:#1a2028;--text:#e4e8ee;--soft:#98a2b3;--edge:#2c3440;--good:#67c893;--bad:#f97066;--wait:#e2b340}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;margin:34px 0 12px}
p{margin:2px 0}
header p{overflow-wrap:anywhere}
.soft{color:var(--soft)}.small{font-size:12px}
.state{display:inline-block;font-size:13px;font-weight:600;padding:2px 10px;border-radius:99px;
border:1px solid currentColor;vertical-align:4px;white-space:nowrap;color:var(--wait)}
.state.done{color:var(--good)}.state.idle{color:var(--soft)}.state.failed{color:var(--bad)}
.bar{height:12px;border-radius:3px;background:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:12px;margin-top:20px}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:10px 14px}
.tile .soft{font-size:13px}
.big{font-size:25px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.big small{font-size:13px;font-weight:400;color:var(--soft)}
.picture{margin:0 0 14px}
.picture img{display:block;max-width:100%;height:auto;border:1px solid var(--edge);border-radius:8px;background:#fff}
.picture figcaption{font-size:13px;color:var(--soft);margin-top:4px}
details{margin:0 0 14px}
details>*:not(summary){margin-top:10px}
summary{cursor:pointer;padding:8px 0}
pre{margin:0;padding:12px 14px;overflow-x:auto;font-size:13px;line-height:1.45;
background:var(--card);border:1px solid var(--edge);border-radius:8px}
.wide{overflow-x:auto}
table{border-collapse:collapse;background:var(--card);border:1px solid var(--edge);border-radius:8px;font-size:14px}
td,th{padding:5px 14px;border-top:1px solid var(--edge);text-align:left;vertical-align:top}
tr:first-child>*{border-top:0}
th{font-weight:600;color:var(--soft);font-size:13px}
.numbers td:nth-child(n+3),.numbers th:nth-child(n+3){
text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
"""
