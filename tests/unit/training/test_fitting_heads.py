"""What a detector takes of another detector's heads: all that fits, and the rest starts anew and is named."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.sources.matched import check_pixel_classes
from swinv2_train.training.initial_weights import fitting_heads
from swinv2_train.weights import match_weights, read_weights
from tests.support.configs import composed
from tests.support.detector import CASCADE, DETECT, detector


@pytest.mark.parametrize("after", [(), ("task.num_classes=7",), ("task.masks=false", "task.num_classes=7")], ids=str)
def test_all_of_a_detector_that_fits_is_taken(after: tuple[str, ...], tmp_path) -> None:
    """Objects365's detector has 365 classes and no masks; COCO's takes everything else of it."""
    first, second = detector(*CASCADE, *after), detector(*CASCADE)
    torch.save({f"{name}": tensor for name, tensor in first.module.state_dict().items()}, tmp_path / "first.pth")
    source = read_weights(tmp_path / "first.pth")
    own = second.module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    source, wanted, said = fitting_heads(source, shapes)
    weights, _ = match_weights(source, wanted, head="auto")
    theirs = first.module.state_dict()
    same = {name for name in theirs.keys() & own.keys() if theirs[name].shape == own[name].shape}
    assert set(weights) == same and all(torch.equal(weights[name], theirs[name]) for name in same)
    fresh = own.keys() - same
    assert bool(said) == bool(fresh) == bool(after)
    kinds = ("fc_cls", "fc_reg", "conv_logits", *(("mask_head",) if "task.masks=false" in after else ()))
    assert all(any(kind in name for kind in kinds) for name in fresh), sorted(fresh)
    assert all(str(len(fresh)) in line for line in said)


def test_sources_that_call_an_objects_class_otherwise_are_refused() -> None:
    task = composed([*DETECT, "run_dir=x", "data.shards=unused", "task.class_names=[bus,car,tram]"]).task
    assert task.pixel_classes == 3 and task.takes_fitting_heads
    with pytest.raises(ConfigError, match="calls class 0 of its pixels or objects 'car', which is 'bus'"):
        check_pixel_classes(("car", "bus"), task.pixel_class_names, "data.eval_shards", "the model's classes")


def test_other_heads_are_left_as_they_are(tmp_path) -> None:
    """SimMIM's decoder has none of these names, so the rules of all tasks hold."""
    shapes = {"decoder.a": (3,), "encoder.norm.weight": (4,)}
    torch.save(
        {"encoder.layers.0.blocks.0.norm1.weight": torch.ones(4), "decoder.0.weight": torch.ones(2, 2)},
        tmp_path / "s.pth",
    )
    try:
        source = read_weights(tmp_path / "s.pth")
    except ConfigError:
        pytest.fail("the sample must be readable")
    assert fitting_heads(source, shapes) == (source, shapes, [])
