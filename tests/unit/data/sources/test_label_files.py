"""Right classes from a file: which entry belongs to which sample, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.shards.tar_reader import Manifest, open_manifest
from swinv2_train.data.sources.label_files import read_label_overrides, with_labels
from tests.support.evaluation import make_images, write_images

IMAGENET = "val/ILSVRC2012_val_{:08d}"


@pytest.fixture
def shards(tmp_path):
    """shards(key): the manifest of 5 images with the keys key.format(1), ... in two shards."""

    def write(key: str = "{:03d}") -> Manifest:
        return open_manifest(write_images(tmp_path, "t", make_images(5, seed=0), [None] * 5, key))

    return write


def write(folder: Path, content: Any) -> str:
    path = folder / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_list_is_in_the_order_of_imagenets_validation_images(shards, tmp_path):
    """Entry n - 1 belongs to ILSVRC2012_val_0000000n, in whatever folder or shard; the rest belongs to none."""
    path = write(tmp_path, [[3], [], [1, 2], [0], [4], [9], [9]])
    overrides, unused, by_number = read_label_overrides(path, shards(IMAGENET), 5, "labels")
    keys = [IMAGENET.format(number) for number in range(1, 6)]
    assert overrides == dict(zip(keys, [(3,), (), (1, 2), (0,), (4,)], strict=True)) and unused == 2 and by_number


def test_an_object_is_by_sample_key(shards, tmp_path):
    path = write(tmp_path, {"005": [0], "001": [3], "002": [], "003": [1, 2], "004": [2], "other": [99]})
    overrides, unused, _ = read_label_overrides(path, shards(), 5, "labels")
    assert overrides == {"001": (3,), "002": (), "003": (1, 2), "004": (2,), "005": (0,)} and unused == 1


def test_classes_may_be_named_where_the_models_names_are_known(shards, tmp_path):
    """Names mean the same for every model; an unknown one is no class, and is named."""
    path = write(tmp_path, {"001": ["dog"], "002": [0], "003": [], "004": ["cat", "e\u0301t\u00e9"], "005": ["cat"]})
    names = ("cat", "dog", "\u00e9t\u00e9")
    source = shards()
    overrides, _, by_number = read_label_overrides(path, source, 3, "labels", names)
    assert overrides == {"001": (1,), "002": (0,), "003": (), "004": (0, 2), "005": (0,)} and by_number
    with pytest.raises(ConfigError, match=r"the class 'dog' of '001' is none of the model's; there are cat, cow"):
        read_label_overrides(path, source, 2, "labels", ("cat", "cow"))


WRONG = {
    "no file": (None, r"labels \(.*gone.json\) cannot be read: No such file"),
    "no JSON": ("[[1], [2]", r"is not JSON .*; it holds either a list .* or an object"),
    "another form": ("3", r"is a int; it holds either"),
    "too short a list": ([[1]] * 4, r"no entry for the sample '.*_00000005' \(the file has 4, the shards 5\)"),
    "keys of other images": ({"x": [1]}, r"no entry for the sample"),
    "a class of another model": ([[1]] * 4 + [[5]], r"the class 5 of '.*_00000005' is not within 0..4"),
    "a negative class": ([[1]] * 4 + [[-1]], r"the class -1 of"),
    "numbers for lists": ([1] * 5, r"the entry of '.*_00000001' is 1; it must be a list of classes"),
    "a name where there are none": ([["1"]] * 5, r"the class '1' of .* is none of the model's, for .* have no names"),
    "true for a number": ([[True]] * 5, r"is \[True\]; it must be a list"),
    "nothing right at all": ([[]] * 5, r"no image has a right class"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_belong_to_the_shards_is_refused(case, shards, tmp_path):
    """Scores by the wrong labels look like those of a bad model."""
    content, message = WRONG[case]
    path = str(tmp_path / "gone.json") if content is None else write(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_label_overrides(path, shards(IMAGENET), 5, "labels")
    assert "\n" not in str(caught.value)


def test_a_list_needs_imagenets_names(shards, tmp_path):
    """Any other order would be a guess."""
    with pytest.raises(ConfigError, match="sample key '001' does not end in ILSVRC2012_val_ and 8 digits; write the"):
        read_label_overrides(write(tmp_path, [[1]] * 5), shards(), 5, "labels")


def test_two_samples_of_one_key_are_refused(tmp_path):
    """Keys are unique within a shard only; one entry cannot be meant for both."""
    patterns = [write_images(tmp_path, name, make_images(1, seed=0), [None]) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="two samples of the shards have the key '001'"):
        read_label_overrides(write(tmp_path, {"001": [1]}), open_manifest("::".join(patterns)), 5, "labels")


def test_a_batch_takes_its_labels_and_leaves_out_what_has_none():
    """Padding rows have the key "" and weight 0 already; damaged samples keep their 0."""
    batch = {"keys": ["a", "b", "c", ""], "weight": torch.tensor([1.0, 1.0, 0.0, 0.0]), "labels": torch.zeros(4)}
    found = with_labels(batch, {"a": (4, 2), "b": (), "c": (1,)})
    assert found["labels"].tolist() == [[4, 2], [0, -1], [1, -1], [0, -1]]
    assert found["weight"].tolist() == [1, 0, 0, 0] and batch["weight"].tolist() == [1, 1, 0, 0]
