"""What Grad-CAM is asked of, by task: the scores of what the model itself says, or of the class that is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.tasks import build_task
from tests.support.configs import composed
from tests.support.evaluation import CLASSIFY, MODEL
from tests.support.segmenter import SEGMENT

NUMBERS = ("task.label_smoothing=0", "task.cutmix_alpha=0")
LOGITS = torch.tensor([[0.5, 3.0, -1.0, 1.0]])


def name(number: int) -> str:
    return "abcde"[number]


def task_of(*words: str) -> Any:
    return build_task(composed([*words, "run_dir=x", "data.shards=x"]), torch.device("cpu"))


def classifier(*words: str) -> Any:
    return task_of(*CLASSIFY, *MODEL, *words)


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [
        ((), None, [("b: 80.9 %", 1)]),
        ((), 3, [("d: 11.0 %", 3)]),
        (("task.target=multilabel", "task.threshold=0.7"), None, [("b: 95.3 %", 1), ("d: 73.1 %", 3)]),
        (("task.target=multilabel", "task.threshold=0.99"), None, [("b: 95.3 %", 1)]),  # none applies
        (
            ("task.target=regression", "task.value_mean=[1,2,3,4]", "task.value_std=[2,2,2,2]", *NUMBERS),
            None,
            [("value a: 2", 0), ("value b: 8", 1), ("value c: 1", 2), ("value d: 6", 3)],
        ),
    ],
)
def test_a_classifier_is_asked_of_what_it_says(words, number, expected):
    found = classifier(*words).evidence(LOGITS, number, name)
    assert [(each.text, float(each.score)) for each in found] == [(text, float(LOGITS[0, at])) for text, at in expected]


def test_a_segmenter_is_asked_of_the_pixels_that_get_a_class():
    """The commonest class first; of a class that no pixel gets, all pixels."""
    logits = torch.zeros(1, 5, 2, 3)
    logits[0, 2, 0] = torch.tensor([1.0, 2.0, 3.0])  # class c gets the first row and one more pixel, e the rest
    logits[0, 2, 1] = torch.tensor([5.0, 0.5, 0.5])  # what it has at pixels of others does not count
    logits[0, 4, 1, 1:] = 7.0
    logits[0, 1] = -1.0
    evidence = task_of(*SEGMENT).evidence
    found = evidence({"logits": logits}, None, name)
    assert [(each.text, float(each.score)) for each in found] == [
        ("c: 66.7 % of the pixels", 11.0), ("e: 33.3 % of the pixels", 14.0),
    ]  # fmt: skip
    (absent,) = evidence({"logits": logits}, 1, name)
    assert (absent.text, float(absent.score)) == ("b: 0.0 % of the pixels", -6.0)


def test_scores_that_are_no_numbers_explain_nothing():
    with pytest.raises(ConfigError, match="not finite numbers"):
        classifier().evidence(torch.full((1, 4), torch.nan), None, name)
