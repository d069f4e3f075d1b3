"""Names of classes from training to the last export: a model that is right stays right, whatever order folders have.

The model is right by construction: each image is a class of its own, and the head's rows are the images' features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_train import status
from swinv2_train.checkpoint import checkpoint_classes, find_checkpoint
from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.report.page import write_report
from swinv2_train.training.initial_weights import head_by_name
from swinv2_train.weights import save_weights, weights_classes
from tests.support.configs import composed
from tests.support.evaluation import MEAN, MODEL, STD, evaluate_command, evaluated, make_images, make_model
from tests.support.small_run import run_alone, weights_of

COUNT = 12
NAMES = tuple(f"w{number:02d}" for number in range(COUNT))
NUMBERS = tuple(map(str, range(COUNT)))
CLASSIFY = ("task=classify", f"task.num_classes={COUNT}", "data=cifar10", *MODEL)
IMAGES = make_images(COUNT, seed=7)


@pytest.fixture(scope="module")
def model() -> SwinTransformerV2:
    """Says class n of image n, and of no other."""
    model = make_model(COUNT)
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        features = model.pooled_features((pixels - MEAN) / STD)
        model.head.weight.copy_(features)
        model.head.bias.copy_(-features.square().sum(1) / 2)
        assert model((pixels - MEAN) / STD).argmax(1).tolist() == list(range(COUNT))
    return model


def folder(path: Path, names: tuple[str, ...], only: tuple[int, ...] = tuple(range(COUNT))) -> str:
    """A class folder of these names for each of these images."""
    for number in only:
        (path / names[number]).mkdir(parents=True)
        Image.fromarray(IMAGES[number]).save(path / names[number] / "1.png")
    return str(path)


def top1(capfd: Any, *arguments: str) -> float:
    found = evaluated(capfd, *arguments)
    assert found["images"] > 0
    return found["val/top1"]


def run_config(tmp_path: Path, shards: str, *overrides: str) -> Any:
    """A run of one step that changes nothing."""
    return composed(
        [*CLASSIFY, f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", "optim.lr=0", "train.max_steps=1",
         "train.epochs=null", "optim.schedule.warmup_steps=0", "train.global_batch_size=4", "train.keep_best=null",
         "train.eval_every_steps=null", "log.wandb=disabled", "log.progress=none", "engine=local",
         "engine.precision=fp32", "optim.schedule.warmup_lr=0", "optim.schedule.min_lr=0", "data.num_workers=0",
         "optim.weight_decay=0", "data.eval_shards=null", *overrides]
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_on_folders_is_right_about_every_later_source(model, tmp_path, capfd):
    """Start from weights of the same classes in another order, evaluate on a folder that lacks one, export."""
    shuffled = tuple(NAMES[number] for number in np.random.default_rng(3).permutation(COUNT))
    order = [NAMES.index(name) for name in shuffled]
    start = tmp_path / "start.safetensors"
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights["head.weight"], weights["head.bias"] = weights["head.weight"][order], weights["head.bias"][order]
    save_weights(model, start, "microsoft", weights=weights, classes=shuffled)
    train, lacking = folder(tmp_path / "train", NAMES), folder(tmp_path / "lacking", NAMES, tuple(range(1, COUNT)))
    config = run_config(tmp_path, train, f"task.init_from={start}", f"data.eval_shards={lacking}")
    assert run_alone(config) == 0
    out = capfd.readouterr().out
    assert "note: their head has these classes in another order: its rows are put into our order, by name" in out
    assert torch.equal(weights_of(config)["head.weight"], model.head.weight.detach())

    run_dir = Path(config.run_dir)
    assert json.loads((run_dir / "classes.json").read_text()) == list(NAMES)
    assert checkpoint_classes(find_checkpoint(run_dir)) == NAMES == weights_classes(run_dir)
    assert "12 classes: w00, w01, w02" in status.status_text(status.read_status(run_dir))
    assert "12 classes (w00, w01, w02" in write_report(run_dir).read_text()
    scored = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["val/top1"] for line in scored if "val/top1" in line] == [100.0]

    run = (f"run_dir={run_dir}", f"out={tmp_path / 'out'}")
    found = evaluated(capfd, *run)
    assert (found["val/top1"], found["classes_without_samples"]) == (100.0, 1)
    assert found["worst_class_names"]["1"] == "w01"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["classes"] == list(NAMES)
    (tmp_path / "lacking" / "cow").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / "lacking" / "cow" / "1.png")
    code, _, err = evaluate_command(capfd, *run)
    assert code == 2 and "data.eval_shards has 1 classes that are none of the model's classes (cow)" in err


def test_folders_called_by_numbers_are_counted_and_not_spelled(model, tmp_path, capfd):
    """The report: 16.7 % for 100 %, for "10" stands before "2" as text.  Also where the weights have no names."""
    weights, numbered = tmp_path / "bare.safetensors", folder(tmp_path / "numbers", NUMBERS)
    save_weights(model, weights, "microsoft")
    bare = (f"weights={weights}", *CLASSIFY)
    assert top1(capfd, *bare, f"data.eval_shards={numbered}") == 100
    assert top1(capfd, *bare, f"data.eval_shards={folder(tmp_path / 'part', NUMBERS, (1, 3, 10, 11))}") == 100
    code, out, err = evaluate_command(capfd, *bare, f"data.eval_shards={folder(tmp_path / 'words', NAMES)}")
    assert code == 0 and json.loads(out)["val/top1"] == 100 and "model's classes have no names" in err


@pytest.mark.parametrize("target", ["timm.safetensors", "microsoft.pth", "huggingface"])
def test_an_export_knows_its_classes(model, tmp_path, capfd, target):
    """Scored on a folder in which the first class is missing and another name would be refused."""
    path = tmp_path / target
    save_weights(model, path, target.partition(".")[0], classes=NAMES)
    assert weights_classes(path) == NAMES
    lacking = folder(tmp_path / "lacking", NAMES, (3, 5, 11))
    assert top1(capfd, f"weights={path}", *CLASSIFY, f"data.eval_shards={lacking}") == 100
    if target == "huggingface":
        config = json.loads((path / "config.json").read_text())
        assert config["id2label"]["11"] == "w11" and config["label2id"]["w03"] == 3


def test_names_that_nobody_gave_are_none(model, tmp_path):
    """transformers' LABEL_0 is no class, and timm's label_names are names."""
    save_weights(model, tmp_path / "hf", "huggingface")
    assert weights_classes(tmp_path / "hf") is None
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["id2label"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "label_names": list(NAMES)}))
    assert weights_classes(tmp_path / "hf") == NAMES
    save_weights(model, tmp_path / "few", "huggingface", classes=NAMES[:3])
    assert weights_classes(tmp_path / "few") == NAMES[:3]


def test_a_resume_with_other_classes_is_refused_and_names_them(model, tmp_path, capfd):
    """And the same ones in another order, which a dataset's own list may have, go on by name."""
    train = folder(tmp_path / "train", NAMES)
    assert run_alone(run_config(tmp_path, train)) == 0
    (tmp_path / "train" / "w05").rename(tmp_path / "train" / "x05")
    capfd.readouterr()
    assert run_alone(run_config(tmp_path, train, "train.max_steps=2")) == 2
    err = capfd.readouterr().err
    assert "holds a run of 12 classes, but data.shards has 12 (without w05 and with x05)" in err


def test_a_run_from_before_names_were_kept_has_those_of_its_images(model, tmp_path, capfd):
    """Its folders were ordered as text, so that a run on 0 to 11 has "10" as its class 2."""
    train = folder(tmp_path / "train", NUMBERS)
    config = run_config(tmp_path, train)
    assert run_alone(config) == 0
    checkpoint = find_checkpoint(Path(config.run_dir))
    assert checkpoint_classes(checkpoint) == NUMBERS
    state = json.loads((checkpoint / "state.json").read_text())
    del state["classes"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert checkpoint_classes(checkpoint) == tuple(sorted(NUMBERS))
    (tmp_path / "train").rename(tmp_path / "gone")
    assert checkpoint_classes(checkpoint) is None
    (checkpoint / "state.json").write_text(json.dumps({**state, "classes": [1]}))
    with pytest.raises(ConfigError, match=r"classes\[0\] \(1\) must be text"):
        checkpoint_classes(checkpoint)


def test_weights_without_names_are_taken_for_those_of_the_run_that_is_named(model, tmp_path, capfd):
    train = folder(tmp_path / "train", NAMES)
    config = run_config(tmp_path, train)
    assert run_alone(config) == 0
    save_weights(model, tmp_path / "bare.pth", "microsoft")
    lacking = folder(tmp_path / "lacking", NAMES, (3, 5, 11))
    arguments = (f"run_dir={config.run_dir}", f"weights={tmp_path / 'bare.pth'}", f"data.eval_shards={lacking}")
    code, out, err = evaluate_command(capfd, *arguments)
    assert code == 0 and json.loads(out)["val/top1"] == 100 and "names no classes; those of" in err


@pytest.mark.parametrize(
    ("theirs", "ours", "rows", "head", "said"),
    [
        (None, None, (2, 2), "auto", ""),
        (None, ("a", "b"), (2, 2), "auto", "their classes have no names"),
        (("a", "b"), None, (2, 2), "auto", "the training images' classes have no names"),
        (("a", "b"), ("a", "b"), (2, 2), "auto", ""),
        (("b", "a"), ("a", "b"), (2, 2), [1, 0], "in another order"),
        (("b", "a"), ("a", "b"), (3, 3), [1, 0, 2], "in another order"),
        (("a", "b", "c"), ("c", "a"), (3, 2), [2, 0], "with b: its rows are put into our order"),
        (("a", "b"), ("a", "c"), (2, 2), "fresh", "the head starts anew, for theirs is of other classes"),
        (("a", "b"), ("a", "b", "c"), (2, 3), "fresh", "without c"),
        (("tench", "goldfish"), ("n01440764", "n01443537"), (2, 2), "auto", ""),
    ],
)
def test_a_new_run_takes_the_rows_of_a_head_by_name(theirs, ours, rows, head, said):
    """Rows of other classes would be a start from something else, in silence."""
    found, notes = head_by_name(theirs, ours, rows)
    assert found == head and (said in notes[0] if said else notes == [])


def test_one_class_is_refused():
    """Its loss is 0 from the first step on, and every image is right."""
    with pytest.raises(ConfigError, match=r"task.num_classes \(1\) leaves nothing to tell apart"):
        composed(["task=classify", "task.num_classes=1", "model=demo", "run_dir=x", "data.shards=x"])
