"""SwinV2 against an independent float64 implementation, the paper's sizes, and its bf16 behaviour."""

from __future__ import annotations

import pytest
import torch
from unit.reference_swin_v2 import reference_features

from swinv2_train.models import SIZES, SwinTransformerV2, count_parameters, multiply_adds, swin_v2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.swin_v2 import Float32LayerNorm


def random_model(**settings) -> SwinTransformerV2:
    """A float64 model whose norms and scales are not at their initial values, so that every term counts."""
    torch.manual_seed(0)
    model = SwinTransformerV2(drop_path_rate=0.0, num_classes=0, **settings).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            if "logit_scale" in name:
                parameter.copy_(torch.linspace(1.0, 6.0, parameter.numel()).view_as(parameter))  # some above log 100
    return model


CASES = {
    "square, shifted": {"img_size": 32, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4)},
    "window as large as the map": {"img_size": 16, "window_size": 8, "depths": (2,), "num_heads": (2,)},
    "window larger than the last map": {"img_size": 32, "window_size": 8, "depths": (2, 2), "num_heads": (1, 2)},
    "non-square map": {"img_size": (16, 32), "window_size": 4, "depths": (2, 2), "num_heads": (2, 4)},
    "non-square window": {"img_size": (16, 48), "window_size": (2, 6), "depths": (2, 1), "num_heads": (2, 4)},
    "pretrained window": {
        "img_size": 32,
        "window_size": 8,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "pretrained_window_sizes": (4, 2),
    },
    "extra norms": {"img_size": 16, "window_size": 4, "depths": (4,), "num_heads": (2,), "extra_norm_period": 2},
    "three stages": {"img_size": 32, "window_size": 2, "depths": (1, 2, 2), "num_heads": (2, 2, 2)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_every_gradient_equal_an_independent_float64_implementation(case, masked):
    """The reference shares no code: a wrong shift, mask, order of merging or coordinate shows here."""
    settings = {"patch_size": 2, "embed_dim": 8, **CASES[case]}
    settings.setdefault("pretrained_window_sizes", (0,) * len(settings["depths"]))
    model = random_model(**settings)
    images = torch.randn(2, 3, *model.img_size, dtype=torch.float64)
    mask = torch.rand(2, *model.sizes[0]) < 0.5 if masked else None
    if masked:
        model.mask_token = torch.nn.Parameter(torch.randn(1, 1, 8, dtype=torch.float64))
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_features(
        state,
        images,
        patch=2,
        depths=model.depths,
        heads=model.num_heads,
        window=model.window_size,
        pretrained=settings["pretrained_window_sizes"],
        norm_period=settings.get("extra_norm_period", 0),
        mask=mask,
    )
    got = model.double().forward_features(images, mask)[-1]
    probe = torch.randn_like(expected)
    # Bias, scale, softmax and norms are computed in float32 inside a float64 model, so the bounds are float32's:
    # measured worst 9e-7 forward, 7e-5 of the largest entry in the gradients.
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    (got * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, parameter in model.named_parameters():
        largest = state[name].grad.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            parameter.grad / largest,
            state[name].grad / largest,
            msg=lambda m, n=name: f"{n}: {m}",
            atol=2e-4,
            rtol=0,
        )


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
    x = torch.randn(1, 256, 96)
    assert torch.equal(model.layers[0].blocks[1](x), x)
    assert model.layers[0].blocks[0].attn.logit_scale.exp().flatten().tolist() == pytest.approx([10.0] * 3)


def test_forward_features_gives_one_map_per_stage():
    """The contract of DESIGN section 3."""
    model = swin_v2("tiny", img_size=(64, 128), window_size=4)
    maps = model.forward_features(torch.randn(2, 3, 64, 128))
    assert [tuple(m.shape) for m in maps] == [(2, 96 * 2**i, 16 // 2**i, 32 // 2**i) for i in range(4)]


def test_drop_path_drops_whole_branches_per_sample_and_keeps_the_mean():
    """Per sample, never a skipped module: ZeRO-3 ranks must run the same modules."""
    from swinv2_train.models.swin_v2 import drop_path

    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 3, 2), 0.3, training=True)
    rows = dropped.flatten(1)
    assert ((rows == 0).all(1) | torch.isclose(rows, torch.tensor(1 / 0.7)).all(1)).all()
    assert rows.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop_path(torch.ones(4, 3), 0.3, training=False), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 250}, r"img_size height 250 is not a multiple of patch_size 4 .* nearest: 224, 256"),
        (
            {"img_size": 224, "window_size": 8},
            r"window_size 8 does not tile the 28 tokens of stage 2.*windows that do: 7, ",
        ),
        ({"img_size": (256, 0)}, r"img_size .* must be a positive int or a \(height, width\) pair"),
        ({"depths": (2, 2)}, r"must have one entry per stage"),
        ({"num_heads": (5, 6, 12, 24)}, r"num_heads\[0\] \(5\) does not divide the stage's 96 channels"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        SwinTransformerV2(**settings)


def test_images_of_another_size_are_rejected():
    with pytest.raises(ValueError, match=r"images are \(32, 32\) px, the model was built for \(64, 64\)"):
        swin_v2("tiny", img_size=64, window_size=4)(torch.randn(1, 3, 32, 32))


def test_unknown_size_lists_the_known_ones():
    with pytest.raises(ValueError, match="no SwinV2 size 'gigantic'; there are: demo, tiny"):
        swin_v2("gigantic")
    assert set(SIZES) == {"demo", *PARAMETERS}


def test_bf16_weights_give_gradients_near_float32():
    """DeepSpeed keeps bf16 weights.  Bias, scale, softmax and norms stay in float32: torch's own bf16 CPU LayerNorm
    loses most of its bias gradient over many tokens, which this bound catches (measured worst 0.008; with
    torch's norm 0.10)."""
    torch.manual_seed(0)
    model = swin_v2(
        "demo", img_size=32, window_size=4, num_classes=10, pretrained_window_sizes=(0, 0), drop_path_rate=0.0
    )
    images = torch.randn(64, 3, 32, 32) + 1
    labels = torch.arange(64) % 10
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).zero_grad()
        torch.nn.functional.cross_entropy(model(images).float(), labels).backward()
        gradients[dtype] = {name: p.grad.float().clone() for name, p in model.named_parameters()}
    total = torch.stack([g.norm() for g in gradients[torch.float32].values()]).norm()
    for name, exact in gradients[torch.float32].items():
        if exact.norm() > 1e-3 * total:
            error = (gradients[torch.bfloat16][name] - exact).norm() / exact.norm()
            assert error < 0.03, f"{name}: {error:.3f}"


def test_bf16_norm_keeps_its_bias_gradient():
    """The measured fault of torch's bf16 CPU kernel, alone: 8,192 tokens of gradient 1 must sum to 8,192."""
    norm = Float32LayerNorm(8).bfloat16()
    norm(torch.randn(8192, 8).bfloat16()).backward(torch.ones(8192, 8).bfloat16())
    assert torch.equal(norm.bias.grad.float(), torch.full((8,), 8192.0))


def test_position_bias_stays_float32_under_bf16_weights():
    """16 sigmoid(.) in bf16 has steps of 0.06."""
    attention = WindowAttention(32, (4, 4), 2).bfloat16()
    assert attention.position_bias(torch.device("cpu")).dtype == torch.float32
