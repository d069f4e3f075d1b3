"""Weights for other channels than the model's: adapted by a rule that is named, or refused."""

from __future__ import annotations

import json

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.weights import load_weights, read_weights, save_weights
from swinv2_train.weights.bands import adapted_bands
from swinv2_train.weights.export import ExportRequest, export
from tests.support.configs import composed
from tests.support.weights_samples import SMALL, assert_same, classifier, simmim, state_of


def adapted(weight: torch.Tensor, channels: int, bands) -> torch.Tensor:
    entry = adapted_bands(LazyTensor(tuple(weight.shape), weight.dtype, lambda: weight), channels, bands, "FILE")
    assert entry.shape == (weight.shape[0], channels, *weight.shape[2:]) and entry.dtype == weight.dtype
    return entry.read()


@pytest.mark.parametrize(("given", "channels"), [(3, 12), (14, 3), (3, 1), (9, 1), (1, 3), (1, 14), (4, 7), (3, 3)])
def test_the_default_rule_keeps_the_response_to_a_grey_image(given, channels):
    weight = torch.randn(8, given, 4, 4)
    grey = torch.randn(2, 1, 16, 16)
    found = torch.conv2d(grey.expand(-1, channels, -1, -1), adapted(weight, channels, "mean"), stride=4)
    expected = torch.conv2d(grey.expand(-1, given, -1, -1), weight, stride=4)
    assert torch.allclose(found, expected, atol=1e-4)  # measured worst 1e-5 of sums of 224 numbers


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
def test_repeat_is_timms_rule(channels):
    from timm.models import adapt_input_conv

    weight = torch.randn(8, 3, 4, 4)
    assert torch.allclose(adapted(weight, channels, "repeat"), adapt_input_conv(channels, weight.clone()), atol=1e-6)


def test_a_list_says_which_band_feeds_which():
    weight = torch.randn(8, 3, 4, 4)
    assert torch.equal(adapted(weight, 3, [2, 1, 0]), weight.flip(1))
    twice = adapted(weight, 4, [0, 1, 2, 0])  # red feeds near infrared too: half of it each
    assert torch.equal(twice[:, 1:3], weight[:, 1:3])
    assert torch.allclose(twice.sum(1), weight.sum(1), atol=1e-6) and torch.equal(twice[:, 0], twice[:, 3])


def test_nothing_is_adapted_unless_a_rule_says_so(tmp_path):
    path = save_weights(classifier(in_chans=5), tmp_path / "a.pth", "microsoft")[0]
    model = SwinTransformerV2(**SMALL)
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"in_chans 5; the model has in_chans 3: .*init_bands=mean"):
        load_weights(model, path)
    for bands, match in (
        ([0, 1], r"init_bands \(\[0, 1\]\) names 2 bands of .* for a model of 3 channels; give one for each"),
        ([0, 1, 5], r"init_bands \(\[0, 1, 5\]\): 5 is none of the 5 bands of .*; they are 0 to 4"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_weights(model, path, bands=bands)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_was_done_is_in_the_report_and_everything_else_is_taken_as_it_is(tmp_path):
    path = save_weights(classifier(in_chans=5), tmp_path / "a.pth", "microsoft")[0]
    source = read_weights(path)
    for bands, told in (("mean", "mean"), ("repeat", "repeat"), ([4, 0, 1], "[4,0,1]"), ("fresh", "fresh")):
        model = SwinTransformerV2(**SMALL)
        first = model.patch_embed.proj.weight.detach().clone()
        report = load_weights(model, path, bands=bands)
        assert f"note: the patch embedding's 5 channels became 3 by init_bands={told}" in str(report)
        state = model.state_dict()
        assert all(torch.equal(state[name], source[name]) for name in state if name != "patch_embed.proj.weight")
        fresh = torch.equal(state["patch_embed.proj.weight"], first)
        assert fresh == (bands == "fresh") == (report.missing == ("patch_embed.proj.weight",))


def test_the_same_number_of_channels_is_loaded_as_it_is(tmp_path):
    path = save_weights(classifier(), tmp_path / "a.pth", "microsoft")[0]
    model = SwinTransformerV2(**SMALL)
    report = load_weights(model, path, bands="mean")
    assert torch.equal(model.patch_embed.proj.weight, read_weights(path)["patch_embed.proj.weight"])
    assert report.bands == ""
    load_weights(model, path, bands=[2, 1, 0])
    assert torch.equal(model.patch_embed.proj.weight, read_weights(path)["patch_embed.proj.weight"].flip(1))


def test_a_decoder_for_other_channels_starts_anew_when_told(tmp_path):
    path = save_weights(simmim(in_chans=5), tmp_path / "a.pth", "microsoft")[0]
    with pytest.raises(ConfigError, match=r"decoder.0.bias is \(5120,\), the model has \(3072,\); head=fresh leaves"):
        load_weights(simmim(), path, bands="mean")
    report = load_weights(simmim(), path, bands="mean", head="fresh")
    assert set(report.missing) == {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}


@pytest.mark.parametrize("format", ["timm", "huggingface"])
def test_timm_and_transformers_take_an_export_with_its_channels(tmp_path, format):
    model = classifier(largest_logit_scale=3.0, in_chans=5)
    images = torch.randn(2, 5, 64, 64)
    if format == "timm":
        import timm

        path = save_weights(model, tmp_path / "a.safetensors", format)[0]
        theirs = timm.models.SwinTransformerV2(
            img_size=64,
            in_chans=5,
            num_classes=7,
            embed_dim=8,
            depths=(2, 2, 3, 2),
            num_heads=(1, 2, 4, 8),
            window_size=4,
        )
        timm.models.load_checkpoint(theirs.eval(), str(path))
        found = theirs(images)
    else:
        import transformers

        save_weights(model, tmp_path / "hf", format)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
        assert theirs.config.num_channels == 5
        found = theirs(images).logits
    expected = model(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()  # measured 2e-6


@pytest.mark.parametrize("channels", [1, 5])
def test_an_export_of_bands_has_its_channels_and_no_processor_of_photographs(tmp_path, capsys, channels):
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}
    model = classifier(in_chans=channels, **small)
    path = save_weights(model, tmp_path / "a.safetensors", "microsoft")[0]
    numbers = f"[{','.join(['0.5'] * channels)}]"
    config = composed([
        "model=demo", "task=classify", "task.num_classes=7", "task.rand_augment=null", "data=folder",
        "run_dir=r", "data.shards=x",
        "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", "model.img_size=64", "model.window_size=4",
        f"model.in_chans={channels}", f"data.mean={numbers}", f"data.std={numbers}",
    ])  # fmt: skip
    for format, out in (("huggingface", tmp_path / "hf"), ("timm", tmp_path / "timm.safetensors")):
        files = export(config, ExportRequest(format, out, weights=str(path)))
        assert_same(state_of(model), dict(read_weights(out)))
        assert not any(file.name == "preprocessor_config.json" for file in files)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_channels"] == channels
    assert capsys.readouterr().err.count("note: no preprocessor_config.json") == 1
