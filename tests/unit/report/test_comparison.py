"""Runs on one page: what differs, how they stand, which is best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.report.__main__ import report
from swinv2_train.report.comparison import differing, short_names
from tests.unit.report.test_page import Page, make_run


def test_a_sweep_is_compared_on_one_page(tmp_path: Path, capsys: Any) -> None:
    """Ranked by what they reached, with the keys in which they differ and a line for each in every chart."""
    for name, top1 in (("a", 50.0), ("b", 70.0), ("c", 60.0)):
        run = tmp_path / name / "finetune"
        make_run(run, steps=50, val=True)
        text = (run / "metrics.jsonl").read_text().replace("65.4321", str(top1))
        (run / "metrics.jsonl").write_text(text)
        with open(run / "config.yaml", "a") as file:
            file.write(f"optim: {{lr: {top1 / 1e5}, note: <i>{name}</i>}}\nrun_dir: {run}\n")
    out = tmp_path / "new" / "all.html"
    assert report([*(str(tmp_path / name / "finetune") for name in "abc"), f"out={out}"]) == 0
    page = Page(out.read_text())
    assert str(out) in capsys.readouterr().out
    said = ("3 runs compared", "ranked by the best val/top1", "optim.lr", "0.0007", "complete: 50 steps", "Loss: train")
    for part in said:
        assert part in page.text, part
    assert "model.name" not in page.text and "<i>a</i>" not in out.read_text()
    rows = [page.text.index(f"{name}/finetune") for name in "bca"]
    assert rows == sorted(rows)
    loss = next(chart for chart in page.charts if len(chart["lines"][0]["x"]) > 1)
    assert [line["label"] for line in loss["lines"]] == ["b/finetune", "c/finetune", "a/finetune"]


def test_runs_without_a_score_and_many_of_them_have_a_page(tmp_path: Path) -> None:
    runs = [tmp_path / f"run_{number}" for number in range(11)]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_text("{}")
    out = tmp_path / "all.html"
    assert report([*map(str, runs), f"out={out}"]) == 0
    text = Page(out.read_text()).text
    assert "no run has a score yet" in text and "no step logged yet" in text and "run_10" in text


def test_one_directory_renews_its_own_page(tmp_path: Path, capsys: Any) -> None:
    make_run(tmp_path / "run")
    assert report([f"run_dir={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "report.html").exists() and "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["", "--best x", "no_such_dir", ". out=", ". out=a out=b", "EMPTY EMPTY"])
def test_wrong_use_is_refused_before_anything_is_written(line: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(ConfigError):
        report(line.split())
    assert not (tmp_path / "comparison.html").exists() and not (tmp_path / "report.html").exists()


def test_names_are_as_long_as_they_must_be() -> None:
    assert short_names([Path("/r/a/x"), Path("/r/b/x")]) == ["a/x", "b/x"]
    assert short_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert short_names([Path("/r/a"), Path("/r/a")]) == ["/r/a", "/r/a"]


def test_only_what_differs_is_shown() -> None:
    one: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "run_dir": "x", "d": None}
    other = {"a": {"b": 1, "c": [1, 3]}, "run_dir": "y", "e": 0}
    assert differing([one, other]) == {"a.c": [[1, 2], [1, 3]], "e": [None, 0]}
