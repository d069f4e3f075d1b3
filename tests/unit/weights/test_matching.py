"""Which weights go where: heads as told, and what a file that does not fit is told."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2, swin_v2
from swinv2_train.weights import LoadReport, load_weights, save_weights
from tests.support.weights_samples import SMALL, assert_same, classifier, mmpretrain, simmim, state_of

# --------------------------------------------------------------------------------------------------------------------
# Heads


def test_rows_of_a_larger_head_are_gathered_by_an_index_file(tmp_path):
    """ImageNet-22K to 1K: one index a line, as in the official map22kto1k.txt."""
    large = classifier(num_classes=20)
    save_weights(large, tmp_path / "large.safetensors", "timm")
    rows = [19, 3, 3, 0, 11, 5, 6]
    (tmp_path / "map.txt").write_text("\n".join(str(row) for row in rows) + "\n")
    model = SwinTransformerV2(**SMALL)
    with pytest.raises(
        ConfigError, match=r"head\.bias is \(20,\), the model has \(7,\); head=fresh .* head=FILE takes the rows"
    ):
        load_weights(model, tmp_path / "large.safetensors", head="auto")
    for head in (tmp_path / "map.txt", rows):
        load_weights(model, tmp_path / "large.safetensors", head=head)
        assert torch.equal(model.head.weight, large.head.weight[rows])
        assert torch.equal(model.head.bias, large.head.bias[rows])
    assert torch.equal(model.norm.weight, large.norm.weight)

    def refused(content, match, target=model):
        (tmp_path / "map.txt").write_text(content)
        with pytest.raises(ConfigError, match=match):
            load_weights(target, tmp_path / "large.safetensors", head=tmp_path / "map.txt")

    refused("1\n2\n", "2 class indices for a model of 7 classes")
    refused("1\n2\n3\n4\n5\n6\n20\n", "class index 20 is outside of the 20 classes")
    refused("1\n2\n3\n4\n5\n6\n-1\n", "class index -1 is outside")
    refused("n01440764\n", "not a list of class indices")
    refused("1\n", "no classification head", classifier(num_classes=0))
    with pytest.raises(ConfigError, match=r"head \(.*absent\.txt\): not a list of class indices"):
        load_weights(model, tmp_path / "large.safetensors", head=tmp_path / "absent.txt")
    save_weights(classifier(num_classes=0), tmp_path / "headless.safetensors", "timm")
    with pytest.raises(ConfigError, match="has no head to take rows from"):
        load_weights(model, tmp_path / "headless.safetensors", head=rows)


@pytest.mark.parametrize(
    "head", ["frehs", "", "map.txt", None, 5, b"load", [0, 1, 2, 3, 4, 5, 6.0], [True] * 7, ["0"] * 7]
)
def test_a_head_that_means_nothing_is_refused_before_anything_changes(tmp_path, head):
    """A mistyped word would otherwise load the file's head."""
    save_weights(classifier(), tmp_path / "a.safetensors", "microsoft")
    model = SwinTransformerV2(**SMALL)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"head \(.*\) must be one of load, auto, fresh, .* or the Path of a file"):
        load_weights(model, tmp_path / "a.safetensors", head=head)
    assert_same(before, state_of(model))


def test_heads_are_loaded_kept_fresh_or_left_out_as_told(tmp_path):
    save_weights(classifier(), tmp_path / "a.safetensors", "microsoft")
    source = state_of(classifier())

    def load(head, **overrides):
        model = SwinTransformerV2(**{**SMALL, **overrides})
        before = state_of(model)
        return load_weights(model, tmp_path / "a.safetensors", head=head), before, state_of(model)

    for head in ("load", "auto"):
        report, _, after = load(head)
        assert_same(source, after)
        assert not report.missing and not report.left_out
    report, before, after = load("fresh")
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert torch.equal(source["norm.bias"], after["norm.bias"])
    assert report.missing == ("head.weight", "head.bias") and set(report.left_out) == set(report.missing)
    load("fresh", num_classes=9)
    for head in ("load", "auto"):
        with pytest.raises(ConfigError, match=r"head\.bias is \(7,\), the model has \(9,\); head=fresh"):
            load(head, num_classes=9)
    report, _, _ = load("load", num_classes=0)
    assert set(report.left_out) == {"head.weight", "head.bias"} and not report.missing


def test_pretraining_goes_on_from_a_supervised_backbone_when_told(tmp_path):
    save_weights(classifier(), tmp_path / "a.safetensors", "microsoft")
    model = simmim()
    with pytest.raises(ConfigError, match="has no SimMIM decoder or mask token .*; head=fresh"):
        load_weights(model, tmp_path / "a.safetensors")
    for head, strict in (("auto", True), ("fresh", True), ("load", False)):
        report = load_weights(model, tmp_path / "a.safetensors", head=head, strict=strict)
        assert set(report.missing) == {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
        assert set(report.left_out) == {"head.weight", "head.bias"}
    assert torch.equal(model.encoder.norm.weight, classifier().norm.weight)


# --------------------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize(
    "ours, told",
    [
        ({"embed_dim": 16, "num_heads": (1, 2, 4, 8)}, r"The file has embed_dim 8; the model has embed_dim 16"),
        ({"depths": (2, 2, 5, 2)}, r"The file has depths \(2, 2, 3, 2\); the model has depths \(2, 2, 5, 2\)"),
        ({"depths": (2, 2, 2, 2)}, r"[0-9]+ unexpected: layers\.2\.blocks\.2\.attn\.cpb_mlp\.0\.bias \(512,\)"),
        (
            {"num_heads": (2, 4, 8, 16)},
            r"The file has num_heads \(1, 2, 4, 8\); the model has num_heads \(2, 4, 8, 16\)",
        ),
        ({"mlp_ratio": 2.0}, r"The file has mlp_ratio 4\.0; the model has mlp_ratio 2\.0"),
        ({"patch_size": 2, "img_size": 32}, r"The file has patch_size 4; the model has patch_size 2"),
        ({"in_chans": 1}, r"patch_embed\.proj\.weight is \(8, 3, 4, 4\), the model has \(8, 1, 4, 4\)"),
        ({"qkv_bias": False}, r"18 unexpected: .*q_bias.* The file has qkv_bias True; the model has qkv_bias False"),
        (
            {"extra_norm_period": 2},
            r"8 missing: .*norm3\.weight.* The file has extra_norm_period 0; the model has .* 2",
        ),
    ],
)
def test_a_model_of_another_shape_is_told_what_differs(tmp_path, ours, told):
    save_weights(classifier(), tmp_path / "a.safetensors", "microsoft")
    model = SwinTransformerV2(**{**SMALL, **ours})
    before = state_of(model)
    with pytest.raises(ConfigError, match=f"a.safetensors does not fit the model: .*{told}") as caught:
        load_weights(model, tmp_path / "a.safetensors", head="fresh")
    assert_same(before, state_of(model))
    assert len(str(caught.value)) < 900


def test_a_published_size_is_called_by_its_name(tmp_path):
    with torch.device("meta"):
        base, tiny = swin_v2("base"), swin_v2("tiny")
    shapes = {name: torch.zeros(()).expand(value.shape) for name, value in base.state_dict().items()}
    torch.save({"model": shapes}, tmp_path / "base.pth")
    tiny = tiny.to_empty(device="cpu")
    with pytest.raises(
        ConfigError, match=r"The file has embed_dim 128, .* \(the size base\); the model has .* \(the size tiny\)"
    ):
        load_weights(tiny, tmp_path / "base.pth", head="fresh")


def test_not_strict_reports_what_strict_refuses_but_never_a_shape(tmp_path):
    state = state_of(classifier())
    del state["norm.bias"], state["head.bias"]
    save_file({**state, "layers.0.blocks.0.attn.qkv.bias": torch.zeros(24)}, tmp_path / "a.safetensors")
    model = SwinTransformerV2(**SMALL)
    with pytest.raises(ConfigError, match=r"does not fit the model: 1 missing: norm\.bias; 1 unexpected: .*qkv\.bias"):
        load_weights(model, tmp_path / "a.safetensors", head="auto")  # the backbone is spoken of before the head
    save_file({**state, "norm.bias": torch.zeros(64)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"lacks a part of the head \(head\.bias\); head=fresh starts with a new one, strict=False loads the rest "
        r"and keeps the model's head\.bias$",
    ):
        load_weights(model, tmp_path / "b.safetensors", head="auto")
    report = load_weights(model, tmp_path / "a.safetensors", strict=False)
    assert isinstance(report, LoadReport)
    assert report.missing == ("norm.bias", "head.bias")
    assert report.unexpected == ("layers.0.blocks.0.attn.qkv.bias",)
    assert str(report).splitlines() == [
        f"{len(state)} weights loaded (microsoft, 0 names converted)",
        "2 keep their initial values: norm.bias, head.bias",
        "1 not in this model: layers.0.blocks.0.attn.qkv.bias",
    ]
    save_file({**state, "norm.weight": torch.zeros(65)}, tmp_path / "a.safetensors")
    for strict in (True, False):
        with pytest.raises(ConfigError, match=r"norm\.weight is \(65,\), the model has \(64,\)") as caught:
            load_weights(model, tmp_path / "a.safetensors", strict=strict)
        assert "strict=False" not in str(caught.value), "it would not help"


def test_a_file_of_which_nothing_fits_is_refused_even_when_not_strict(tmp_path):
    save_file({"layers.9.blocks.9.norm1.weight": torch.ones(8)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="does not fit the model: .* nothing fits"):
        load_weights(classifier(num_classes=0), tmp_path / "a.safetensors", strict=False)


def test_a_model_without_memory_is_refused(tmp_path):
    save_weights(classifier(), tmp_path / "a.safetensors", "microsoft")
    with torch.device("meta"):
        model = SwinTransformerV2(**SMALL)
    with pytest.raises(ValueError, match="is on the meta device; give the model memory first"):
        load_weights(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_of_any_format_is_never_loaded_in_silence(tmp_path, seed):
    """Tensors dropped, renamed, reshaped or cut at random: an error and an unchanged model, whichever it was."""
    chance = random.Random(seed)
    model = classifier()
    format = ("microsoft", "timm", "huggingface", "mmpretrain")[seed % 4]
    if format == "mmpretrain":
        state = {name: value.contiguous() for name, value in mmpretrain(state_of(model)).items()}
    else:
        state = load_file(save_weights(model, tmp_path / "whole.safetensors", format)[0])
    for name in chance.sample(sorted(state), chance.choice((1, 1, 2, 8))):
        value = state.pop(name)
        damage = chance.choice(("drop", "rename", "swap", "grow", "flatten"))
        if damage == "rename":
            state[name.replace(".", "_", 1) if chance.random() < 0.5 else name + "_orig"] = value
        elif damage == "swap" and value.ndim > 1 and value.shape[0] != value.shape[1]:
            state[name] = value.transpose(0, 1).contiguous()
        elif damage == "grow":
            state[name] = torch.cat((value, value[:1]))
        elif damage == "flatten" and value.ndim > 1:
            state[name] = value.flatten()
    save_file(state, tmp_path / "damaged.safetensors")
    target = SwinTransformerV2(**SMALL)
    before = state_of(target)
    with pytest.raises(ConfigError, match=r"damaged\.safetensors"):
        load_weights(target, tmp_path / "damaged.safetensors")
    assert_same(before, state_of(target))
