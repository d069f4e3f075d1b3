"""Several classes, and numbers, of whole images: trained from a table beside a folder, evaluated on 1 and 2 ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swinv2_train import load
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.evaluation import evaluated
from tests.support.images import encoded
from tests.support.small_run import SMALL, run_alone

COUNT, STEPS = 48, 80
PLAIN = (
    "task=classify", "data=labelled", "model=demo", "task.rand_augment=null", "task.mixup_alpha=0",
    "task.cutmix_alpha=0", "task.label_smoothing=0", "task.erasing_prob=0", *SMALL, "data.num_workers=0",
    "data.crop_scale=[1,1]", "data.crop_ratio=[1,1]",
    "optim.lr=0.01", "optim.schedule.warmup_epochs=0", "optim.schedule.min_lr=0",
    "train.epochs=null", f"train.max_steps={STEPS}", "optim.layer_decay=1", "model.drop_path_rate=0",
    "data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]",
)  # fmt: skip
KINDS = {
    "multilabel": ("task.target=multilabel", "task.num_classes=3", "data.labels_columns=[classes]"),
    "regression": (
        "task.target=regression", "task.num_classes=2", "data.labels_columns=[light,blue]", "task.value_mean=[127,0]",
        "task.value_std=[40,1]", "task.mixup_alpha=0.2",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose classes are their bright channels, and whose numbers are how bright they are."""
    place = tmp_path_factory.mktemp("targets")
    rng = np.random.default_rng(0)
    lines = ["file,classes,light,blue"]
    for name in ("train", "test"):
        (place / name).mkdir()
        for number in range(COUNT if name == "train" else 11):
            levels = rng.integers(40, 216, 3)
            pixels = np.clip(levels + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            (place / name / f"{name}{number}.png").write_bytes(encoded(pixels))
            classes = "|".join(c for c, level in zip(("red", "green", "blue"), levels, strict=True) if level > 127)
            lines.append(f"{name}{number}.png,{classes},{levels.mean():.2f},{(levels[2] - 127) / 50:.3f}")
    (place / "labels.csv").write_text("\n".join(lines))
    return place


def settings(folder: Path, kind: str, run: Path, *overrides: str) -> Any:
    return compose_overrides([
        *PLAIN, *KINDS[kind], f"data.shards={folder}/train", f"data.eval_shards={folder}/test",
        f"data.labels={folder}/labels.csv", f"run_dir={run}", *overrides,
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_from_a_table_and_is_scored_alike_on_any_number_of_ranks(kind, folder, tmp_path, capfd):
    """What the run measures at its end is what evaluate measures, on one rank and on two."""
    run = tmp_path / "run"
    assert run_alone(settings(folder, kind, run)) == EXIT_DONE, capfd.readouterr().err
    said = capfd.readouterr()
    assert f"11 of {COUNT + 11} rows of {folder}/labels.csv are of no image of data.shards" in said.out
    own = {name: line[name] for line in read_metrics(run) for name in line if name.startswith("val/")}
    one, two = (evaluated(capfd, f"run_dir={run}", f"out={run}/evaluation", ranks=ranks) for ranks in (1, 2))
    assert one["images"] == two["images"] == 11
    for name, value in own.items():
        assert one[name] == pytest.approx(value, rel=1e-5), name
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    if kind == "multilabel":
        assert one["val/map"] > 90 and one["val/auroc"] > 90 and one["val/f1_micro"] > 75, one
        full = json.loads((run / "evaluation" / "evaluation.json").read_text())
        assert full["classes"] == ["blue", "green", "red"] and max(full["class_images"]) <= 11
        assert np.mean(full["class_ap"]) == pytest.approx(one["val/map"])
        assert np.mean(full["class_f1"]) == pytest.approx(one["val/f1_macro"])
        assert two["worst_classes"] == one["worst_classes"] and len(one["worst_class_names"]) == 3
        assert json.loads((run / "classes.json").read_text()) == ["blue", "green", "red"]
        assert evaluated(capfd, f"run_dir={run}", "task.threshold=0.01")["val/f1_micro"] != one["val/f1_micro"]
    else:
        assert one["val/r2"] > 0.7 and one["val/mae"] < 12, one
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines() if line.startswith("test")]
    found = load(run, device="cpu").predict([folder / "test" / row[0] for row in rows])
    if kind == "multilabel":
        right = sum(len({*row[1].split("|")} & {*each.labels}) for row, each in zip(rows, found, strict=True))
        said = sum(len(each.labels) for each in found) + sum(len(row[1].split("|")) for row in rows if row[1])
        assert 100 * 2 * right / said == pytest.approx(one["val/f1_micro"])
    else:
        errors = [abs(x - float(y)) for row, each in zip(rows, found, strict=True)
                  for x, y in zip(each.values, row[2:], strict=True)]  # fmt: skip
        assert sum(errors) / len(errors) == pytest.approx(one["val/mae"], rel=1e-4)
    wrong = settings(folder, kind, run, "task.target=single", "task.num_classes=3", "task.value_mean=null",
                     "task.value_std=null", "data.labels_columns=[classes]")  # fmt: skip
    assert run_alone(wrong) == EXIT_USER_ERROR
    assert f"holds a run with task.{'target=multilabel' if kind == 'multilabel' else 'num_classes=2'}" in (
        capfd.readouterr().err
    )
