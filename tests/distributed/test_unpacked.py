"""Folders of images and saved data sets under the train command: resumed on another number of ranks, in mid-epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swinv2_train.train import train as train_run
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.images import image_bytes

CLASSES, PER_CLASS = 5, 8
SMALL = (
    "experiment=cifar10_finetune", "task.init_from=null", "task.num_classes=5", "model.embed_dim=8",
    "model.depths=[1,1]", "model.num_heads=[1,2]", "model.img_size=16", "model.window_size=2",
    "train.global_batch_size=12", "train.micro_batch_size=6", "train.log_every_steps=1",
    "train.checkpoint_every_steps=3", "train.picture_every_steps=99", "train.keep_best=null", "data.record_keys=true",
    "log.wandb=disabled", "log.progress=none", "engine.precision=fp32", "engine.zero_stage=1",
    "runtime.num_threads=1", "runtime.process_group_timeout_sec=60",
)  # fmt: skip


def image(label: int, number: int) -> bytes:
    return image_bytes(label * 100 + number, size=(16, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder") / "train"
    for label in range(CLASSES):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(PER_CLASS):
            (root / f"class{label}" / f"{number}.png").write_bytes(image(label, number))
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    from datasets import ClassLabel, Dataset, Features, Image

    directory = tmp_path_factory.mktemp("saved") / "train"
    cells = [{"bytes": image(label, number), "path": None} for label in range(CLASSES) for number in range(PER_CLASS)]
    labels = [label for label in range(CLASSES) for _ in range(PER_CLASS)]
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class{label}" for label in range(CLASSES)])})
    Dataset.from_dict({"image": cells, "label": labels}, features=features).save_to_disk(str(directory))
    return directory


def keys_of(run_dir: Path, size: int) -> dict[int, list[str]]:
    """The images of each step, of all ranks, sorted."""
    found: dict[int, list[str]] = {}
    for rank in range(size):
        for line in (run_dir / "sample_keys" / f"rank_{rank:05d}.jsonl").read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["keys"])
    return {step: sorted(keys) for step, keys in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_a_run_goes_on_with_the_next_image_on_another_number_of_ranks(kind, request, tmp_path):
    """2 ranks for three steps, then 1 rank with a worker: every step has the images of the run that nobody disturbed,
    each epoch has every image once, and the evaluation counts every one."""
    source = request.getfixturevalue(kind)

    def start(size: int, run_dir: Path, *changes: str) -> None:
        shards = (f"data.shards={source}", f"data.eval_shards={source}", f"run_dir={run_dir}")
        config = composed([*SMALL, *shards, *changes])
        assert run_distributed(lambda world: train_run(config), size, init=False) == [0] * size

    start(1, tmp_path / "plain", "train.max_steps=10", "train.eval_every_steps=null")
    planned = keys_of(tmp_path / "plain", 1)
    start(2, tmp_path / "run", "train.max_steps=3", "train.eval_every_steps=3")
    first = keys_of(tmp_path / "run", 2)
    start(1, tmp_path / "run", "train.max_steps=10", "train.eval_every_steps=5", "data.num_workers=1")
    second = keys_of(tmp_path / "run", 1)
    assert first == {step: planned[step] for step in (1, 2, 3)}
    assert {step: second[step] for step in range(4, 11)} == {step: planned[step] for step in range(4, 11)}
    seen = [key for step in range(1, 11) for key in planned[step]]
    assert {seen.count(key) for key in seen} == {3} and len(set(seen)) == CLASSES * PER_CLASS  # 120 of 40 images
