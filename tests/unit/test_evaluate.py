"""The evaluate command: any weights, each class, further splits, crops, what it writes.  Real files, one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_train.config import ConfigError
from swinv2_train.config.exit_codes import EXIT_STOPPED
from swinv2_train.config.load import config_yaml
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.evaluation.splits import open_splits
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.monitoring import console
from swinv2_train.weights import save_weights
from tests.support.configs import composed
from tests.support.evaluation import (
    CLASSES,
    CLASSIFY,
    MODEL,
    evaluate_command,
    evaluated,
    expected_scores,
    logits_of,
    make_images,
    save_model,
    write_images,
)
from tests.support.harness import tree
from tests.support.processes import finished, forked_command

COUNT = 11
IMAGES, OTHERS = make_images(COUNT, seed=1), make_images(6, seed=2)
LABELS = [number % 3 for number in range(COUNT)]  # class 3 has no image
OTHER_LABELS = [3, 3, 0, 1, 2, 3]
RTOL = 1e-6  # measured worst 8e-8: float32 means in batches against float64 ones, image by image


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Weights and shards of the tests by name."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "weights": save_model(folder / "weights.safetensors"),
        "shards": write_images(folder, "val", IMAGES, LABELS, "val/ILSVRC2012_val_{:08d}"),
        "others": write_images(folder, "others", OTHERS, OTHER_LABELS),
        "unlabelled": write_images(folder, "unlabelled", OTHERS, [None] * 6),
    }


@pytest.fixture
def base(files) -> tuple[str, ...]:
    """weights= and a configuration without a run."""
    return (f"weights={files['weights']}", *CLASSIFY, *MODEL, f"data.eval_shards={files['shards']}")


def same(found: dict[str, Any], expected: dict[str, float]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=RTOL)


def answers_file(folder: Path, entries: Any) -> str:
    path = folder / "answers.json"
    path.write_text(json.dumps(entries))
    return str(path)


# --------------------------------------------------------------------------------------------------------------------
# The command as a user starts it


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return finished(forked_command("swinv2_train.evaluate", *arguments, cwd=folder, **pipes))


def test_weights_without_a_run_are_scored_and_nothing_is_written(base, tmp_path):
    """One JSON line on stdout, the load report on stderr, and no file: the scores are those of plain loops."""
    done = start(tmp_path, *base, "format=microsoft")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "microsoft" in done.stderr
    line = json.loads(done.stdout)
    same(line, expected_scores(logits_of(IMAGES), [[label] for label in LABELS]))
    assert line["weights"] == base[0].removeprefix("weights=") and "checkpoint" not in line and "splits" not in line
    assert tree(tmp_path) == []


def test_a_22k_classifier_is_scored_on_the_classes_that_its_map_lists(capfd, tmp_path):
    """task.init_head=FILE, 21,841 classes and the official form of 1000 lines, as fine-tuning takes them."""
    rows = np.random.default_rng(5).permutation(21841)[:1000].tolist()
    (tmp_path / "map22kto1k.txt").write_text("".join(f"{row}\n" for row in rows))
    large = save_model(tmp_path / "large.safetensors", 21841)
    labels = [number * 97 % 1000 for number in range(COUNT)]
    shards = write_images(tmp_path, "val", IMAGES, labels)
    sizes = ("task=classify", "task.num_classes=1000", "data=cifar10", *MODEL)
    arguments = (f"weights={large}", *sizes, f"data.eval_shards={shards}")
    code, _, err = evaluate_command(capfd, *arguments)
    assert code == 2 and "head=FILE takes the rows whose indices FILE lists" in err
    found = evaluated(capfd, *arguments, f"task.init_head={tmp_path / 'map22kto1k.txt'}")
    same(found, expected_scores(logits_of(IMAGES, 21841)[:, rows], [[label] for label in labels]))


def test_a_map_of_the_runs_start_does_not_touch_a_head_that_fits(capfd, base, tmp_path):
    """A fine-tuned run's configuration still names the map; its weights have the small head already."""
    (tmp_path / "map.txt").write_text("3\n2\n1\n0\n")
    assert evaluated(capfd, *base, f"task.init_head={tmp_path / 'map.txt'}") == evaluated(capfd, *base)


def test_weights_with_a_run_take_its_configuration(files, tmp_path):
    """run_dir says what the model is; the run's own checkpoints, of which there are none here, are not looked at."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    own = (f"run_dir={run_dir}", "data.shards=gone.tar", f"data.eval_shards={files['shards']}")
    (run_dir / "config.yaml").write_text(config_yaml(composed([*CLASSIFY, *MODEL, *own])))
    done = start(tmp_path, f"run_dir={run_dir}", f"weights={files['weights']}")
    assert done.returncode == 0, done.stderr
    same(json.loads(done.stdout), expected_scores(logits_of(IMAGES), [[label] for label in LABELS]))
    assert tree(tmp_path) == ["run/config.yaml"]
    done = start(tmp_path, f"run_dir={run_dir}")
    assert done.returncode == 2 and "holds no complete checkpoint" in done.stderr


def test_help_names_the_commands_own_keys(tmp_path):
    done = start(tmp_path, "--help")
    assert done.returncode == 0 and all(f"{key}=" in done.stdout for key in ("weights", "format", "out", "crop_pcts"))


# --------------------------------------------------------------------------------------------------------------------
# Every class


def test_out_holds_every_class_and_the_line_the_worst(base, tmp_path, capfd):
    """Counts are exact; a class without images has no accuracy and is not among the worst."""
    line = evaluated(capfd, *base, f"out={tmp_path / 'out'}")
    full = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    said = logits_of(IMAGES).argmax(dim=1).tolist()
    counts = np.zeros((CLASSES, CLASSES), int)
    for right, predicted in zip(LABELS, said, strict=True):
        counts[right, predicted] += 1
    found = np.zeros_like(counts)
    for right, predicted, images in full["confusion"]:
        found[right, predicted] += images
    assert (found == counts).all() and len(full["confusion"]) == np.count_nonzero(counts)
    assert full["class_images"] == counts.sum(axis=1).tolist() == [4, 4, 3, 0]
    accuracy = [100 * counts[label, label] / counts[label].sum() for label in range(3)]
    assert len(set(accuracy)) > 1, "the worst class must be one of several"
    assert full["class_accuracy"] == pytest.approx([*accuracy, None])
    assert line["classes_without_samples"] == 1
    assert line["mean_class_accuracy"] == pytest.approx(sum(accuracy) / 3)
    assert line["worst_classes"] == pytest.approx({str(k): accuracy[k] for k in np.argsort(accuracy, kind="stable")})
    assert list(line["worst_classes"].values()) == sorted(accuracy)
    assert {key: full[key] for key in line} == line
    assert full["data"]["eval_crop_pct"] == 1.0 and full["model"]["img_size"] == 16 and full["task"] == "classify"
    picture = np.asarray(Image.open(tmp_path / "out" / "confusion.png"))
    assert picture.shape[0] == picture.shape[1] - 420 + 308  # 4 cells of 44 px and three margins of 44
    assert tree(tmp_path / "out") == ["confusion.png", "evaluation.json"]


# --------------------------------------------------------------------------------------------------------------------
# Further splits


def test_each_split_has_its_own_images_labels_and_scores(base, files, tmp_path, capfd):
    """ImageNet-V2's way (own shards, own labels) and ReaL's (the same shards, another list of right classes)."""
    real = [[0, 1], [], [2], [3, 1, 0], [], [0], [1, 2], [3], [2, 0], [1], [0]]
    line = evaluated(
        capfd, *base, f"+data.eval_splits.v2.shards={files['others']}",
        f"+data.eval_splits.real.shards={files['shards']}",
        f"+data.eval_splits.real.labels={answers_file(tmp_path, real)}", f"out={tmp_path / 'out'}",
    )  # fmt: skip
    same(line, expected_scores(logits_of(IMAGES), [[label] for label in LABELS]))
    same(line["splits"]["v2"], expected_scores(logits_of(OTHERS), [[label] for label in OTHER_LABELS]))
    same(line["splits"]["real"], expected_scores(logits_of(IMAGES), real))
    assert line["splits"]["real"]["images"] == 9
    assert "worst_classes" in line["splits"]["v2"] and "worst_classes" not in line["splits"]["real"]
    full = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert full["splits"]["v2"]["shards"] == files["others"] and sum(full["splits"]["v2"]["class_images"]) == 6
    assert tree(tmp_path / "out") == ["confusion.png", "confusion_v2.png", "evaluation.json"]


def test_a_folder_split_is_read_by_the_names_of_its_classes(tmp_path, capsys):
    """ImageNet-V2's folders are called 0 to 999, ImageNet-A lacks 800: their places in sorted order mean others."""
    for name in ("val/n01", "val/n02", "v2/0", "v2/1", "a/n02", "b/n02", "b/n03"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    known = (f"data.eval_shards={tmp_path}/val", "run_dir=unused", "data.shards=unused")
    arguments = [*CLASSIFY, *MODEL, *known]

    def split(folder: str, names: tuple[str, ...] | None = None) -> Any:
        return open_splits(composed([*arguments, f"+data.eval_splits.v2.shards={tmp_path}/{folder}"]), names, print)[
            "v2"
        ]

    with pytest.raises(ConfigError, match=r"has 1 classes that are none of the classes of data.eval_shards .n03"):
        split("b")
    with pytest.raises(ConfigError, match=r"v2.shards has 1 classes that are none of the model's classes \(n03"):
        split("b", ("n02", "n01"))
    assert split("a").source.label_range == (1, 1) and split("a", ("n02", "n01")).source.label_range == (0, 0)
    capsys.readouterr()
    assert split("v2").source.label_range == (0, 1)
    assert "data.eval_splits.v2.shards calls its classes by numbers (0, 1): they are taken" in capsys.readouterr().out
    assert split("val").source.label_range == (0, 1)
    labels = answers_file(tmp_path, {"0/1": [0], "1/1": [1]})  # say what the images are, whatever the folders do
    files = (f"+data.eval_splits.v2.shards={tmp_path}/v2", f"+data.eval_splits.v2.labels={labels}")
    assert open_splits(composed([*arguments, *files]), None, print)["v2"].label_overrides == {"0/1": (0,), "1/1": (1,)}


def test_labels_by_key_serve_shards_without_any(base, files, tmp_path, capfd):
    """One right class each: the classes are counted as for labelled shards; entries too many are noted."""
    entries = {f"{number:03d}": [label] for number, label in enumerate(OTHER_LABELS, start=1)} | {"999": [0]}
    entries["002"] = []
    code, out, err = evaluate_command(
        capfd, *base, f"+data.eval_splits.v2.shards={files['unlabelled']}",
        f"+data.eval_splits.v2.labels={answers_file(tmp_path, entries)}",
    )  # fmt: skip
    assert code == 0 and "1 entries of" in err, err
    split = json.loads(out)["splits"]["v2"]
    same(split, expected_scores(logits_of(OTHERS), [[3], [], [0], [1], [2], [3]]))
    assert split["classes_without_samples"] == 0 and len(split["worst_classes"]) == 4


# --------------------------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.slow
def test_crops_are_compared_in_one_go_and_the_best_is_named(base, files, tmp_path, capfd):
    """Each as data.eval_crop_pct alone gives it; the line's own scores stay those of the configured crop."""
    large = write_images(tmp_path, "large", make_images(9, seed=5, size=24), [0, 1, 2, 3, 0, 1, 2, 3, 0])
    base = (*base, f"data.eval_shards={large}")
    swept = evaluated(capfd, *base, "crop_pcts=[0.5,0.75,1.0]")
    alone = {value: evaluated(capfd, *base, f"data.eval_crop_pct={value}") for value in ("0.5", "0.75", "1")}
    assert swept["crop_pcts"] == {
        value: {name: line[name] for name in ("val/loss", "val/top1", "val/top5")} for value, line in alone.items()
    }
    assert len({line["val/loss"] for line in alone.values()}) == 3
    assert swept["val/loss"] == alone["1"]["val/loss"]
    best = max(alone, key=lambda value: (alone[value]["val/top1"], -alone[value]["val/loss"]))
    assert swept["best_crop_pct"] == float(best)


# --------------------------------------------------------------------------------------------------------------------
# SimMIM


def test_simmim_is_scored_and_drawn(files, tmp_path, capfd):
    """val/loss and the reconstruction, without classes; the split's labels do not matter."""
    encoder = SwinTransformerV2(
        img_size=16, num_classes=0, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2,
        pretrained_window_sizes=(0, 0),
    )  # fmt: skip
    save_weights(SimMIM(encoder, 8), tmp_path / "simmim.pth", "microsoft")
    line = evaluated(
        capfd, f"weights={tmp_path / 'simmim.pth'}", "task=simmim", "task.mask_unit_px=8", "data=cifar10", *MODEL,
        f"data.eval_shards={files['shards']}", f"+data.eval_splits.other.shards={files['others']}",
        f"out={tmp_path / 'out'}",
    )  # fmt: skip
    assert line.keys() == {"weights", "images", "val/loss", "splits"} and line["images"] == COUNT
    assert line["splits"]["other"].keys() == {"images", "val/loss"}
    assert line["splits"]["other"]["val/loss"] != line["val/loss"] > 0
    assert tree(tmp_path / "out") == ["evaluation.json", "picture.png"]
    assert np.asarray(Image.open(tmp_path / "out" / "picture.png")).shape == (16 + 4 * 100 - 4, 3 * 100 - 4, 3)


# --------------------------------------------------------------------------------------------------------------------
# Wrong input

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no weights there": (("weights=gone.pth",), "gone.pth"),
    "unknown format": (("format=keras",), "format (keras) is unknown"),
    "another implementation's names": (("format=mmpretrain",), "mmpretrain"),
    "weights and a checkpoint": (("checkpoint=x",), "weights and checkpoint are both given"),
    "another model": (("model.embed_dim=16",), "the model has"),
    "another number of classes": (("task.num_classes=5",), "head"),
    "too few classes": (("task.num_classes=2",), "task.num_classes (2) is too small: data.eval_shards has labels"),
    "no images": (("data.eval_shards=null",), "data.eval_shards has no value"),
    "a split without shards": (("+data.eval_splits.v2.labels=x",), "data.eval_splits.v2.shards has no value"),
    "a typo in a split": (("+data.eval_splits.v2.shard=x",), "did you mean data.eval_splits.v2.shards?"),
    "a split that is a value": (("+data.eval_splits.v2=x",), "data.eval_splits.v2 is a split, not a value"),
    "a split that is not there": (("+data.eval_splits.v2.shards=x.tar",), "data.eval_splits.v2.shards names 'x.tar'"),
    "a path for a name": (("+data.eval_splits={a/b: {shards: x}}",), "letters, digits, _ and -"),
    "a split of other classes": (
        ("+data.eval_splits.v2.shards={others}", "task.num_classes=3"),
        "task.num_classes (3) is too small: data.eval_splits.v2.shards has labels from 0 to 3",
    ),
    "a split without labels": (
        ("+data.eval_splits.v2.shards={unlabelled}",),
        "data.eval_splits.v2.shards: 6 of 6 samples have no readable label",
    ),
    "no answers there": (
        ("+data.eval_splits.r.shards={others}", "+data.eval_splits.r.labels=gone.json"),
        "data.eval_splits.r.labels (gone.json) cannot be read: No such file or directory",
    ),
    "crops that are no numbers": (("crop_pcts=[big]",), "crop_pcts ([big]) must be numbers"),
    "a crop of nothing": (("crop_pcts=[0.9,0]",), "crop_pcts (0) must be more than 0 and at most 1"),
    "crops without accuracy": (
        ("task=simmim", "~task.num_classes", "task.mask_unit_px=8", "crop_pcts=[1]"),
        "crop_pcts compares accuracies",
    ),
    "out that is a file": (("out={weights}",), "cannot be made: File exists"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_and_exit_code_2(case, base, files, capfd):
    arguments, message = WRONG[case]
    for name, value in files.items():
        arguments = tuple(argument.replace(f"{{{name}}}", value) for argument in arguments)
    if "task=simmim" in arguments:
        base = tuple(argument for argument in base if "task" not in argument)
        arguments = tuple(argument for argument in arguments if not argument.startswith("~"))
    replaced = {argument.partition("=")[0] for argument in arguments} & {"weights"}
    base = tuple(argument for argument in base if argument.partition("=")[0] not in replaced)
    code, out, err = evaluate_command(capfd, *base, *arguments)
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_format_is_of_weights_alone(tmp_path, capfd):
    """A run's own checkpoints have no other format."""
    (tmp_path / "config.yaml").write_text(
        config_yaml(composed([*CLASSIFY, *MODEL, f"run_dir={tmp_path}", "data.shards=x"]))
    )
    code, _, err = evaluate_command(capfd, f"run_dir={tmp_path}", "format=timm")
    assert code == 2 and "format (timm) is of weights=PATH, which is not given" in err
    code, _, err = evaluate_command(capfd, "format=timm")
    assert code == 2 and "run_dir has no value" in err


def test_scores_that_are_no_numbers_are_null(base, files, tmp_path, capfd):
    """A diverged model's nan is not JSON."""
    weights = torch.load(_as_pth(files["weights"], tmp_path), weights_only=True)
    weights["model"]["head.bias"].fill_(float("nan"))
    torch.save(weights, tmp_path / "nan.pth")
    line = evaluated(capfd, f"weights={tmp_path / 'nan.pth'}", *base[1:])
    assert line["val/loss"] is None and line["images"] == COUNT


def _as_pth(path: str, folder: Path) -> Path:
    from safetensors.torch import load_file

    torch.save({"model": load_file(path)}, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_ends_an_evaluation_with_a_line_after_it_said_how_far_it_was(
    name: str, base: tuple[str, ...], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation of hours was silent, and Ctrl-C answered with sixty lines of traceback."""
    batches = EvalLoader.__iter__

    def interrupted(loader: EvalLoader) -> Iterator[Any]:
        for number, batch in enumerate(batches(loader)):
            if number == 2:
                os.kill(os.getpid(), getattr(signal, name))
            yield batch

    monkeypatch.setattr(EvalLoader, "__iter__", interrupted)
    monkeypatch.setattr(console, "_LINE_EVERY_SEC", 0.0)
    code, out, err = evaluate_command(capfd, *base, "train.micro_batch_size=2")
    assert code == EXIT_STOPPED and "Traceback" not in err and out == ""
    assert "evaluating data.eval_shards: batch 1 of 6, 0:" in err and f"stopped by {name}" in err
