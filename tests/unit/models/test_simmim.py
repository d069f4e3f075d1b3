"""SimMIM's loss, target and token blending."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.simmim import masked_l1, norm_target
from tests.support.model_cases import FLOAT64_BOUND, random_model, relative_error
from tests.support.reference_swin_v2 import reference_simmim


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


# img_size, patch_size, window_size, depths.  The encoder's last token spans patch_size x 2^(stages - 1) pixels.
SIMMIM_CASES = {
    "patch 2, 26x38 px: odd maps 13x19, 7x10, 4x5": ((26, 38), 2, 4, (2, 2, 2)),
    "patch 4, 32x48 px": ((32, 48), 4, 4, (2, 2)),
    "patch 8, 128x256 px": ((128, 256), 8, 8, (2, 2)),
    "patch 8, 40x24 px: 5x3, 3x2, 2x1, 1x1": ((40, 24), 8, 2, (1, 2, 1, 1)),
    "patch 16, 192x256 px": ((192, 256), 16, 6, (2, 2)),
}


@pytest.mark.parametrize("case", SIMMIM_CASES)
def test_loss_reconstruction_and_every_gradient_equal_an_independent_float64_implementation(case):
    """Blending behind the patch norm, decoder, pixel order, cropping and the normalisation of the loss, of one model
    for every patch size and images of any shape."""
    img_size, patch, window, depths = SIMMIM_CASES[case]
    heads, zeros = (1, 2, 2, 2)[: len(depths)], (0,) * len(depths)
    encoder = random_model(
        img_size=img_size, patch_size=patch, embed_dim=8, depths=depths, num_heads=heads, window_size=window,
        pretrained_window_sizes=zeros,
    )  # fmt: skip
    model = SimMIM(encoder, patch * 2 ** (len(depths) - 1)).double()
    images = torch.randn(2, 3, *img_size, dtype=torch.float64)
    mask = torch.rand(2, img_size[0] // patch, img_size[1] // patch) < 0.6
    state = dict(model.named_parameters())
    expected, picture = reference_simmim(
        state, images, mask, patch=patch, depths=depths, heads=heads, window=encoder.window_size, pretrained=zeros
    )
    outputs = model(images, mask)
    assert relative_error(outputs["reconstruction"], picture) < FLOAT64_BOUND
    assert relative_error(outputs["loss"], expected) < FLOAT64_BOUND
    used = {name: p for name, p in state.items() if not name.startswith("encoder.head")}
    own, independent = (torch.autograd.grad(loss, list(used.values())) for loss in (outputs["loss"], expected))
    floor = 1e-6 * max(g.abs().max().item() for g in independent)
    for name, gradient, exact in zip(used, own, independent, strict=True):
        assert relative_error(gradient, exact, floor) < FLOAT64_BOUND, name


def test_images_of_several_sizes_and_shapes_go_through_one_model():
    """Variable sizes per batch, also those that merging pads: the reconstruction has the images' shape."""
    model = small_simmim(norm_target=47)
    for height, width in ((32, 64), (64, 32), (20, 36), (4, 4)):
        images = torch.randn(2, 3, height, width)
        out = model(images, torch.ones(2, height // 4, width // 4, dtype=torch.bool))
        assert out["reconstruction"].shape == images.shape and out["loss"].isfinite()


@pytest.mark.parametrize(("size", "window_px"), [((9, 11), 5), ((30, 12), 47), ((8, 60), 47)])
def test_norm_target_is_the_sliding_window_of_the_official_code(size, window_px):
    """Against a loop over every pixel's window, unbiased variance, cut at the border; also larger than a side."""
    torch.manual_seed(0)
    images = torch.rand(1, 2, *size, dtype=torch.float64)
    got = norm_target(images, window_px)
    reach = window_px // 2
    for channel in range(2):
        for y in range(size[0]):
            for x in range(size[1]):
                rows, cols = (slice(max(0, at - reach), at + reach + 1) for at in (y, x))
                window = images[0, channel, rows, cols]
                expected = (images[0, channel, y, x] - window.mean()) / (window.var(unbiased=True) + 1e-6).sqrt()
                assert got[0, channel, y, x].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(("size", "window_px"), [((191, 64), 47), ((33, 50), 47), ((7, 130), 3), ((3, 3), 5)])
def test_norm_target_in_float32_is_the_square_window_of_float64(size, window_px):
    """Rows and then columns give the official code's square pooling, at borders, in odd sizes, and in float32 as near
    to float64 as that is itself.  Bright images, where digits are lost first; the sums' order alone may differ."""
    images = 2 + 0.5 * torch.randn(2, 3, *size)

    def square_window(x):
        pool = {"stride": 1, "padding": window_px // 2}
        mean, square = (F.avg_pool2d(y, window_px, count_include_pad=False, **pool) for y in (x, x**2))
        count = F.avg_pool2d(torch.ones_like(x), window_px, divisor_override=1, **pool)
        return (x - mean) / (((square - mean**2) * (count / (count - 1))).clamp(min=0) + 1e-6) ** 0.5

    exact = square_window(images.double())
    assert relative_error(norm_target(images.double(), window_px), exact) < 1e-11
    own, official = (relative_error(f(images), exact) for f in (lambda x: norm_target(x, window_px), square_window))
    assert own < max(2 * official, 5e-6), (own, official)


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


def test_clips_are_hidden_by_tubes_and_every_frame_counts():
    """Hidden pixels of no frame matter to the encoder, and the loss is the mean over those of all frames."""
    torch.manual_seed(0)
    encoder = swin_v2(
        "demo", num_classes=0, pretrained_window_sizes=(0, 0), frames=4, patch_frames=2, window_frames=2, window_size=4
    )
    model = SimMIM(encoder, 8, norm_target=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    clips, mask = torch.randn(2, 3, 4, 32, 32), torch.rand(2, 8, 8) < 0.5
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None, None].expand_as(clips)
    weight = torch.tensor([1.0, 0.5])
    out = model(clips, mask, weight, by_image=True)
    assert out["reconstruction"].shape == clips.shape
    changed = torch.where(hidden, torch.randn_like(clips), clips)
    assert torch.equal(model(changed, mask)["reconstruction"], out["reconstruction"])
    late = clips.clone()
    late[:, :, 3] = torch.where(hidden[:, :, 3], late[:, :, 3], 0)
    assert not torch.allclose(model(late, mask)["reconstruction"][:, :, 0], out["reconstruction"][:, :, 0])
    targets = torch.stack([norm_target(frame, 5) for frame in clips.unbind(2)], dim=2)
    errors = (out["reconstruction"] - targets).abs()
    summed = sum(each * errors[i][hidden[i]].sum() for i, each in enumerate(weight))
    count = sum(each * hidden[i].sum() for i, each in enumerate(weight))
    assert out["loss"].item() == pytest.approx((summed / count).item(), rel=1e-4)
    torch.testing.assert_close(out["image_counts"], weight * hidden.flatten(1).sum(1))
    own = torch.stack([errors[i][hidden[i]].mean() for i in range(2)])
    torch.testing.assert_close(out["image_losses"], own)
