"""report.html: one self-contained page from whatever a run directory holds, and the charts in it."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import socket
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swinv2_train.config import ConfigError
from swinv2_train.report import charts
from swinv2_train.report.charts import Series, chart, nice_ticks, running_mean, tick_text, value_text
from swinv2_train.report.page import write_report
from swinv2_train.report.plots import draw_curves
from swinv2_train.report.run_record import find_parent, read_run_record
from swinv2_train.runtime import record_environment

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The text and the links of a page; fails when a tag is not closed by its own end tag."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[str] = []
        self.charts: list[dict] = []
        self.links: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values["src"] or "")
        if "data-chart" in values:
            self.charts.append(json.loads(values["data-chart"] or ""))
        self.links += [values[name] or "" for name in ("href", "src", "action") if name in values]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


def make_run(run_dir: Path, steps: int = 100, val: bool = False, max_steps: int | None = None, init_from: str = "null"):
    (run_dir / "pictures").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(
        f"train: {{max_steps: {max_steps or steps}, global_batch_size: 64}}\n"
        f"model: {{name: demo, img_size: 32}}\ntask: {{name: simmim, init_from: {init_from}}}\n"
        "engine: {name: deepspeed, zero_stage: 3, precision: bf16}\nnote: <b>not bold</b>\n"
    )
    record_environment(run_dir, world_size=2)
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            values = {"train/loss": 2 / step, "train/lr": 1e-3, "train/grad_norm": 1.0, "perf/mfu": None}
            values |= {"perf/images_per_sec": 800.0, "perf/step_sec": 0.5, "mem/peak_gib": 1.5}
            file.write(json.dumps({"step": step, "images_seen": step * 64, **values}) + "\n")
        if val:
            scores = {"val/loss": 0.5, "val/top1": 65.4321, "val/top5": 97.5}
            file.write(json.dumps({"step": steps, "images_seen": steps * 64, **scores}) + "\n")


def add_picture(run_dir: Path, step: int, value: int = 100, size: int = 16) -> None:
    pixels = np.full((size, size, 3), value, np.uint8)
    Image.fromarray(pixels).save(run_dir / "pictures" / f"reconstruction_{step:08d}.png")


def test_page_shows_status_numbers_curves_pictures_config_and_environment(tmp_path: Path) -> None:
    run_dir = tmp_path / "pretrain"
    make_run(run_dir, val=True)
    for step in (50, 100):
        add_picture(run_dir, step)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text())
    for expected in (
        "pretrain", "complete: 100 steps", "6,400 images seen", "0:50 in training steps", "2 ranks",
        "DeepSpeed ZeRO-3 bf16", "top-1 accuracy 65.43", "97.50", "Learning rate", "Gradient norm", "Throughput",
        "Peak memory", "reconstruction, step 100", "reconstruction at earlier steps", "step 50", "val/top1",
        "zero_stage: 3", "deepspeed",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert len(page.images) == 2
    assert len(page.charts) == 7
    loss = next(chart for chart in page.charts if [line["label"] for line in chart["lines"]] == ["train", "validation"])
    assert loss["lines"][1] == {"label": "validation", "x": [100], "y": [0.5]}


def test_page_asks_nothing_of_the_outside(tmp_path: Path) -> None:
    """It is mailed around and opened from disk, on clusters without a network."""
    run_dir = tmp_path / "run"
    make_run(run_dir, val=True)
    add_picture(run_dir, 100)
    source = write_report(run_dir).read_text()
    page = Page(source)
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert not re.search(
        r"https?://|@import|url\((?!#)|fetch\(|XMLHttp", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", source)
    )
    kind, _, data = page.images[0].partition(";base64,")
    assert kind == "data:image/png"
    assert base64.b64decode(data) == (run_dir / "pictures" / "reconstruction_00000100.png").read_bytes()


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    run_dir = tmp_path / "a<i>b"
    make_run(run_dir)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 100, "images_seen": 6400, "<script>x": 1.0}\n')
    page = Page(write_report(run_dir).read_text())
    assert "a<i>b" in page.text and "<b>not bold</b>" in page.text and "<script>x" in page.text


@pytest.mark.parametrize("lines", [0, 1])
def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path, lines: int) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, steps=lines, max_steps=500)
    page = Page(write_report(run_dir).read_text())
    assert ("no step logged yet" if lines == 0 else "at step 1 of 500") in page.text
    assert page.images == []


def test_an_empty_directory_has_a_page(tmp_path: Path) -> None:
    assert "no step logged yet" in Page(write_report(tmp_path).read_text()).text


def test_an_interrupted_run_says_where_it_stands(tmp_path: Path) -> None:
    """A torn line and null values of a stopped run do not stop its report."""
    run_dir = tmp_path / "run"
    make_run(run_dir, steps=40, max_steps=1000)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "images_seen": 2624, "train/loss": null, "train/grad_norm": null}\n{"step": 42, "im')
    page = Page(write_report(run_dir).read_text())
    assert "at step 41 of 1,000" in page.text
    assert "training loss 0.0500 step 40" in page.text  # the last finite one


def test_the_target_of_a_run_by_epochs_is_given_by_the_caller(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, steps=30)
    config = (run_dir / "config.yaml").read_text().replace("max_steps: 30", "max_steps: null, epochs: 2")
    (run_dir / "config.yaml").write_text(config)
    assert "at step 30 " in Page(write_report(run_dir).read_text()).text
    assert "complete: 30 steps" in Page(write_report(run_dir, total_steps=30).read_text()).text


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file", "moved"])
def test_a_fine_tuning_run_shows_the_run_it_came_from(tmp_path: Path, kind: str) -> None:
    parent, child = tmp_path / "pretrain", tmp_path / "finetune"
    named = {
        "run": parent,
        "checkpoint": parent / "checkpoints" / "step_00000100",
        "file": parent / "checkpoints" / "step_00000100" / "weights.safetensors",
        "moved": Path("/nowhere/any/more/pretrain"),
    }[kind]
    make_run(parent)
    add_picture(parent, 100)
    make_run(child, init_from=str(named))
    found = find_parent(read_run_record(child))
    assert found is not None and found.resolve() == parent.resolve()
    page = Page(write_report(child).read_text())
    assert "Before: pretrain" in page.text and "started from the weights of pretrain" in page.text
    assert len(page.images) == 1


@pytest.mark.parametrize("init_from", ["null", "/nowhere/at/all", "official.safetensors", "."])
def test_without_a_run_to_come_from_there_is_no_such_section(tmp_path: Path, init_from: str) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, init_from=init_from)
    assert find_parent(read_run_record(run_dir)) is None
    assert "Before:" not in Page(write_report(run_dir).read_text()).text


def test_a_huge_picture_is_made_smaller_and_many_are_thinned(tmp_path: Path) -> None:
    """800 pictures of 2 MB each would be no page."""
    run_dir = tmp_path / "run"
    make_run(run_dir)
    noise = np.random.default_rng(0).integers(0, 256, (600, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run_dir / "pictures" / "big_00000100.png")
    for step in range(1, 41):
        add_picture(run_dir, step)
    page = Page(write_report(run_dir).read_text())
    assert len(page.images) == 1 + 1 + 5
    big = next(image for image in page.images if image.startswith("data:image/jpeg"))
    assert len(big) < 0.6 * len(base64.b64encode((run_dir / "pictures" / "big_00000100.png").read_bytes()))


def test_curves_are_written_as_a_picture_too_and_do_not_enter_the_page(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, val=True)
    for _ in range(2):
        page = Page(write_report(run_dir).read_text())
        assert page.images == []
    with Image.open(run_dir / "pictures" / "curves.png") as picture:
        assert picture.width > picture.height >= 300


def test_without_matplotlib_the_page_is_written_and_the_picture_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an extra, and the page draws its own charts."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make_run(tmp_path / "run", val=True)
    assert "<svg" in write_report(tmp_path / "run").read_text()
    assert not (tmp_path / "run" / "pictures" / "curves.png").exists()
    with pytest.raises(ConfigError, match=r"cannot be drawn: matplotlib is not installed.*pip install -e '\.\[plots\]"):
        draw_curves([("x", [Series("s", [1], [1.0])])], tmp_path / "x.png")


# --- charts


def drawn(markup: str) -> ElementTree.Element:
    """The svg element of a chart: it must be well-formed."""
    found = re.search(r"<svg.*</svg>", markup)
    assert found is not None
    return ElementTree.fromstring(found.group())


def test_a_line_goes_through_its_points() -> None:
    svg = drawn(chart("x", [Series("s", [0, 50, 100], [0.0, 10.0, 5.0])]))
    path = next(p.get("d") or "" for p in svg.iter("path"))
    points = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]
    assert [x for x, _ in points] == pytest.approx([48, 219, 390])
    assert points[0][1] == pytest.approx(196) and points[1][1] == pytest.approx(8)  # low y is at the bottom
    assert points[2][1] == pytest.approx((196 + 8) / 2)


def test_a_missing_value_is_a_gap_and_not_a_zero() -> None:
    markup = chart("x", [Series("s", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, 1.0])])
    path = next(p.get("d") or "" for p in drawn(markup).iter("path"))
    assert path.count("M") == 2 and path.count("L") == 2
    assert "nan" not in markup.lower().replace("&quot;", "")


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart("x", []) == ""
    assert chart("x", [Series("s", [1, 2], [math.nan, math.nan])]) == ""
    assert draw_curves([("x", [Series("s", [], [])])], Path("unused.png")) is None


def test_one_point_and_a_constant_are_drawn() -> None:
    for xs, ys in (([7], [3.0]), ([1, 2, 3], [0.0, 0.0, 0.0]), ([1, 2], [-4.0, -4.0])):
        assert list(drawn(chart("x", [Series("s", xs, ys)])).iter("circle"))


def test_an_outlier_is_cut_off_and_named() -> None:
    """One first gradient norm of 4000 must not flatten the rest to a line."""
    ys = [4000.0] + [1.0 + 0.1 * (i % 7) for i in range(200)]
    markup = chart("Gradient norm", [Series("norm", list(range(201)), ys, smooth=True)])
    assert "highest 4,000" in markup
    ticks = [float(t.text or "nan") for t in drawn(markup).iter("text") if t.get("text-anchor") == "end" and t.text]
    assert max(t for t in ticks if t < 100) <= 4
    assert "highest" not in chart("Loss", [Series("s", list(range(200)), [5.0 - i / 50 for i in range(200)])])


def test_a_long_run_stays_small_and_keeps_its_extremes() -> None:
    ys = [1.0 + (1.0 if i == 54_321 else 0.0) for i in range(100_000)]
    markup = chart("x", [Series("s", list(range(100_000)), ys)])
    assert len(markup) < 40_000
    path = next(p.get("d") or "" for p in drawn(markup).iter("path"))
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", path)[1:]]
    assert min(heights) == pytest.approx(8, abs=1)


def test_ticks_are_round_and_enclose_the_range() -> None:
    assert nice_ticks(0, 3000, 5) == [0, 1000, 2000, 3000]
    assert nice_ticks(0.21, 0.9, 4) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(5, 5, 4)[0] <= 5 <= nice_ticks(5, 5, 4)[-1]
    for low, high in ((1e-7, 3e-7), (-3.0, 12.0), (0, 1e9)):
        ticks = nice_ticks(low, high, 4)
        assert ticks[0] <= low * (1 + 1e-9) and ticks[-1] >= high * (1 - 1e-9) and 3 <= len(ticks) <= 8


@pytest.mark.parametrize(
    ("value", "tick", "text"),
    [(0, "0", "0"), (0.25, "0.25", "0.25"), (2.5e-4, "2.5e-4", "2.5e-4"), (20000, "20k", "20,000"),
     (1.5e6, "1.5M", "1,500,000")],
)  # fmt: skip
def test_numbers_are_short_on_the_axis_and_plain_in_the_table(value: float, tick: str, text: str) -> None:
    assert tick_text(value) == tick
    assert value_text(value) == text
    assert value_text(None) == value_text(math.inf) == "–"


def test_running_mean_keeps_a_line_and_passes_over_gaps() -> None:
    assert running_mean([5.0] * 200) == [5.0] * 200
    values = [float(i) for i in range(200)]
    values[100] = math.nan
    means = running_mean(values)
    assert len(means) == 200 and means[50] == pytest.approx(50) and math.isfinite(means[100])


def test_the_read_out_script_reads_the_class_names_that_the_charts_write() -> None:
    markup = chart("x", [Series("s", [1, 2], [1.0, 2.0])])
    for name in re.findall(r"querySelector(?:All)?\('(?:\w+)?\.([\w-]+)'\)", charts.CHART_JS):
        assert re.search(rf'class="[^"]*\b{name}\b', markup), name


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"state": "failed", "reason": "ValueError: <boom>"}, "failed at step 40 of 100"),
        ({"state": "stopped"}, "stopped at step 40 of 100"),
        ({"state": "running", "pid": os.getpid()}, "running, at step 40 of 100"),
        ({"state": "running", "pid": 2**22 + 5}, "ended without a word at step 40 of 100"),
        (
            {"state": "running", "pid": 1, "host": "elsewhere", "updated_at": 0, "heartbeat_sec": 10},
            "ended without a word",
        ),
        ([1], "at step 40 of 100"),
    ],
)
def test_the_page_says_how_the_run_stands(status: Any, words: str, tmp_path: Path) -> None:
    """At step 40 of 100 was all that was said of a run that had failed an hour ago, and of one that goes on."""
    make_run(tmp_path, steps=40, max_steps=100)
    if isinstance(status, dict):
        common = {"pid": 1, "reason": None, "doing": "training", "doing_since": 0, "step": 40, "updated_at": 0}
        status = {"host": socket.gethostname(), "total_steps": 100, "heartbeat_sec": 10, **common, **status}
    (tmp_path / "status.json").write_text(json.dumps(status))
    text = Page(write_report(tmp_path).read_text()).text
    assert words in text and ("<boom>" in text) == ("failed" in words)


def test_ranks_and_names_are_for_people(tmp_path: Path) -> None:
    """A curve through the numbers of the slowest ranks says nothing, nor does a chart called perf/own_step_sec."""
    make_run(tmp_path, steps=10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step in range(1, 11):
            line = {"step": step, "images_seen": 64 * step, "perf/slowest_rank": int(step > 8) * 3}
            file.write(json.dumps(line | {"perf/own_step_sec": 0.4, "data/queue_sec": 0.1}) + "\n")
    page = Page(write_report(tmp_path).read_text())
    for part in ("of 10 logged steps", "rank 0", "80 %", "rank 3", "20 %", "Loss, train", "data: queue, s"):
        assert part in page.text, part
    labels = [line["label"] for chart in page.charts for line in chart["lines"]]
    assert "the slowest rank's own work" in labels and "perf/slowest_rank" not in labels
