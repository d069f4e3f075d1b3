"""A segmentation model's weights by the names of Swin's own, and why other formats do not hold it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from swinv2_train.config import ConfigError
from swinv2_train.models import swin_v2
from swinv2_train.models.upernet import UPerNet
from swinv2_train.weights import load_weights, save_weights

PUBLISHED = {
    "encoder.patch_embed.proj.weight": "backbone.patch_embed.proj.weight",
    "encoder.layers.1.blocks.0.attn.logit_scale": "backbone.layers.1.blocks.0.attn.logit_scale",
    "decoder.norms.0.weight": "backbone.norm0.weight",
    "decoder.norms.2.bias": "backbone.norm2.bias",
    "encoder.norm.weight": "backbone.norm3.weight",
    "decoder.decode_head.psp_modules.3.conv.weight": "decode_head.psp_modules.3.1.conv.weight",
    "decoder.decode_head.psp_modules.0.bn.running_var": "decode_head.psp_modules.0.1.bn.running_var",
    "decoder.decode_head.lateral_convs.2.bn.bias": "decode_head.lateral_convs.2.bn.bias",
    "decoder.decode_head.fpn_bottleneck.conv.weight": "decode_head.fpn_bottleneck.conv.weight",
    "decoder.decode_head.conv_seg.bias": "decode_head.conv_seg.bias",
    "decoder.auxiliary_head.convs.0.conv.weight": "auxiliary_head.convs.0.conv.weight",
    "decoder.auxiliary_head.conv_seg.weight": "auxiliary_head.conv_seg.weight",
}


def segmenter(seed: int = 0) -> UPerNet:
    torch.manual_seed(seed)
    encoder = swin_v2(
        "tiny", num_classes=0, img_size=64, window_size=4, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
    )
    model = UPerNet(encoder, 5, 16, 8, head_norm="batch")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_weights_have_the_published_names(tmp_path):
    model, path = segmenter(), tmp_path / "w.safetensors"
    save_weights(model, path, "microsoft", classes=["a", "b", "c", "d", "e"])
    found, own = load_file(path), model.state_dict()
    assert len(found) == len(own)
    assert {name.partition(".")[0] for name in found} == {"backbone", "decode_head", "auxiliary_head"}
    for ours, theirs in PUBLISHED.items():
        assert torch.equal(found[theirs], own[ours]), ours


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_was_written_is_read_again(tmp_path, prefix):
    """evaluate weights=FILE missed norm.weight.  Also as Swin's own training saves it, with BatchNorm's counts."""
    model, path = segmenter(), tmp_path / "w.safetensors"
    save_weights(model, path, "microsoft")
    counted = {"decode_head.bottleneck.bn.num_batches_tracked": torch.tensor(3)}
    save_file({f"{prefix}{name}": value for name, value in (load_file(path) | counted).items()}, path)
    again = segmenter(seed=1)
    report = load_weights(again, path)
    assert report.format == "microsoft" and not report.missing and not report.unexpected
    assert report.left_out == (f"{prefix}decode_head.bottleneck.bn.num_batches_tracked",)
    assert report.converted["encoder.norm.weight"] == f"{prefix}backbone.norm3.weight"
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("heads", ["decode_head.", "neck."])
def test_a_dense_models_encoder_serves_a_classifier(tmp_path, heads):
    """Of a detector there is nothing but the encoder that is known here."""
    model, path = segmenter(), tmp_path / "w.safetensors"
    save_weights(model, path, "microsoft")
    named = {name.replace("decode_head.", heads): value for name, value in load_file(path).items()}
    save_file({name: value for name, value in named.items() if not name.startswith("auxiliary_head")}, path)
    encoder = segmenter(seed=1).encoder
    report = load_weights(encoder, path)
    assert not report.missing and any(f"{heads}conv_seg" in name for name in report.left_out)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name


def test_formats_that_cannot_hold_it_say_why(tmp_path):
    with pytest.raises(ConfigError, match="takes the raw maps of its Swinv2Backbone, which has no norms.*format=micro"):
        save_weights(segmenter(), tmp_path / "w", "huggingface")
    with pytest.raises(ConfigError, match="timm has no segmentation heads; export format=microsoft"):
        save_weights(segmenter(), tmp_path / "w.pth", "timm")
