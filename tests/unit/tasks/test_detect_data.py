"""From shards with objects to losses, average precision and pictures: the loaders' batches are what detectors take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.loader import EvalLoader, TrainLoader
from swinv2_train.data.sample import SampleError
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.evaluation.scoring import evaluate_loader
from tests.support.configs import composed
from tests.support.detection import object_shards, scene
from tests.support.detector import DETECT, detector


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    train, test = object_shards(tmp_path_factory.mktemp("objects"))
    return train.partition("=")[2], test.partition("=")[2]


def train_loader(task: Any, shards: tuple[str, str], rank: int = 0, ranks: int = 1) -> TrainLoader:
    data = composed([*DETECT, "run_dir=x", "data.shards=unused"]).data
    return TrainLoader(open_manifest(shards[0]), data, task.train_transform, 7, 4, 2, rank, ranks, 0)


def test_a_training_batch_is_what_the_task_plans_and_learns_from(shards: tuple[str, str]) -> None:
    task = detector()
    batch = next(iter(train_loader(task, shards)))
    for name, meta in task.meta_batch(2).items():
        assert (batch[name].shape, batch[name].dtype) == (meta.shape, meta.dtype), name
    assert (batch["classes"] >= 0).any() and batch["masks"].any()
    assert torch.isfinite(task.loss(task.module.train(), batch))
    with torch.no_grad():
        picture = task.picture(task.module.eval(), batch)
    assert picture.dtype == np.uint8 and picture.shape[1] > 700


def test_views_do_not_depend_on_the_rank_that_draws_them(shards: tuple[str, str]) -> None:
    """A sample's view is a function of the seed, the epoch and the sample."""

    def drawn(ranks: int) -> dict[str, torch.Tensor]:
        found = {}
        for rank in range(ranks):
            batches = iter(train_loader(detector("task.masks=false"), shards, rank, ranks))
            for _ in range(2 // ranks):
                batch = next(batches)
                found |= {key: batch["boxes"][place] for place, key in enumerate(batch["keys"])}
        return found

    alone, two = drawn(1), drawn(2)
    assert alone.keys() == two.keys() and all(torch.equal(alone[key], two[key]) for key in alone)


def test_detections_are_scored_against_the_objects_of_their_images(shards: tuple[str, str]) -> None:
    """A detector that says what is there has an average precision of 100; a random one has not."""
    task = detector("task.detections=8")
    data = composed([*DETECT, "run_dir=x", "data.shards=unused"]).data
    scores = []
    for knows in (False, True):
        loader = EvalLoader(open_manifest(shards[1]), data, task.eval_transform, 3, 0, 1)

        def score(batch: Any, knows: bool = knows) -> Any:
            if knows:
                truths = iter(batch["truth"])
                task.found = lambda *_, **__: told(next(truths))
            return task.scores(task.module.eval(), batch)

        with torch.no_grad():
            scores.append(evaluate_loader(score, loader))
    assert scores[1]["val/box_ap"] == scores[1]["val/mask_ap"] == 100
    assert 0 <= scores[0]["val/box_ap"] < 60 and 0 <= scores[0]["val/mask_ap50"] < 90
    assert [number for number in range(101, 105) if len(scene(number)[1].boxes)] == [101, 102, 103, 104]


def told(truth: Any) -> Any:
    from swinv2_train.tasks.detections import Found

    return Found(truth["boxes"], np.ones(len(truth["boxes"]), np.float32), truth["classes"], truth["masks"])


def test_more_objects_than_places_are_said_once_and_too_few_classes_refused(
    shards: tuple[str, str], caplog: Any
) -> None:
    task = detector("task.max_objects=1", "task.resize_scale=[1.0,1.0]")
    batches = iter(train_loader(task, shards))
    for _ in range(4):
        next(batches)
    said = [record.message for record in caplog.records if "task.max_objects (1)" in record.message]
    assert len(said) == 1
    task = detector("task.num_classes=1")
    with pytest.raises(SampleError, match=r"class 1, but task.num_classes \(1\) knows 0 to 0"):
        for _ in range(4):
            next(iter(train_loader(task, shards)))


def test_the_best_of_masks_is_refused_without_masks() -> None:
    with pytest.raises(ConfigError, match="train.keep_best .val/mask_ap. is of masks"):
        composed([*DETECT, "run_dir=x", "data.shards=unused", "data.eval_shards=unused", "task.masks=false",
                  "train.keep_best=val/mask_ap"])  # fmt: skip
