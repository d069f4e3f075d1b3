"""A segmentation model's weights by the names of Swin's own, and why other formats do not hold it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from swinv2_train.config import ConfigError
from swinv2_train.models import swin_v2
from swinv2_train.models.upernet import UPerNet
from swinv2_train.weights import save_weights

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


def segmenter() -> UPerNet:
    torch.manual_seed(0)
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


def test_formats_that_cannot_hold_it_say_why(tmp_path):
    with pytest.raises(ConfigError, match="takes the raw maps of its Swinv2Backbone, which has no norms.*format=micro"):
        save_weights(segmenter(), tmp_path / "w", "huggingface")
    with pytest.raises(ConfigError, match="timm has no segmentation heads; export format=microsoft"):
        save_weights(segmenter(), tmp_path / "w.pth", "timm")
