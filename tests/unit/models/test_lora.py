"""Adapters against the formula in float64 and against peft's, and what a model with them computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from swinv2_train.models import swin_v2
from swinv2_train.models.attention import QkvLinear
from swinv2_train.models.lora import LoraLinear, add_adapters, is_adapter, merged_weight

TARGETS = ("qkv", "proj", "fc1", "fc2")
SMALL = {"img_size": 24, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}
ATOL = 2e-6  # measured worst 3e-7; without the adapters 4e-2


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("base", [nn.Linear(5, 7), nn.Linear(9, 4, bias=False), QkvLinear(5)])
def test_output_and_gradients_are_those_of_the_formula(base):
    """y = x W' + b + alpha / r x A' B' by hand, also where the bias comes with the call."""
    layer = randomised(LoraLinear(base, 3, 7 / 3).double())
    x = torch.randn(2, 3, base.in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(base.out_features, dtype=torch.float64) if isinstance(base, QkvLinear) else None
    d_out = torch.randn(2, 3, base.out_features, dtype=torch.float64)
    out = layer(x) if bias is None else layer(x, bias)
    out.backward(d_out)
    whole = layer.weight + 7 / 3 * layer.lora_B @ layer.lora_A
    own = bias if bias is not None else 0 if layer.bias is None else layer.bias
    assert torch.allclose(out, x @ whole.T + own, atol=1e-12)
    assert torch.allclose(x.grad, d_out @ whole, atol=1e-12)
    rows, d_rows = x.detach().flatten(0, 1), d_out.flatten(0, 1)
    assert torch.allclose(layer.lora_A.grad, 7 / 3 * layer.lora_B.T @ d_rows.T @ rows, atol=1e-12)
    assert torch.allclose(layer.lora_B.grad, 7 / 3 * d_rows.T @ rows @ layer.lora_A.T, atol=1e-12)
    assert torch.allclose(merged_weight(layer.weight, layer.lora_A, layer.lora_B, 7 / 3), whole, atol=1e-12)


def test_equals_pefts_layer():
    """peft is no dependency; where somebody has it, its layer computes the same."""
    peft = pytest.importorskip("peft.tuners.lora")
    ours = randomised(LoraLinear(nn.Linear(5, 7), 3, 4 / 3))
    base = nn.Linear(5, 7)
    base.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    theirs = peft.Linear(base, "default", config=peft.LoraConfig(r=3, lora_alpha=4), r=3, lora_alpha=4)
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B)
    x = torch.randn(4, 5)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours.lora_A.grad, theirs.lora_A["default"].weight.grad, atol=1e-5)
    assert torch.allclose(ours.lora_B.grad, theirs.lora_B["default"].weight.grad, atol=1e-5)


@pytest.mark.parametrize("attention", [{}, {"fused_attention": True}, {"sequential_stages": (1, 2)}])
def test_a_model_starts_as_its_base_and_is_the_base_with_merged_weights_later(attention):
    """Whatever attends; and a backward pass gives gradients to the adapters and the head alone."""
    base = randomised(swin_v2("demo", num_classes=3, **SMALL, **attention)).eval()
    model, images = copy.deepcopy(base), torch.randn(2, 3, 24, 20)
    add_adapters(model, 2, 8.0, TARGETS)
    assert torch.equal(model(images), base(images))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {n for n in dict(model.named_parameters()) if is_adapter(n) or n.startswith("head.")}
    assert sum(map(is_adapter, names)) == 3 * 4 * 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model(images).sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert got == names
    state = model.state_dict()
    merged = {name: value for name, value in state.items() if not is_adapter(name)}
    for layer in {name.rpartition(".")[0] for name in state if is_adapter(name)}:
        parts = (state[f"{layer}.{part}"] for part in ("weight", "lora_A", "lora_B"))
        merged[f"{layer}.weight"] = merged_weight(*parts, 4.0)
    plain = copy.deepcopy(base)
    plain.load_state_dict(merged)
    assert torch.allclose(model(images), plain(images), atol=ATOL)
    assert not torch.allclose(model(images), base(images), atol=1e-2)


def test_a_rank_larger_than_a_layer_changes_nothing():
    model = swin_v2("demo", num_classes=3, **SMALL)
    with pytest.raises(ValueError, match="the narrowest layer has 8 channels; set at most 8"):
        add_adapters(model, 9, 8.0, ("fc1",))
    assert all(parameter.requires_grad for parameter in model.parameters())
