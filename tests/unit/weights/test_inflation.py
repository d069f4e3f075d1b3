"""Weights of images in a model of clips: exactly the image's features in every frame, from every format, and said."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.weights import load_weights, save_weights
from tests.support.model_cases import random_model, relative_error
from tests.support.weights_samples import (
    SMALL,
    classifier,
    current_timm,
    mmpretrain,
    old_timm,
    simmim,
    state_of,
    with_official_buffers,
)

IMAGE = {"patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}
CASES = {  # frames of the input and of patches, window along time; image and window
    "one window of all frames": (4, 1, 4, 16, 4),
    "shifted in time": (8, 1, 4, 16, 4),
    "shifted in time alone": (6, 1, 4, 8, 8),
    "padded in time": (5, 1, 2, 16, 4),
    "padded everywhere, odd maps 13x19": (7, 1, 4, (26, 38), 4),
    "patches of 2 frames": (10, 2, 2, (14, 10), 3),
    "patches of 3 frames": (9, 3, 2, 16, 4),
    "windows of one frame": (3, 1, 1, 16, 4),
    "one frame": (1, 1, 8, 16, 4),
}


def image_and_clip_models(tmp_path, case: str) -> tuple[SwinTransformerV2, SwinTransformerV2]:
    """A random float64 model of images, and one of clips that has loaded its file; the window is the image's own."""
    frames, patch_frames, window_frames, img_size, window = CASES[case]
    image = random_model(**IMAGE, img_size=img_size, window_size=window)
    save_weights(image, tmp_path / "image.pth", "microsoft")
    clip = SwinTransformerV2(
        **IMAGE, img_size=img_size, window_size=window, num_classes=0, drop_path_rate=0.0,
        frames=frames, patch_frames=patch_frames, window_frames=window_frames,
    ).double()  # fmt: skip
    load_weights(clip, tmp_path / "image.pth")
    return image, clip


@pytest.mark.parametrize("case", CASES)
def test_a_clip_of_one_repeated_frame_has_exactly_the_images_features(tmp_path, case):
    """Heads at the largest scale among them, whose masked keys can beat those that are not."""
    image, clip = image_and_clip_models(tmp_path, case)
    images = torch.randn(2, 3, *image.img_size, dtype=torch.float64)
    clips = images.unsqueeze(2).repeat(1, 1, clip.frames, 1, 1)
    for of_image, of_clip in zip(image.forward_features(images), clip.forward_features(clips), strict=True):
        assert of_clip.shape[2] == clip.frames // clip.patch_frames
        for frame in of_clip.unbind(2):
            assert relative_error(frame, of_image) < 1e-12
    assert relative_error(clip.pooled_features(clips), image.pooled_features(images)) < 1e-12
    image.float(), clip.float()
    single = [model(each.float()) for model, each in ((image, images), (clip, clips))]
    assert relative_error(single[1], single[0].double()) < 1e-4  # measured worst 1e-5, at scales of 100


def test_other_clips_have_features_of_their_own_and_time_is_learnt(tmp_path):
    """The column of time starts as zeros, and its gradient is none."""
    _, clip = image_and_clip_models(tmp_path, "shifted in time")
    clips = torch.randn(1, 3, *clip.input_size, dtype=torch.float64)
    forward, still = clip.pooled_features(clips), clip.pooled_features(clips[:, :, :1].repeat(1, 1, 8, 1, 1))
    assert relative_error(forward, still) > 0.01
    clip.pooled_features(clips).square().sum().backward()
    for name, parameter in clip.named_parameters():
        if name.endswith("cpb_mlp.0.weight"):
            assert not parameter[:, 2].any() and parameter.grad[:, 2].any(), name


def test_a_simmim_model_predicts_a_repeated_frame_as_its_image(tmp_path):
    """Tubes: the same patches hidden in every frame; its decoder predicts both frames of a patch alike."""
    ours = simmim()
    path = save_weights(ours, tmp_path / "simmim.pth", "microsoft")[0]
    with_token = {"model": state_of(ours)}
    torch.save(with_token, path)  # save_weights has the whole state too, but for buffers
    clip = SimMIM(SwinTransformerV2(**{**SMALL, "num_classes": 0}, frames=6, patch_frames=2, window_frames=2), 32)
    report = load_weights(clip, path)
    assert not report.missing and "divided over 2 frames" in str(report)
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 16, 16) < 0.6
    expected = ours(images, mask)
    found = clip.eval()(images.unsqueeze(2).repeat(1, 1, 6, 1, 1), mask)
    assert relative_error(found["loss"], expected["loss"]) < 1e-4
    for frame in found["reconstruction"].unbind(2):
        assert relative_error(frame, expected["reconstruction"].double()) < 1e-3


FORMATS = {
    "microsoft": lambda state: {"model": with_official_buffers(state)},
    "old timm": old_timm,
    "timm": current_timm,
    "mmpretrain": lambda state: {"state_dict": mmpretrain(state)},
}


@pytest.mark.parametrize("kind", [*FORMATS, "huggingface"])
def test_every_format_is_inflated_and_says_so(tmp_path, kind):
    image = classifier()
    if kind == "huggingface":
        path = tmp_path / "directory"
        save_weights(image, path, "huggingface")
    else:
        path = tmp_path / "file.pth"
        torch.save(FORMATS[kind](state_of(image)), path)
    clip = SwinTransformerV2(**SMALL, frames=4, patch_frames=2, window_frames=2).eval()
    report = load_weights(clip, path)
    assert not report.missing and not report.unexpected
    assert "note: weights of images became those of clips: the patch embedding divided over 2 frames, and 9" in str(
        report
    )
    images = torch.randn(2, 3, 64, 64)
    assert relative_error(clip(images.unsqueeze(2).repeat(1, 1, 4, 1, 1)), image(images).double()) < 1e-3


def test_weights_of_clips_come_back_as_they_are_and_fit_no_image_model(tmp_path):
    clip = classifier(frames=4, patch_frames=2, window_frames=2)
    path = save_weights(clip, tmp_path / "clip.safetensors", "microsoft")[0]
    again = SwinTransformerV2(**SMALL, frames=8, patch_frames=2, window_frames=4)
    report = load_weights(again, path)
    assert report.clips == "" and all(torch.equal(again.state_dict()[name], x) for name, x in state_of(clip).items())
    with pytest.raises(ConfigError, match="inputs clips with patches of 2 frames; the model has inputs images"):
        load_weights(SwinTransformerV2(**SMALL), path)
    with pytest.raises(ConfigError, match="inputs clips with patches of 2 frames; .* inputs clips with patches of 1"):
        load_weights(SwinTransformerV2(**SMALL, frames=8), path)
    for format in ("timm", "huggingface"):
        with pytest.raises(ConfigError, match=rf"format={format} cannot hold a model of clips .*format=microsoft"):
            save_weights(clip, tmp_path / "other.safetensors", format)


def test_channels_are_adapted_before_time(tmp_path):
    """Both rules at once: 3 channels and images to 5 channels and clips."""
    path = save_weights(classifier(), tmp_path / "image.pth", "microsoft")[0]
    clip = SwinTransformerV2(**{**SMALL, "in_chans": 5}, frames=4, window_frames=2)
    assert "became 5" in str(load_weights(clip, path, bands="mean"))
    of_clip = save_weights(clip, tmp_path / "clip.pth", "microsoft")[0]
    back = SwinTransformerV2(**SMALL, frames=4, window_frames=2)
    load_weights(back, of_clip, bands="mean")
    kept = torch.load(path, weights_only=True)["model"]["patch_embed.proj.weight"]
    torch.testing.assert_close(back.patch_embed.proj.weight.sum((1, 2)), kept.sum(1))
