"""Which layer is named when an output or a gradient is not finite; and what is refused of a kept step."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from swinv2_train.config import ConfigError
from swinv2_train.training.bad_step import read_bad_step
from swinv2_train.training.not_finite import watching


class Divides(nn.Module):
    """x / x.sum() between two layers: what no layer of its own computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.second(x / x.sum(1, keepdim=True))


def model() -> nn.Sequential:
    layers = nn.Sequential(Divides(), nn.ReLU(inplace=True), nn.Linear(3, 2))
    for parameter in layers.parameters():
        nn.init.ones_(parameter)
    return layers


def seen(layers, images, keys=("a", "b"), loss=torch.sum):
    with watching(layers) as found:
        for batch in found.marked([{"images": torch.ones(2, 3), "keys": list(keys)}, {"images": images, "keys": keys}]):
            loss(layers(batch["images"])).backward()
    assert all(not child._forward_hooks and not child._forward_pre_hooks for child in layers.modules())
    return found


def test_the_first_layer_whose_output_is_not_finite_and_its_images_are_named():
    layers = model()
    images = torch.ones(2, 3)
    images[1] = 3e38  # the sum of three is beyond float32
    found = seen(layers, images)
    assert found.forward == "micro-batch 2: the output of 0.first (Linear)" and found.images == ["b"]


def test_what_a_layer_computes_between_its_layers_is_named_by_these():
    found = seen(model(), torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]]))
    assert found.forward == "micro-batch 2: what 0 computes before 0.second" and found.images == ["a"]


def test_an_input_that_is_not_finite_is_no_layers_fault():
    images = torch.ones(2, 3)
    images[0, 1] = torch.nan
    found = seen(model(), images)
    assert found.forward == "micro-batch 2: the input of the model" and found.images == ["a"]


def test_a_gradient_is_named_where_every_output_is_finite():
    def loss(x):
        return (x.sum() - x.sum().detach()).abs().sqrt()  # 0 with an infinite slope

    found = seen(model(), torch.ones(2, 3), loss=loss)
    assert found.forward is None and found.backward == "micro-batch 1: the gradient of the output of 2"
    found = seen(model(), torch.ones(2, 3))
    assert found.forward is None and found.backward is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"step": 3, "cause": "x", "images": []}', '{"step": 2, "images": 5}']
)
def test_a_record_that_no_run_wrote_is_one_message(tmp_path, text):
    (tmp_path / "step_00000002.json").write_text(text)
    with pytest.raises(ConfigError, match="step_00000002.json is no record of a step"):
        read_bad_step(tmp_path, 2)
    (tmp_path / "step_00000002.json").write_text(json.dumps({"step": 2, "cause": "x", "images": [[[["s.tar", "k"]]]]}))
    assert read_bad_step(tmp_path, 2).images == [[[("s.tar", "k")]]]
