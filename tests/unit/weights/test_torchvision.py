"""torchvision's own SwinV2, and Satlas' files in its names: into our model, the same numbers out."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2, swin_v2
from swinv2_train.weights import load_weights, read_weights
from tests.support.weights_samples import SMALL, randomise

OURS = SMALL | {"img_size": 128}  # a last map of 4: torchvision pads a map that is smaller than the window


def small_torchvision(**overrides) -> SwinTransformer:
    theirs = SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2, 2, 3, 2], num_heads=[1, 2, 4, 8], window_size=[4, 4],
        num_classes=7, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **overrides,
    ).eval()  # fmt: skip
    randomise(theirs, largest_logit_scale=3.0)
    return theirs


def assert_same_logits(ours, theirs, images):
    with torch.no_grad():
        expected, found = theirs(images), ours.eval()(images)
    assert expected.std() > 0.05, "constant outputs would compare equal whatever the weights"
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    assert worst < 1e-5, worst  # measured worst 2e-6, in fp32


@pytest.mark.parametrize(
    "size",
    ["tiny", pytest.param("small", marks=pytest.mark.slow), pytest.param("base", marks=pytest.mark.slow)],
)
def test_torchvisions_own_models_give_the_same_logits(tmp_path, size):
    """With every weight at random; the keys' third of the bias too, which torchvision zeroes when it runs."""
    theirs = getattr(torchvision.models, f"swin_v2_{size[0]}")(weights=None).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith(
                "bias"
            ):  # the others are at random, and of a size that keeps logits finite
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    model = swin_v2(size, img_size=256, window_size=8)
    report = load_weights(model, tmp_path / "a.pth")
    assert report.format == "torchvision" and not report.missing and not report.unexpected
    assert report.converted["layers.1.blocks.1.attn.v_bias"] == "features.3.1.attn.qkv.bias"
    assert_same_logits(model, theirs, torch.randn(1, 3, 256, 256, generator=generator))


@pytest.mark.parametrize("prefix", ["", "backbone.backbone.", "model.", "module."])
def test_satlas_names_with_nine_bands_and_no_head_are_read(tmp_path, prefix):
    """torchgeo publishes torchvision's names; Satlas' own files have a detector's prefix and its other parts beside."""
    theirs = small_torchvision()
    theirs.features[0][0] = torch.nn.Conv2d(9, 8, 4, 4)
    randomise(theirs, largest_logit_scale=3.0)
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("head.")}
    if prefix.startswith("backbone"):
        state["fpn.layers.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": state} if prefix == "module." else state, tmp_path / "a.pth")
    model = SwinTransformerV2(**OURS, in_chans=9)
    report = load_weights(model, tmp_path / "a.pth", head="fresh")
    assert report.missing == ("head.weight", "head.bias") and not report.unexpected
    assert ("fpn.*" in report.left_out) == prefix.startswith("backbone")
    theirs.head = torch.nn.Identity()
    model.head = torch.nn.Identity()
    assert_same_logits(model, theirs, torch.randn(2, 9, 128, 128))


def test_the_middle_third_of_the_bias_counts_nothing_and_the_rest_is_each_one_s_place(tmp_path):
    state = small_torchvision().state_dict()
    bias = torch.arange(24.0)
    state["features.1.0.attn.qkv.bias"] = bias
    torch.save(state, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert torch.equal(weights["layers.0.blocks.0.attn.q_bias"], bias[:8])
    assert torch.equal(weights["layers.0.blocks.0.attn.v_bias"], bias[16:])


def test_broken_torchvision_files_are_named(tmp_path):
    def refused(match, **changes):
        state = small_torchvision().state_dict()
        for name, value in changes.items():
            state.pop(name) if value is None else state.update({name: value})
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(ConfigError, match=match):
            load_weights(SwinTransformerV2(**OURS), tmp_path / "a.pth")

    refused(r"1 missing: layers.0.blocks.1.mlp.fc2.bias", **{"features.1.1.mlp.3.bias": None})
    refused(r"features.3.0.attn.qkv.bias is \(25,\) .* fetch", **{"features.3.0.attn.qkv.bias": torch.zeros(25)})
    refused("unexpected: features.2.0.norm.weight", **{"features.2.0.norm.weight": torch.zeros(16)})
    refused("holds 1.* tensors", **{"features.1.99999.norm1.weight": torch.zeros(16)})
    refused("weights of Swin V1", **{"features.1.0.attn.relative_position_bias_table": torch.zeros(16, 3)})
