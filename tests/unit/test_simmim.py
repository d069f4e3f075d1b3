"""SimMIM's loss, target and token blending."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.simmim import masked_l1, norm_target


def small_simmim(**settings) -> SimMIM:
    encoder = swin_v2("demo", img_size=(32, 64), window_size=4, num_classes=0, pretrained_window_sizes=(0, 0))
    return SimMIM(encoder, 8, **settings)


def test_masked_l1_is_the_mean_over_hidden_pixels_and_channels():
    """SimMIM eq. 1, by hand: errors of visible pixels do not count."""
    prediction, target = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    target[:, :, 0, 0] = 5.0
    mask = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    assert masked_l1(prediction, target, mask).item() == pytest.approx((5 + 1) / 2, rel=1e-5)


def test_loss_sees_hidden_pixels_only_and_weights_images():
    """A change of visible pixels' targets would leak the answer; a stand-in image (weight 0) must not count."""
    torch.manual_seed(0)
    model = small_simmim()
    images = torch.randn(2, 3, 32, 64)
    mask = torch.zeros(2, 8, 16, dtype=torch.bool)
    mask[:, :4] = True
    out = model(images, mask)
    error = (out["reconstruction"] - images).abs()[:, :, :16]
    assert out["loss"].item() == pytest.approx(error.mean().item(), rel=1e-4)
    weighted = model(images, mask, torch.tensor([1.0, 0.0]))["loss"]
    assert weighted.item() == pytest.approx(error[0].mean().item(), rel=1e-4)
    assert out["loss"].dtype == torch.float32 and out["reconstruction"].shape == images.shape


def test_encoder_sees_nothing_of_hidden_patches():
    """Whatever stands in hidden patches, the reconstruction is the same; visible patches do matter."""
    torch.manual_seed(0)
    model = small_simmim().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # off the identity
    images = torch.randn(1, 3, 32, 64)
    mask = torch.rand(1, 8, 16) < 0.6
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    noise = torch.randn_like(images)
    same = model(torch.where(pixels, noise, images), mask)["reconstruction"]
    other = model(torch.where(pixels, images, noise), mask)["reconstruction"]
    base = model(images, mask)["reconstruction"]
    assert torch.equal(same, base) and not torch.allclose(other, base)


def test_norm_target_is_the_sliding_window_of_the_official_code():
    """Against a loop over every pixel's window, unbiased variance, cut at the border."""
    torch.manual_seed(0)
    images = torch.rand(1, 2, 9, 11, dtype=torch.float64)
    got = norm_target(images, 5)
    for channel in range(2):
        for y in range(9):
            for x in range(11):
                window = images[0, channel, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
                expected = (images[0, channel, y, x] - window.mean()) / (window.var(unbiased=True) + 1e-6).sqrt()
                assert got[0, channel, y, x].item() == pytest.approx(expected.item(), abs=1e-6)


def test_parts_that_do_not_fit_are_rejected():
    encoder = swin_v2("tiny", img_size=64, window_size=4, num_classes=0)
    with pytest.raises(ValueError, match=r"encoder_stride \(16\) must be the encoder's 32 px"):
        SimMIM(encoder, 16)
    with pytest.raises(ValueError, match=r"norm_target \(46\) must be an odd number"):
        SimMIM(encoder, 32, norm_target=46)


def test_names_are_those_of_the_official_pretraining_files():
    """encoder.*, encoder.mask_token (1, 1, C), decoder.0.* and nothing else."""
    state = small_simmim().state_dict()
    assert tuple(state["encoder.mask_token"].shape) == (1, 1, 96)
    assert tuple(state["decoder.0.weight"].shape) == (8 * 8 * 3, 192, 1, 1)
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder"}
    assert not [name for name in state if "head" in name]
