"""Segmentation from a folder of pairs, in ADE20K's layout: trained, stopped, gone on, and with a damaged pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from swinv2_train import train
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.evaluation import evaluate_command, evaluated
from tests.support.harness import run_distributed
from tests.support.segmentation import CLASSES, write_pairs
from tests.support.segmenter import SEGMENT


def overrides(folder: Path, run_dir: Path) -> list[str]:
    return [
        *SEGMENT, f"task.num_classes={CLASSES}", "task.reduce_zero_label=false", f"run_dir={run_dir}",
        f"data.shards={folder}/images/training", f"data.eval_shards={folder}/images/training",
        "data.label_folders=[images,annotations]",
    ]  # fmt: skip


def trained(command: list[str], ranks: int = 1) -> list[int]:
    """The exit code of each rank of the train command."""
    config = composed(command)
    codes: list[int] = run_distributed(
        lambda _: guarded(lambda: train.train(config)), ranks, init=False, timeout_sec=120
    )  # fmt: skip
    return codes


@pytest.mark.slow
def test_a_run_on_a_folder_goes_on_with_the_same_pairs_and_views(tmp_path):
    """The losses of a run that is killed behind its first step are those of one that was not, bit for bit."""
    write_pairs(tmp_path, 7)
    command = [
        *overrides(tmp_path, tmp_path / "run"), "train.max_steps=3", "train.checkpoint_every_steps=1",
        "train.keep_checkpoints=3", "train.micro_batch_size=3",
    ]  # fmt: skip
    lines = []
    for _ in range(2):
        assert trained(command, ranks=2) == [EXIT_DONE] * 2
        lines.append(read_metrics(tmp_path / "run"))
        for step in (2, 3):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    kept = [[{k: v for k, v in line.items() if k.startswith(("train/", "val/"))} for line in each] for each in lines]
    assert kept[0] == kept[1] and len(kept[0]) == 3 and kept[0][-1]["val/miou"] >= 0


@pytest.mark.slow
def test_names_of_classes_go_with_the_run_and_later_masks_of_others_are_refused(tmp_path, capfd):
    """Masks whose list has two names exchanged were scored by their numbers, without a word."""
    write_pairs(tmp_path, 4)
    names = ["wall", "sky", "tree", "road", "car"][:CLASSES]
    (tmp_path / "annotations" / "classes.txt").write_text("\n".join(names))
    command = [*overrides(tmp_path, tmp_path / "run"), "train.max_steps=1"]
    assert trained(command) == [EXIT_DONE]
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == names
    found = evaluated(capfd, f"run_dir={tmp_path / 'run'}")
    assert set(found["worst_class_names"].values()) <= set(names)
    (tmp_path / "annotations" / "classes.txt").write_text("\n".join([names[1], names[0], *names[2:]]))
    code, _, err = evaluate_command(capfd, f"run_dir={tmp_path / 'run'}")
    assert code == EXIT_USER_ERROR
    assert (
        "data.eval_shards calls class 0 of its pixels or objects 'sky', which is 'wall' among the model's classes"
        in err
    )
    assert trained([*command, "train.max_steps=2"]) == [EXIT_USER_ERROR]


@pytest.mark.slow
def test_a_damaged_pair_follows_the_policy_and_is_named(tmp_path, capfd):
    """The image is whole, its label image is cut off."""
    write_pairs(tmp_path, 6)
    path = tmp_path / "annotations" / "training" / "k002.png"
    path.write_bytes(path.read_bytes()[:-30])
    command = overrides(tmp_path, tmp_path / "run")
    assert trained(command) == [EXIT_USER_ERROR]
    assert "sample 'k002': not a readable .png image" in capfd.readouterr().err
    kept = [*command, "data.on_bad_sample=replace", "data.max_bad_fraction=0.5", f"run_dir={tmp_path / 'kept'}"]
    assert trained(kept) == [EXIT_DONE]
    assert [line["data/skipped_images"] for line in read_metrics(tmp_path / "kept")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["images", "annotations"])
def test_a_partner_that_is_missing_is_told_before_the_first_step(tmp_path, capfd, missing):
    write_pairs(tmp_path, 4)
    next((tmp_path / missing / "training").iterdir()).unlink()
    (code,) = trained([*overrides(tmp_path, tmp_path / "run"), "train.max_steps=1"])
    said = capfd.readouterr()
    if missing == "annotations":
        assert code == EXIT_USER_ERROR and "1 of 4 samples have no label image" in said.err
    else:
        assert code == EXIT_DONE and "1 label images below" in said.out + said.err
