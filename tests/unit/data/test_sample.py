"""A sample's targets by name: which member gives which, and what becomes of one that is missing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_train.data.loading.pipe_loader import build_train_loader
from swinv2_train.data.sample import (
    EXAMPLE_PX,
    MEMBERS,
    SEGMENTATION,
    Member,
    SampleError,
    example_targets,
    labelled,
    read_label,
    read_targets,
)
from swinv2_train.data.sources.pipe import open_stream, read_command
from tests.support.configs import make_config
from tests.support.shard_files import image_bytes, write_plain_tar

CONFIG = make_config(data={"num_workers": 0, "shuffle_buffer_images": 1}).data


@pytest.mark.parametrize(
    ("content", "label"),
    [(b"7", 7), (b" 12\n", 12), (b"0", 0), (b"-1", None), (b"cat", None), (b"", None), (b"1" * 65, None),
     (str(2**63).encode(), None)],
)  # fmt: skip
def test_a_label_is_a_non_negative_integer_or_none(content, label):
    assert read_label(content) == label
    assert read_targets({"cls": content, "jpg": b"x"}) == ({} if label is None else {"label": label})


def test_an_image_without_its_class_has_no_target():
    assert labelled(3) == {"label": 3} and labelled(0) == {"label": 0} and labelled(-1) == labelled(-2) == {}
    assert example_targets(("label",)) == {"label": 0} and example_targets(()) == {} and read_targets({}) == {}


def test_the_example_of_a_label_image_is_one_of_the_examples_image():
    """The loader makes a row of both to know what rows look like."""
    with Image.open(io.BytesIO(example_targets((SEGMENTATION,))["segmentation"])) as image:
        assert image.format == "PNG" and not np.asarray(image).any() and image.size == (EXAMPLE_PX, EXAMPLE_PX)


def test_another_kind_of_target_is_an_entry_of_the_members(monkeypatch, tmp_path):
    """It reaches the transform beside the label; a sample without it is damaged for a transform that needs it."""
    monkeypatch.setitem(MEMBERS, "caption", Member("txt", lambda content: content.decode() or None, example=""))
    members = [("a.png", image_bytes(1)), ("a.cls", b"4"), ("a.txt", b"a cat")]
    whole = write_plain_tar(tmp_path / "whole.tar", members)
    assert [sample.targets for sample in read_command(f"cat {whole}")] == [{"label": 4, "caption": "a cat"}]

    class Transform:
        needs = ("label", "caption")

        def __call__(self, image: torch.Tensor, targets: Any, rng: Any) -> dict[str, Any]:
            return {"length": torch.tensor(len(targets["caption"]) + targets["label"])}

    def batch(path: Any) -> dict[str, Any]:
        return next(iter(build_train_loader(open_stream(f"pipe:cat {path}"), CONFIG, Transform(), 0, 2, 2, 0, 1, 0)))

    assert batch(whole)["length"].tolist() == [9, 9]
    with pytest.raises(SampleError, match=r"sample 'a': no readable caption \(.txt\); repair it"):
        batch(write_plain_tar(tmp_path / "empty.tar", [*members[:2], ("a.txt", b"")]))
