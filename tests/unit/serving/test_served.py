"""What is served of each task's model: which number, in which unit, and what is said of it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from swinv2_train.config import ConfigError
from swinv2_train.serving.int8 import check_int8
from swinv2_train.serving.request import ServingRequest
from swinv2_train.serving.served import Served, check_served, described
from swinv2_train.tasks import build_task
from tests.support.configs import composed
from tests.support.evaluation import CLASSIFY, MODEL
from tests.support.segmenter import SEGMENT

CPU = torch.device("cpu")


def made(*overrides, normalise=False):
    torch.manual_seed(0)
    config = composed([*overrides, "run_dir=r", "data.shards=s"])
    task = build_task(config, CPU)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return config, task, Served(task, config, normalise).eval()


@torch.no_grad()
def test_numbers_are_in_the_units_of_their_labels():
    targets = (
        "task.target=regression", "task.num_classes=2", "task.value_mean=[10.0,-300.0]", "task.value_std=[2,50]",
        "task.label_smoothing=0", "task.cutmix_alpha=0",
    )  # fmt: skip
    config, task, served = made("task=classify", "data=cifar10", *MODEL, *targets)
    images = served.input_like(3, (16, 16))
    torch.testing.assert_close(served(images).double(), task.values(task.module(images)))
    assert described(config, task, served, None, False)["output"] == {
        "name": "values", "shape": ["batch", 2], "dtype": "float32",
    }  # fmt: skip


@torch.no_grad()
def test_pixels_are_normalised_inside_where_that_is_asked_for():
    config, task, served = made(*CLASSIFY, *MODEL, normalise=True)
    pixels = served.input_like(2, (16, 16))
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(served(pixels), task.module(task.normalise(pixels)))
    said = described(config, task, served, ("a", "b", "c", "d"), False)
    assert said["input"] == {"name": "images", "shape": ["batch", 3, 16, 16], "dtype": "uint8", "normalised": False}
    assert said["output"]["probabilities"] == "softmax" and said["classes"] == ["a", "b", "c", "d"]
    assert said["preprocessing"] == {
        "size": [16, 16], "crop": "centre", "crop_pct": 1.0, "interpolation": "bicubic",
        "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616], "scale": {"factor": 1 / 255, "offset": 0.0},
    }  # fmt: skip
    json.dumps(said, allow_nan=False)


@torch.no_grad()
def test_a_pretrained_encoder_is_served_as_its_features():
    config, task, served = made("task=simmim", "data=cifar10", "task.mask_unit_px=4", *MODEL)
    images = served.input_like(2, (16, 16))
    torch.testing.assert_close(served(images), task.encoder.pooled_features(images))
    assert described(config, task, served, None, True)["input"]["shape"] == ["batch", 3, "height", "width"]
    with pytest.raises(ConfigError, match="task=simmim has none; leave int8 out"):
        check_int8(config, ServingRequest("onnx", None, int8="dynamic"))


@torch.no_grad()
def test_a_segmentation_scores_every_pixel_and_has_one_size():
    config, task, served = made(*SEGMENT)
    images = served.input_like(2, (32, 32))
    said = served(images)
    assert list(said.shape[1:]) == described(config, task, served, None, False)["output"]["shape"][1:] == [5, 32, 32]
    torch.testing.assert_close(said, F.interpolate(task.module(images)["logits"], 32, mode="bilinear"))
    with pytest.raises(ConfigError, match=r"dynamic_size=true: the head .* set model.img_size=\[HEIGHT,WIDTH\]"):
        check_served(config, task, True)


def test_what_no_graph_can_hold_is_refused_with_another_way():
    config = composed(
        ["task=detect", "model=tiny", "data=labelled", "task.num_classes=3", "run_dir=r", "data.shards=s"]
    )
    with torch.device("meta"):
        task = build_task(config, CPU)
    with pytest.raises(ConfigError, match="task=detect: a detector chooses boxes .* swinv2-predict"):
        check_served(config, task, False)


def test_int8_asks_for_the_images_that_it_is_measured_on():
    config = composed([*CLASSIFY, *MODEL, "run_dir=r", "data.shards=s", "data.eval_shards=null"])
    with pytest.raises(
        ConfigError, match="int8=static needs images, and data.eval_shards names none; set data.eval_sh"
    ):
        check_int8(config, ServingRequest("onnx", None, int8="static"))
