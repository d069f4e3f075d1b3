"""Other image sizes and windows than those of construction: at run time, on a live model, and as in the paper."""

from __future__ import annotations

import math

import pytest
import torch

from swinv2_train.models import SwinTransformerV2, multiply_adds
from tests.support.model_cases import FLOAT64_BOUND, random_model, reference_of, relative_error

SMALL = {
    "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "pretrained_window_sizes": (0, 0, 0),
}  # fmt: skip


def equal(maps: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(own, other) for own, other in zip(maps, others, strict=True))


def test_pretrained_windows_of_0_become_the_windows_really_used():
    """192 px, window 12: the last map has 6 tokens per side, hence the official (12, 12, 12, 6)."""
    with torch.device("meta"):
        model = SwinTransformerV2(img_size=192, window_size=12)
        oblong = SwinTransformerV2(img_size=(64, 256), window_size=(4, 8), pretrained_window_sizes=(0, 5, (0, 3), 0))
        official = SwinTransformerV2(img_size=(64, 256), window_size=8, clamp_to_shorter_side=True)
    assert model.pretrained_window_sizes == ((12, 12), (12, 12), (12, 12), (6, 6))
    assert oblong.pretrained_window_sizes == ((4, 8), (5, 5), (4, 3), (2, 8))
    assert official.pretrained_window_sizes == ((8, 8), (8, 8), (4, 4), (2, 2))
    assert [stage.blocks[0].attn.pretrained_window_size for stage in oblong.layers] == [(4, 8), (5, 5), (4, 3), (2, 8)]


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (26, 38), (8, 64), (2, 2)])
def test_a_model_takes_images_of_any_size_as_if_it_were_built_for_them(size):
    """The same weights mean the same: built for 32 px, where the windows are 8, 8 and 4, or for the images at hand."""
    model = random_model(**SMALL, img_size=32, window_size=8)
    settings = {**SMALL, "pretrained_window_sizes": ((8, 8), (8, 8), (4, 4))}
    other = random_model(**settings, img_size=size, window_size=8)
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    for own, built, exact in zip(
        model.forward_features(images),
        other.forward_features(images),
        reference_of(model, settings, dict(model.named_parameters()), images),
        strict=True,
    ):
        assert torch.equal(own, built)
        assert relative_error(own, exact) < FLOAT64_BOUND


def test_set_input_size_is_a_model_built_that_way_and_can_be_undone_bit_for_bit():
    model = random_model(**SMALL, img_size=32, window_size=4)
    images, large = (torch.randn(1, 3, side, side, dtype=torch.float64) for side in (32, 48))
    before, cost = model.forward_features(images), multiply_adds(model)
    model.set_input_size(48, (6, 8))
    settings = {**SMALL, "pretrained_window_sizes": (4, 4, 4)}
    other = random_model(**settings, img_size=48, window_size=(6, 8))
    other.load_state_dict(model.state_dict())
    assert equal(model.forward_features(large), other.forward_features(large))
    assert model.sizes == other.sizes == [(24, 24), (12, 12), (6, 6)] and model.grids == other.grids
    assert multiply_adds(model) == multiply_adds(other) > cost
    assert not torch.equal(model.forward_features(images)[0], before[0])  # the window alone makes a difference
    model.set_input_size(window_size=4)
    assert (model.img_size, model.window_size) == ((48, 48), (4, 4))
    model.set_input_size(32)
    assert equal(model.forward_features(images), before)
    assert multiply_adds(model) == cost


def test_a_size_that_does_not_fit_changes_nothing():
    model = SwinTransformerV2(**SMALL, img_size=32, window_size=4, clamp_to_shorter_side=True)
    for arguments, message in (
        ({"img_size": 33, "window_size": 8}, "img_size height 33 is not a multiple of patch_size 2; nearest: 32, 34"),
        ({"img_size": 64, "window_size": (4, 8)}, r"window_size \(4, 8\) must be square with clamp_to_shorter_side"),
        ({"window_size": 0}, r"window_size \(0\) must be a positive int"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_input_size(**arguments)
    assert (model.img_size, model.window_size) == ((32, 32), (4, 4))
    assert {block.window_size for stage in model.layers for block in stage.blocks} == {(4, 4)}


def test_sizes_may_change_from_batch_to_batch_in_training():
    """Gradients of two sizes add up as those of two models do."""
    model = random_model(**SMALL, img_size=32, window_size=8)
    batches = [torch.randn(1, 3, *size, dtype=torch.float64) for size in ((32, 32), (26, 38))]
    separate = [
        torch.autograd.grad(model(images).square().sum(), list(model.parameters()), materialize_grads=True)
        for images in batches
    ]
    for images in batches:
        model(images).square().sum().backward()
    for parameter, first, second in zip(model.parameters(), *separate, strict=True):
        assert torch.equal(parameter.grad, first + second)


TRANSFERS = [(256, 16), (384, 24), (640, 40), (1536, 32)]  # ImageNet, ImageNet, ADE20K, COCO of arXiv:2111.09883


def transferred(img_size: int, window_size: int) -> tuple[SwinTransformerV2, SwinTransformerV2]:
    """A float64 model at 192 px and window 12, and one at another size with its weights."""
    settings = {"embed_dim": 2, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 1, 2)}
    model = random_model(img_size=192, window_size=12, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cpb_mlp" in name:
                parameter.mul_(5)  # a bias that varies
    windows = {"window_size": window_size, "pretrained_window_sizes": (12, 12, 12, 6)}
    other = random_model(img_size=img_size, **windows, **settings)
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize(("img_size", "window_size"), TRANSFERS)
def test_a_transferred_bias_is_the_trained_mlp_at_the_formulas_coordinates(img_size, window_size):
    """Section 3.3, in plain numbers: an offset of the trained window's edge lies at log2(9) / 3 whatever the window."""
    model, other = transferred(img_size, window_size)
    model.set_input_size(img_size, window_size)
    for i, trained in enumerate((12, 12, 12, 6)):
        used = min(window_size, img_size // 4 // 2**i)
        attention = other.layers[i].blocks[0].attn
        bias = attention.position_bias((used, used), torch.device("cpu"))  # (h, N, N)
        assert bias.shape[1] == used**2
        first, second, last = (attention.cpb_mlp[0].weight, attention.cpb_mlp[0].bias, attention.cpb_mlp[2].weight)
        for query, key in torch.randint(used**2, (40, 2)).tolist() + [[0, used**2 - 1], [used**2 - 1, 0]]:
            x = []
            for offset in (query // used - key // used, query % used - key % used):
                scaled = 8 * offset / (trained - 1)
                x.append(math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled))
            hidden = (first[:, 0] * x[0] + first[:, 1] * x[1] + second).clamp(min=0)
            expected = 16 / (1 + torch.exp(-(last * hidden).sum(dim=1)))
            torch.testing.assert_close(bias[:, query, key], expected, rtol=1e-12, atol=0)
        assert bias.std() > 1e-2, "a constant bias would prove nothing"
        live = model.layers[i].blocks[0].attn.position_bias((used, used), torch.device("cpu"))
        assert torch.equal(live, bias)  # the trained model itself, at the new size


@pytest.mark.parametrize(("img_size", "window_size"), TRANSFERS[:2])
def test_transferred_weights_run_at_the_new_size(img_size, window_size):
    """A new model with pretrained_window_sizes and the trained model after set_input_size are the same function."""
    model, other = transferred(img_size, window_size)
    images = torch.randn(1, 3, img_size, img_size)
    model.float().set_input_size(img_size, window_size)
    with torch.no_grad():
        got, expected = model(images), other.float()(images)
    assert torch.equal(got, expected) and got.isfinite().all()
    model.set_input_size(window_size=12)  # the same images, with the trained window
    with torch.no_grad():
        assert not torch.allclose(model(images), expected)
