"""The real transformers and timm: their files into our model, our files into theirs, and the same numbers out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.weights import Preprocessing, load_weights, read_weights, save_weights, trained_windows
from tests.support.weights_samples import SMALL, assert_same, classifier, randomise, simmim, state_of


def images(size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5) -> None:
    """Default bound: measured worst 1.8e-6 of the largest output, in float32."""
    assert ours.std() > 0.1, "constant outputs would compare equal whatever the weights"
    worst = ((ours - theirs).abs() / theirs.abs().max()).max().item()
    assert worst < bound, worst


def huggingface_model(architecture: str, **overrides):
    """transformers' own model with our small sizes, every parameter at random."""
    import transformers

    config = transformers.Swinv2Config(
        image_size=64, patch_size=4, embed_dim=8, depths=[2, 2, 3, 2], num_heads=[1, 2, 4, 8], window_size=4,
        num_labels=7, encoder_stride=32, drop_path_rate=0.0, **overrides,
    )  # fmt: skip
    model = getattr(transformers, architecture)(config).eval()
    randomise(model, largest_logit_scale=3.0)  # see the test of the second mask
    return model


@pytest.mark.parametrize("pretrained", [(0, 0, 0, 0), (3, 3, 3, 3)])
def test_a_classifier_that_transformers_saved_gives_the_same_logits(tmp_path, pretrained):
    theirs = huggingface_model("Swinv2ForImageClassification", pretrained_window_sizes=list(pretrained))
    theirs.save_pretrained(tmp_path)
    model = SwinTransformerV2(**SMALL, pretrained_window_sizes=pretrained).eval()
    report = load_weights(model, tmp_path)
    assert report.format == "huggingface" and not report.missing and not report.unexpected
    assert report.converted["layers.0.blocks.1.attn.qkv.weight"] == " + ".join(
        f"swinv2.encoder.layers.0.blocks.1.attention.self.{part}.weight" for part in ("query", "key", "value")
    )
    with torch.no_grad():
        close(model(images()), theirs(images()).logits)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"pretrained_window_sizes": [3, 0, 2, 0]},
        {"window_size": 16},  # clamped from the third stage on
        {"depths": [1, 1], "num_heads": [1, 2], "pretrained_window_sizes": [0, 5]},
    ],
)
def test_the_windows_of_a_huggingface_directory_are_those_that_transformers_normalises_by(tmp_path, overrides):
    import transformers

    small = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
    theirs = transformers.Swinv2Model(transformers.Swinv2Config(**{**small, **overrides}))
    theirs.save_pretrained(tmp_path)
    windows = trained_windows(tmp_path)
    assert windows == trained_windows(tmp_path / "model.safetensors")
    for stage, (rows, cols) in zip(theirs.encoder.layers, windows, strict=True):
        attention = stage.blocks[0].attention.self
        assert rows == cols
        largest = 8 * (attention.window_size[0] - 1) / (rows - 1)  # arXiv:2111.09883 section 3.3, and the official 8
        assert attention.relative_coords_table.max().item() == pytest.approx(np.log2(largest + 1) / 3, rel=1e-6)


def test_our_own_huggingface_directory_tells_the_windows_and_nothing_else_does(tmp_path):
    for name, overrides in {"a": {}, "b": {"pretrained_window_sizes": (3, 3, 3, 2)}, "c": {"window_size": 1}}.items():
        model = classifier(**overrides)
        save_weights(model, tmp_path / name, "huggingface")
        assert trained_windows(str(tmp_path / name)) == model.pretrained_window_sizes
    config = tmp_path / "a" / "config.json"
    good = json.loads(config.read_text())
    for change in (
        {"model_type": "swin"}, {"window_size": None}, {"window_size": "8"}, {"window_size": True}, {"patch_size": 0},
        {"image_size": [64]}, {"image_size": 8, "pretrained_window_sizes": [0] * 4}, {"depths": [2]}, {"depths": 5},
        {"pretrained_window_sizes": [4, 4, 4, -1]}, {"pretrained_window_sizes": [4, 4, 4, 2.0]},
        {"pretrained_window_sizes": None},
    ):  # fmt: skip
        config.write_text(json.dumps({**good, **change}))
        assert trained_windows(config.parent) is None, change
    for text in ("", "[]", "5", "{}", "[" * 200000, "\ud800"):
        config.write_bytes(text.encode(errors="surrogatepass"))
        assert trained_windows(config.parent) is None
    save_weights(classifier(), tmp_path / "b" / "other.pth", "timm")  # which config.json does not describe
    for path in (tmp_path / "b" / "other.pth", tmp_path / "absent", "x" * 5000, tmp_path):
        assert trained_windows(path) is None


def test_a_bare_model_gives_the_same_features(tmp_path):
    theirs = huggingface_model("Swinv2Model")
    theirs.save_pretrained(tmp_path)
    model = SwinTransformerV2(**{**SMALL, "num_classes": 0}).eval()
    load_weights(model, tmp_path)
    with torch.no_grad():
        expected = theirs(images())
        close(model(images()), expected.pooler_output)
        last = model.forward_features(images())[-1]
        close(last.flatten(2).transpose(1, 2), expected.last_hidden_state)


def test_a_masked_image_model_gives_the_same_reconstruction(tmp_path):
    theirs = huggingface_model("Swinv2ForMaskedImageModeling")
    theirs.save_pretrained(tmp_path)
    model = SimMIM(SwinTransformerV2(**{**SMALL, "num_classes": 0})).eval()
    assert not load_weights(model, tmp_path).missing
    mask = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.6
    with torch.no_grad():
        ours, expected = model(images(), mask), theirs(images(), bool_masked_pos=mask.flatten(1))
        close(ours["reconstruction"], expected.reconstruction)
        assert ours["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_a_backbone_reads_up_to_its_missing_final_norm(tmp_path):
    """transformers' Swinv2Backbone has no final norm: that is said, not passed over."""
    huggingface_model("Swinv2Backbone").save_pretrained(tmp_path)
    model = SwinTransformerV2(**{**SMALL, "num_classes": 0})
    with pytest.raises(ConfigError, match=r"2 missing: norm\.weight, norm\.bias"):
        load_weights(model, tmp_path)
    assert load_weights(model, tmp_path, strict=False).missing == ("norm.weight", "norm.bias")


@pytest.mark.parametrize("kind", ["sharded", "bin", "sharded bin"])
def test_every_kind_of_huggingface_directory_reads_the_same(tmp_path, kind):
    """pytorch_model.bin is what older repositories have; transformers itself does not write it any more."""
    theirs = huggingface_model("Swinv2ForImageClassification")
    theirs.save_pretrained(tmp_path / "plain")
    expected = dict(read_weights(tmp_path / "plain"))
    other = tmp_path / "other"
    if kind == "sharded":
        theirs.save_pretrained(other, max_shard_size="100KB")
        assert len(list(other.glob("*.safetensors"))) > 2
    else:
        other.mkdir()
        state = load_file(tmp_path / "plain" / "model.safetensors")
        if kind == "bin":
            torch.save(state, other / "pytorch_model.bin")
        else:
            names = sorted(state)
            parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
            for file, part in parts.items():
                torch.save({name: state[name] for name in part}, other / file)
            weight_map = {name: file for file, part in parts.items() for name in part}
            (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(expected, dict(read_weights(other)))


@pytest.mark.parametrize("pretrained", [(0, 0, 0, 0), (3, 3, 3, 3)])
def test_transformers_loads_our_classifier_and_gives_the_same_logits(tmp_path, pretrained):
    from transformers import AutoModelForImageClassification

    model = classifier(3.0, pretrained_window_sizes=pretrained)
    save_weights(model, tmp_path, "huggingface")
    theirs, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.num_labels == 7
    with torch.no_grad():
        close(model(images()), theirs.eval()(images()).logits)


def test_transformers_loads_our_non_square_classifier(tmp_path):
    from transformers import AutoModelForImageClassification

    model = classifier(3.0, img_size=(64, 96), depths=(2, 2), num_heads=(1, 2), pretrained_window_sizes=(0, 0))
    save_weights(model, tmp_path, "huggingface")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        close(model(images((64, 96))), theirs(images((64, 96))).logits)


def test_transformers_loads_a_classifier_whose_last_window_is_one_token(tmp_path):
    """It divides by the pretrained window less 1."""
    from transformers import AutoModelForImageClassification

    model = classifier(3.0, img_size=32)
    assert model.pretrained_window_sizes[-1] == (1, 1)
    save_weights(model, tmp_path, "huggingface")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        close(model(images((32, 32))), theirs(images((32, 32))).logits)


def test_transformers_loads_our_simmim_model_and_our_headless_one(tmp_path):
    from transformers import AutoModel, Swinv2ForMaskedImageModeling

    model = simmim(3.0)
    save_weights(model, tmp_path / "mim", "huggingface")
    theirs, info = Swinv2ForMaskedImageModeling.from_pretrained(tmp_path / "mim", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    mask = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.6
    with torch.no_grad():
        expected = theirs.eval()(images(), bool_masked_pos=mask.flatten(1)).reconstruction
        close(model(images(), mask)["reconstruction"], expected)

    headless = classifier(3.0, num_classes=0)
    save_weights(headless, tmp_path / "bare", "huggingface")
    theirs, info = AutoModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert type(theirs).__name__ == "Swinv2Model" and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        close(headless(images()), theirs.eval()(images()).pooler_output)


def test_transformers_second_mask_shows_where_the_logit_scale_is_at_its_ceiling(tmp_path):
    """It adds the shift's -100 twice; logits of up to 116 leak through one of them, as in the official code and timm.

    So a comparison with transformers needs a logit scale below the ceiling, or it would blame the weights.
    """
    from transformers import AutoModelForImageClassification

    model = classifier()
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            torch.nn.init.constant_(parameter, 5.0)
    save_weights(model, tmp_path, "huggingface")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (model(images()) - theirs(images()).logits).abs().max() > 0.01


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_transformers_prepares_images_as_our_evaluation_does(tmp_path, squash, interpolation):
    """Resize, crop and normalisation."""
    from PIL import Image
    from transformers import AutoImageProcessor

    from swinv2_train.data.transforms.crop import centre_crop

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    save_weights(
        classifier(), tmp_path, "huggingface",
        preprocessing=Preprocessing(mean, std, (64, 64), 0.8, squash, interpolation),
    )  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 255, (10, 14, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((140, 100), Image.Resampling.BICUBIC)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    ours = centre_crop(pixels, (64, 64), 0.8, interpolation, squash)
    as_grey = theirs * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    difference = (255 * as_grey - ours).abs()
    assert difference.max() < 2  # measured worst 1.0 of 255 (PIL rounds between its two passes)


# --------------------------------------------------------------------------------------------------------------------
# timm


def timm_model(num_classes: int = 7, **overrides):
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Theirs

    model = Theirs(
        img_size=64, embed_dim=8, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8), window_size=4, drop_path_rate=0.0,
        num_classes=num_classes, **overrides,
    ).eval()  # fmt: skip
    randomise(model)
    return model


def close_in_float64(ours: SwinTransformerV2, theirs: torch.nn.Module) -> None:
    """A logit scale of 100 makes 1.2e-5 of float32 rounding on some processors; timm keeps float32 tables here."""
    pixels = images().double()
    with torch.no_grad():
        close(ours.double()(pixels), theirs.double()(pixels), bound=1e-6)  # measured worst 8.6e-8


@pytest.mark.parametrize("num_classes", [7, 0])
def test_timms_own_state_gives_the_same_outputs(tmp_path, num_classes):
    """Headless too, where nothing but the widths tells the layout."""
    theirs = timm_model(num_classes)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    model = SwinTransformerV2(**{**SMALL, "num_classes": num_classes}).eval()
    assert load_weights(model, tmp_path / "timm.safetensors").format == "timm"
    close_in_float64(model, theirs)


@pytest.mark.parametrize("num_classes", [7, 0])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_loads_our_export_and_gives_the_same_outputs(tmp_path, num_classes, suffix):
    import timm

    model = classifier(num_classes=num_classes, pretrained_window_sizes=(3, 3, 3, 3))
    (path,) = save_weights(model, tmp_path / f"ours{suffix}", "timm")
    theirs = timm.create_model(
        "swinv2_tiny_window8_256", checkpoint_path=str(path), img_size=64, embed_dim=8, depths=(2, 2, 3, 2),
        num_heads=(1, 2, 4, 8), window_size=4, num_classes=num_classes, pretrained_window_sizes=(3, 3, 3, 3),
    ).eval()  # fmt: skip
    close_in_float64(model, theirs)


def test_timms_own_filter_reads_our_official_export(tmp_path):
    """timm converts official files when it loads them; ours must pass for one."""
    import timm

    model = classifier()
    (path,) = save_weights(model, tmp_path / "official.pth", "microsoft")
    theirs = timm.create_model(
        "swinv2_tiny_window8_256", img_size=64, embed_dim=8, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8),
        window_size=4, num_classes=7, pretrained_cfg_overlay={"file": str(path), "num_classes": 7}, pretrained=True,
    ).eval()  # fmt: skip
    close_in_float64(model, theirs)


def test_a_state_that_timm_holds_survives_the_way_there_and_back(tmp_path):
    theirs = timm_model()
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    model = SwinTransformerV2(**SMALL)
    load_weights(model, tmp_path / "a.safetensors")
    save_weights(model, tmp_path / "b.safetensors", "timm")
    assert_same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))
    assert_same(state_of(model), dict(read_weights(tmp_path / "b.safetensors")))
