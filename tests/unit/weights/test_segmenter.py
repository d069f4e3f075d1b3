"""A segmentation model's weights by the names of Swin's own and of transformers, and why others do not hold it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from swinv2_train.config import ConfigError
from swinv2_train.models import swin_v2
from swinv2_train.models.resize import resized
from swinv2_train.models.upernet import UPerNet
from swinv2_train.weights import load_weights, save_weights, trained_windows, weights_classes
from swinv2_train.weights.segmenter import published_names

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


ENCODER = {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


def segmenter(num_classes=5, aux_channels=8, head_norm="batch", map_norms=True) -> UPerNet:
    model = UPerNet(
        swin_v2("tiny", num_classes=0, **ENCODER),
        num_classes,
        16,
        aux_channels,
        head_norm=head_norm,
        map_norms=map_norms,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2.0)
    return model


def published(model: UPerNet) -> dict[str, torch.Tensor]:
    """Its weights by the names of Swin's segmentation models."""
    state = model.state_dict()
    return {theirs: state[name] for name, theirs in published_names(state, model.encoder).items()}


def test_weights_have_the_published_names(tmp_path):
    torch.manual_seed(0)
    model, path = segmenter(), tmp_path / "w.safetensors"
    save_weights(model, path, "microsoft", classes=["a", "b", "c", "d", "e"])
    found, own = load_file(path), model.state_dict()
    assert len(found) == len(own)
    assert {name.partition(".")[0] for name in found} == {"backbone", "decode_head", "auxiliary_head"}
    for ours, theirs in PUBLISHED.items():
        assert torch.equal(found[theirs], own[ours]), ours


def loaded(path, **sizes) -> UPerNet:
    """A segmenter of other values, with those at path."""
    torch.manual_seed(1)
    model = segmenter(**sizes)
    load_weights(model, path)
    return model


def same(one: UPerNet, other: UPerNet) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_published_weights_are_read(tmp_path, suffix):
    model = segmenter()
    path = tmp_path / f"w{suffix}"
    save_weights(model, path, "microsoft", classes=list("abcde"))
    assert same(model, loaded(path))
    assert weights_classes(path) == tuple("abcde")


@pytest.mark.parametrize("around", ["", "module.", "model.", "model._orig_mod."])
def test_a_checkpoint_of_mmsegmentation_is_read(tmp_path, around):
    """state_dict beside meta, with the batch counters of torch's BatchNorms; also in what other programs put around."""
    model = segmenter()
    state = published(model)
    counters = {name.replace("running_mean", "num_batches_tracked") for name in state if "running_mean" in name}
    state |= {name: torch.tensor(7) for name in counters}
    path = tmp_path / "w.pth"
    torch.save(
        {"meta": {"CLASSES": ["a"]}, "state_dict": {around + name: value for name, value in state.items()}}, path
    )
    assert same(model, loaded(path))
    report = load_weights(segmenter(), path)
    assert not report.missing and not report.unexpected
    assert {around + name for name in counters} <= set(report.left_out)


def test_the_backbone_of_a_dense_model_is_read_alone(tmp_path):
    """Its last norm is the encoder's; those of the other maps and the heads are left out, and named."""
    model = segmenter()
    path = tmp_path / "w.pth"
    bare = {name.removeprefix("backbone."): value for name, value in published(model).items() if "_head" not in name}
    for state in (published(model), bare):
        torch.save(state, path)
        encoder = swin_v2("tiny", num_classes=0, **ENCODER)
        report = load_weights(encoder, path)
        assert all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())
        assert (
            any(name.endswith(("norm0.weight", "norms.0.weight")) for name in report.left_out) and not report.unexpected
        )
    with pytest.raises(ConfigError, match="has no segmentation head "):
        load_weights(segmenter(), path)


def test_of_a_detector_the_encoder_is_read(tmp_path):
    model, path = segmenter(), tmp_path / "w.pth"
    named = {name.replace("decode_head.", "neck."): value for name, value in published(model).items()}
    torch.save({name: value for name, value in named.items() if not name.startswith("auxiliary_head")}, path)
    encoder = swin_v2("tiny", num_classes=0, **ENCODER)
    report = load_weights(encoder, path)
    assert not report.missing and "neck.*" in report.left_out
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in model.encoder.state_dict().items())


def test_what_is_lacking_or_of_another_kind_is_said(tmp_path):
    path = tmp_path / "w.pth"
    state = published(segmenter())
    torch.save({name: value for name, value in state.items() if not name.startswith("auxiliary_head.")}, path)
    report = load_weights(segmenter(), path)  # of training alone
    assert report.missing and all(name.startswith("decoder.auxiliary_head.") for name in report.missing)
    torch.save(state, path)
    assert "decoder.auxiliary_head.conv_seg.weight" in load_weights(segmenter(aux_channels=0), path).left_out
    for sizes, message in (
        ({"head_norm": "layer"}, r"has BatchNorms in the heads; set task\.head_norm=sync_batch"),
        ({"map_norms": False}, r"has norms of the encoder's maps; set task\.map_norms=true"),
        ({"num_classes": 6}, r"conv_seg\.bias is \(5,\), the model has \(6,\); head=fresh leaves it out: the segm"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_weights(segmenter(**sizes), path)
        assert load_weights(segmenter(**sizes), path, head="fresh").missing
    lacking = {name: value for name, value in state.items() if "fpn_convs.1" not in name}
    torch.save(lacking, path)
    with pytest.raises(
        ConfigError, match=r"lacks a part of the segmentation head \(decoder\.decode_head\.fpn_convs\.1"
    ):
        load_weights(segmenter(), path)


def test_an_encoder_begins_a_model_without_norms_of_maps(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(swin_v2("tiny", num_classes=3, **ENCODER).state_dict(), path)
    report = load_weights(segmenter(map_norms=False), path, head="fresh")
    assert "norm.weight" in report.left_out and not report.unexpected


RAW = {"map_norms": False, "head_norm": "batch"}


def theirs_of(folder):
    """transformers' model in a directory, and what it says of an image."""
    from transformers import UperNetForSemanticSegmentation

    model, info = UperNetForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def assert_the_same(model: UPerNet, theirs) -> None:
    """Logits at the image's size, and the auxiliary head on equal maps."""
    torch.manual_seed(2)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = resized(model.eval()(images)["logits"], (64, 64))
        found = theirs(images).logits
        assert torch.allclose(ours, found, rtol=1e-4, atol=1e-4 * float(found.abs().max()))
        assert float(found.std()) > 1e-3
        maps = model.encoder.forward_features(images)
        assert torch.allclose(model.decoder.auxiliary_head(maps[2]), theirs.auxiliary_head(maps), rtol=1e-4, atol=1e-4)


def test_a_directory_of_transformers_is_read_and_computes_the_same(tmp_path):
    from transformers import Swinv2Config, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    backbone = Swinv2Config(
        image_size=64, window_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=5,
        id2label=dict(enumerate("abcde")), label2id={name: number for number, name in enumerate("abcde")},
    )  # fmt: skip
    theirs = UperNetForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if "running_var" in name:
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and "relative" not in name:
                value.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    model = loaded(tmp_path, **RAW)
    assert_the_same(model, theirs)
    assert weights_classes(tmp_path) == tuple("abcde")
    assert trained_windows(tmp_path) == ((4, 4), (4, 4), (4, 4), (2, 2))
    with pytest.raises(ConfigError, match=r"no norms of the encoder's maps.*set task\.map_norms=false"):
        load_weights(segmenter(), tmp_path)
    back = tmp_path / "back"
    save_weights(model, back, "huggingface", classes=list("abcde"))
    again = theirs_of(back)
    assert_the_same(model, again)
    assert again.config.id2label == dict(enumerate("abcde"))
    assert same(model, loaded(back, **RAW))


def test_the_number_of_stages_is_what_transformers_auxiliary_head_knows():
    three = {"depths": (1, 1, 1), "num_heads": (1, 2, 4), "pretrained_window_sizes": (0, 0, 0)}
    encoder = swin_v2("tiny", num_classes=0, **ENCODER | three)
    model = UPerNet(encoder, 5, 16, 8, **RAW)
    with pytest.raises(ConfigError, match="auxiliary head is on the third map, and this encoder has 3"):
        save_weights(model, "unused", "huggingface")


def test_formats_that_cannot_hold_it_say_why(tmp_path):
    with pytest.raises(ConfigError, match="takes the raw maps of its Swinv2Backbone, which has no norms.*format=micro"):
        save_weights(segmenter(), tmp_path / "w", "huggingface")
    with pytest.raises(ConfigError, match="are BatchNorms; one trained with task.head_norm=sync_batch"):
        save_weights(segmenter(map_norms=False, head_norm="group"), tmp_path / "w", "huggingface")
    with pytest.raises(ConfigError, match="timm has no segmentation heads; export format=microsoft"):
        save_weights(segmenter(), tmp_path / "w.pth", "timm")
