"""SwinV2 against an independent float64 implementation, the paper's sizes, official names, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from swinv2_train.models import SIZES, SimMIM, SwinTransformerV2, count_parameters, multiply_adds, swin_v2
from tests.support.model_cases import (
    CLIP_CASES,
    FLOAT64_BOUND,
    QUICK_AND_SLOW,
    gradients_of,
    random_model,
    reference_of,
    relative_error,
    settings_of,
)


@pytest.mark.parametrize("case", [*QUICK_AND_SLOW, *CLIP_CASES])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_every_gradient_equal_an_independent_float64_implementation(case, masked):
    """The reference shares no code: a wrong shift, mask, padding, clamping, merging or coordinate shows here."""
    settings = settings_of(case)
    model = random_model(**settings)
    images = torch.randn(2, 3, *model.input_size, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, *model.sizes[0][-2:]) < 0.5 if masked else None
    if masked:
        model.mask_token = torch.nn.Parameter(torch.randn(1, 1, 8, dtype=torch.float64))
    state = dict(model.named_parameters())
    expected = reference_of(model, settings, state, images, mask)
    got = model.forward_features(images, mask)
    assert [m.shape for m in got] == [m.shape for m in expected]
    for own, independent in zip(got, expected, strict=True):
        assert relative_error(own, independent) < FLOAT64_BOUND
    inputs = {"images": images, **state}
    own, independent = (gradients_of(maps, inputs) for maps in (got, expected))
    floor = 1e-6 * max(g.abs().max().item() for g in independent.values())  # a window of one token has no bias to learn
    for name in inputs:
        assert relative_error(own[name], independent[name], floor) < FLOAT64_BOUND, name
        if name.endswith("logit_scale"):
            assert not own[name][state[name] > math.log(100)].any(), f"{name}: the clamp lets gradient pass"


@pytest.mark.parametrize("case", ["square, window 8", "odd maps 13x19, 7x10, 4x5", "extra norms", "pretrained windows"])
def test_float32_is_within_ten_times_the_rounding_of_float32(case):
    """Its own rounding: the error of the reference, evaluated in float32, against the reference in float64.

    Measured 1.4 of it forward (3e-7 of the largest entry) and 2.9 in the gradients (2e-5).
    """
    settings = settings_of(case)
    model = random_model(**settings).float()
    images = torch.randn(2, 3, *model.img_size, requires_grad=True)
    inputs = {"images": images, **dict(model.named_parameters())}
    exact_inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    exact = reference_of(model, settings, exact_inputs, exact_inputs["images"])
    rounded = reference_of(model, settings, inputs, images)
    got = model.forward_features(images)
    exact_gradients = gradients_of(exact, exact_inputs)
    floor = 1e-3 * max(g.abs().max().item() for g in exact_gradients.values())
    errors = {}
    for kind, maps in (("own", got), ("rounding", rounded)):
        gradients = gradients_of(maps, inputs)
        errors[kind] = [max(relative_error(m, e) for m, e in zip(maps, exact, strict=True))]
        errors[kind].append(max(relative_error(gradients[name], exact_gradients[name], floor) for name in inputs))
    for own, rounding in zip(errors["own"], errors["rounding"], strict=True):
        assert own < 10 * rounding


PARAMETERS = {  # 28, 50, 88, 197, 658 M, 3.0 B in the papers; the digits are this code's, so that no change slips in
    "tiny": 28_347_154,
    "small": 49_728_418,
    "base": 87_918_816,
    "large": 196_739_932,
    "huge": 658_036_370,
    "giant": 3_001_940_680,
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_have_the_papers_parameter_counts(size):
    """28, 50, 88, 197, 658 M and 3.0 B; built on the meta device, so that giant costs nothing."""
    with torch.device("meta"):
        model = swin_v2(size, img_size=192, window_size=12)
    assert count_parameters(model) == pytest.approx(PARAMETERS[size], abs=10)


@pytest.mark.parametrize(
    ("size", "img_size", "window", "giga"),
    [("tiny", 256, 8, 5.9), ("tiny", 256, 16, 6.6), ("base", 192, 12, 11.76), ("large", 384, 24, 115.4),
     ("huge", 192, 12, 85.75), ("giant", 192, 12, 370.7), ("giant", 640, 40, 4639)],
)  # fmt: skip
def test_multiply_adds_equal_the_published_ones(size, img_size, window, giga):
    """MODELHUB's and the official flops() figures."""
    with torch.device("meta"):
        model = swin_v2(size, img_size=img_size, window_size=window)
    assert multiply_adds(model) / 1e9 == pytest.approx(giga, rel=0.01)


def test_multiply_adds_count_what_padding_costs():
    """By hand: a map of 5x5 tokens in windows of 4 is attended to as 8x8, and merged as 6x6."""
    model = SwinTransformerV2(
        img_size=10, patch_size=2, num_classes=0, embed_dim=8, depths=(2, 1), num_heads=(1, 1), window_size=4,
        pretrained_window_sizes=(0, 0),
    )  # fmt: skip
    patches = 25 * 8 * (3 * 2 * 2) + 25 * 8
    attention, mlp, norms = 64 * (4 * 8 * 8 + 2 * 16 * 8), 25 * 2 * 8 * 32, 25 * 2 * 8
    merging = 9 * 32 * 16 + 25 * 8 // 2
    last = 9 * (4 * 16 * 16 + 2 * 9 * 16) + 9 * 2 * 16 * 64 + 9 * 2 * 16  # windows clamped to 3
    assert multiply_adds(model) == patches + 2 * (attention + mlp + norms) + merging + last + 9 * 16


def test_huge_and_giant_have_an_extra_norm_every_six_blocks():
    """Section 3.6; the others have none."""
    with torch.device("meta"):
        giant, base = (swin_v2(s, img_size=192, window_size=12) for s in ("giant", "base"))
    extra = [name for name, _ in giant.named_parameters() if name.endswith("norm3.weight")]
    assert extra == [f"layers.2.blocks.{j}.norm3.weight" for j in range(5, 42, 6)]
    assert not [name for name, _ in base.named_parameters() if "norm3" in name]


def test_parameter_names_and_shapes_are_the_official_ones():
    """Other people's checkpoints load by these names."""
    state = swin_v2("tiny", num_classes=7).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith("layers.1.blocks.1.")}
    p = "layers.1.blocks.1."
    assert shapes == {
        p + "attn.logit_scale": (6, 1, 1), p + "attn.q_bias": (192,), p + "attn.v_bias": (192,),
        p + "attn.cpb_mlp.0.weight": (512, 2), p + "attn.cpb_mlp.0.bias": (512,), p + "attn.cpb_mlp.2.weight": (6, 512),
        p + "attn.qkv.weight": (576, 192), p + "attn.proj.weight": (192, 192), p + "attn.proj.bias": (192,),
        p + "norm1.weight": (192,), p + "norm1.bias": (192,), p + "norm2.weight": (192,), p + "norm2.bias": (192,),
        p + "mlp.fc1.weight": (768, 192), p + "mlp.fc1.bias": (768,),
        p + "mlp.fc2.weight": (192, 768), p + "mlp.fc2.bias": (192,),
    }  # fmt: skip
    others = {name for name in state if not name.startswith("layers.") or "downsample" in name}
    merging = {f"layers.{i}.downsample.{n}" for i in range(3) for n in ("reduction.weight", "norm.weight", "norm.bias")}
    rest = {"patch_embed.proj", "patch_embed.norm", "norm", "head"}
    assert others == merging | {f"{name}.{part}" for name in rest for part in ("weight", "bias")}


def test_every_block_is_the_identity_at_the_start():
    """Zero-initialised res-post-norms (official code): a fresh model is patch embedding and merging alone."""
    model = swin_v2("tiny", img_size=64, window_size=4).eval()
    x = torch.randn(1, 16, 16, 96)
    assert torch.equal(model.layers[0].blocks[1](x), x)
    assert model.layers[0].blocks[0].attn.logit_scale.exp().flatten().tolist() == pytest.approx([10.0] * 3)


def test_forward_features_gives_one_map_per_stage():
    """The contract of DESIGN section 3."""
    model = swin_v2("tiny", img_size=(64, 128), window_size=4)
    maps = model.forward_features(torch.randn(2, 3, 64, 128))
    assert [tuple(m.shape) for m in maps] == [(2, 96 * 2**i, 16 // 2**i, 32 // 2**i) for i in range(4)]


def test_drop_path_drops_whole_branches_per_sample_and_keeps_the_mean():
    """Per sample, never a skipped module: ZeRO-3 ranks must run the same modules."""
    from swinv2_train.models.swin_v2 import drop_path_factors

    torch.manual_seed(0)
    factors = drop_path_factors(torch.ones(4000, 3, 2), 0.3, training=True)
    assert factors.shape == (4000, 1, 1)
    rows = factors.flatten(1)
    assert ((rows == 0).all(1) | torch.isclose(rows, torch.tensor(1 / 0.7)).all(1)).all()
    assert rows.mean() == pytest.approx(1.0, abs=0.05)
    assert drop_path_factors(torch.ones(4, 3), 0.3, training=False) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 250}, r"img_size height 250 is not a multiple of patch_size 4; nearest: 248, 252$"),
        ({"img_size": (256, 3)}, r"img_size width 3 is not a multiple of patch_size 4; nearest: 4$"),
        ({"img_size": (256, 0)}, r"img_size .* must be a positive int or a \(height, width\) pair"),
        ({"depths": (2, 2)}, r"must have one entry per stage"),
        ({"num_heads": (0, 6, 12, 24)}, r"num_heads \(\(0, 6, 12, 24\)\) must be 1 or more"),
        ({"depths": (), "num_heads": ()}, r"depths \(\(\)\) must be 1 or more"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate \(1.0\) must be at least 0 and less than 1"),
        ({"num_heads": (5, 6, 12, 24)}, r"num_heads\[0\] \(5\) does not divide the stage's 96 channels"),
        (
            {"pretrained_window_sizes": (0, 0, (4, 4, 4), 0)},
            r"pretrained_window_sizes \(\(4, 4, 4\)\) must be a positive",
        ),
        ({"pretrained_window_sizes": (0, -4, 0, 0)}, r"pretrained_window_sizes \(\(-4, -4\)\) must be a positive"),
        (
            {"window_size": (8, 4), "clamp_to_shorter_side": True},
            r"window_size \(8, 4\) must be square with clamp_to_shorter_side",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_rejected_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        SwinTransformerV2(**settings)


def test_images_and_masks_that_do_not_fit_are_rejected():
    model = SimMIM(swin_v2("tiny", img_size=64, window_size=4, num_classes=0))
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="images' width 30 is not a multiple of patch_size 4; nearest: 28, 32"):
        model(torch.randn(1, 3, 32, 30), mask)
    with pytest.raises(ValueError, match="images' height 0 is not a multiple of patch_size 4; nearest: 4"):
        model(torch.randn(1, 3, 0, 32), mask)
    with pytest.raises(ValueError, match=r"mask is .* of shape \(1, 8, 8\), the images have \(1, 8, 16\) patches"):
        model(torch.randn(1, 3, 32, 64), mask)


def test_unknown_size_lists_the_known_ones():
    with pytest.raises(ValueError, match="no SwinV2 size 'gigantic'; there are: demo, tiny"):
        swin_v2("gigantic")
    assert set(SIZES) == {"demo", *PARAMETERS}
