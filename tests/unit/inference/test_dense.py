"""Maps of classes and objects of a loaded model: those that its task is scored by, in pixels of the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import swinv2_train
from swinv2_train.config import ConfigError
from swinv2_train.data.sample import Targets
from swinv2_train.tasks.metrics import CONFUSION
from tests.support.configs import composed
from tests.support.detection import NAMES, object_shards, scene
from tests.support.detector import DETECT
from tests.support.detector import randomised as random_detector
from tests.support.segmenter import CLASSES, MODES, SEGMENT, png, randomised, scenes, write_scenes
from tests.support.small_run import run_alone


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    """Directories of runs of one step."""
    folder = tmp_path_factory.mktemp("runs")
    shards = {
        "segment": (*SEGMENT, f"data.shards={write_scenes(folder / 'train.tar', scenes(6))}"),
        "detect": (*DETECT, object_shards(folder, 6, 1)[0], f"task.class_names=[{','.join(NAMES)}]"),
    }
    found = {}
    for name, words in shards.items():
        found[name] = str(folder / name)
        common = ("engine=local", "train.max_steps=1", "optim.schedule.warmup_steps=0")
        assert run_alone(composed([*words, *common, f"run_dir={found[name]}"])) == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "slide over scales and flip"])
def test_a_map_has_the_images_size_and_the_classes_it_is_scored_by(mode, runs):
    model = swinv2_train.load(runs["segment"], *MODES[mode], "task.reduce_zero_label=true", device="cpu")
    randomised(model.task)
    pairs = scenes(4, seed=3)
    answers = model.predict([image for image, _ in pairs], batch_size=3)
    transform = model.task.eval_transform
    for (image, labels), answer in zip(pairs, answers, strict=True):
        row = transform(torch.from_numpy(image).permute(2, 0, 1), Targets(segmentation=png(labels)), None)
        batch = {name: [value] for name, value in row.items()} | {"weight": torch.ones(1)}
        with torch.no_grad():
            counted = model.task.scores(model._forward, batch)[CONFUSION].values[0].numpy()
        known = labels > 0
        expected = np.zeros((CLASSES, CLASSES), int)
        np.add.at(expected, (labels[known].astype(int) - 1, answer.classes[known]), 1)
        assert answer.classes.shape == labels.shape and answer.classes.dtype == np.uint8
        assert np.array_equal(counted, expected) and len(answer.labels) > 1
        assert answer.pixels == {number: int((answer.classes == number).sum()) for number in answer.labels}
        assert list(answer.pixels.values()) == sorted(answer.pixels.values(), reverse=True)
    assert model.features(pairs[0][0]).shape == (64,)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_scores_that_are_no_numbers_name_nothing(runs, task):
    """The first class would always be the highest, and a detector would find nothing in any image."""
    model = swinv2_train.load(runs[task], device="cpu")
    with torch.no_grad():
        next(model.module.parameters()).fill_(torch.nan)
    with pytest.raises(ConfigError, match="are not finite numbers"):
        model.predict(np.zeros((40, 50, 3), np.uint8))


def test_objects_have_boxes_masks_and_names_in_pixels_of_the_image(runs):
    model = swinv2_train.load(runs["detect"], "task.score_threshold=0.0", device="cpu")
    random_detector(model.task)
    images = [scene(number, (50, 40 + number))[0] for number in (1, 2)]
    answers = model.predict([images[0], Image.fromarray(images[1])])
    for image, answer in zip(images, answers, strict=True):
        height, width = image.shape[:2]
        view = model.transform(torch.from_numpy(image).permute(2, 0, 1), Targets(), None)
        with torch.no_grad():
            expected = model.task.found(model._forward, view["views"], (height, width))
        assert len(answer.boxes) == len(answer.scores) == len(answer.labels) > 0
        assert np.array_equal(answer.boxes, expected.boxes) and np.array_equal(answer.scores, expected.scores)
        assert answer.labels == tuple(NAMES[number] for number in expected.classes)
        assert answer.masks.shape == (len(answer.boxes), height, width) and answer.masks.any()
        assert (answer.boxes[:, 2:] <= (width, height)).all() and (answer.boxes >= 0).all()
        for mask, (x0, y0, x1, y1) in zip(answer.masks, answer.boxes, strict=True):
            rows, columns = np.nonzero(mask)
            assert not len(rows) or (rows.min() >= y0 - 1 and rows.max() <= y1)
            assert not len(rows) or (columns.min() >= x0 - 1 and columns.max() <= x1)
        assert np.array_equal(answer.row()["boxes"], answer.boxes)
    assert model.predict([]) == []
