"""UPerNet on SwinV2: published sizes, the reference implementation's arithmetic, and norms that are of one image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.distributed import all_reduce_sum, sum_with_gradient
from swinv2_train.models import count_parameters, multiply_adds, swin_v2
from swinv2_train.models.batch_norm import BatchNorm
from swinv2_train.models.initial import on_meta
from swinv2_train.models.resize import grid_means, resized
from swinv2_train.models.upernet import FCNHead, UPerHead, UPerNet, norm_of, upernet_multiply_adds
from tests.support.harness import run_distributed

PARAMETERS = {  # with 150 classes: encoder and the norms of its four maps, UPerNet's head, the auxiliary head
    "tiny": (27_579_498, 31_497_366, 923_798),
    "small": (48_960_762, 31_497_366, 923_798),
    "base": (86_895_608, 33_315_990, 1_218_710),
    "large": (195_205_620, 36_953_238, 1_808_534),
    "huge": (655_224_298, 46_046_358, 3_283_094),
    "giant": (2_997_850_848, 55_139_478, 4_757_654),
}


def small(depths=(1, 1, 1, 1), **head) -> UPerNet:
    torch.manual_seed(0)
    heads = (1, 2, 4, 8)[: len(depths)]
    encoder = swin_v2(
        "tiny", num_classes=0, img_size=64, window_size=4, embed_dim=8, depths=depths, num_heads=heads,
        pretrained_window_sizes=(0,) * len(depths), drop_path_rate=0.0,
    )  # fmt: skip
    return UPerNet(encoder, 5, head_channels=16, aux_channels=8, **head)


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size_has_the_published_number_of_parameters(size):
    """60, 81, 121 and 234 million for tiny to large, as Swin's paper prints; four norms whichever of them is new."""
    with on_meta():
        model = UPerNet(swin_v2(size, num_classes=0), 150)
    decoder = model.decoder
    parts = (
        count_parameters(model.encoder) + count_parameters(decoder.norms),
        count_parameters(decoder.decode_head), count_parameters(decoder.auxiliary_head),
    )  # fmt: skip
    assert parts == PARAMETERS[size]
    assert count_parameters(model) == sum(parts)


@pytest.mark.parametrize(("size", "published"), [("tiny", 945e9), ("small", 1038e9), ("base", 1188e9)])
def test_multiply_adds_are_those_of_the_published_models(size, published):
    """Of 512 x 2048 px with V1's window 7.  The head takes 845.4 G of them for 96 channels."""
    with on_meta():
        model = UPerNet(swin_v2(size, num_classes=0, img_size=(512, 2048), window_size=7), 150)
    assert upernet_multiply_adds(model) == pytest.approx(published, rel=2e-3)
    if size == "tiny":
        head = upernet_multiply_adds(model) - multiply_adds(model.encoder)
        assert head == pytest.approx(845.4e9, rel=1e-4)


@pytest.mark.parametrize("size", [(14, 18), (13, 29), (3, 4), (7, 20), (7, 9), (1, 1)])
def test_resizing_is_that_of_torch_with_its_gradient(size):
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    ours, theirs = resized(x, size), F.interpolate(x, size, mode="bilinear", align_corners=False)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)
    weight = torch.randn_like(theirs)
    gradients = [torch.autograd.grad((each * weight).sum(), x)[0] for each in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", [1, 2, 3, 6, 11])
def test_means_over_a_grid_are_those_of_torch(side):
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    assert torch.allclose(grid_means(x, side), F.adaptive_avg_pool2d(x, side), rtol=0, atol=1e-13)


def test_both_heads_are_those_of_transformers_with_equal_weights():
    """Its UperNetHead and UperNetFCNHead, whose norm is a BatchNorm; maps of odd sizes, evaluation and training."""
    from transformers import UperNetConfig
    from transformers.models.swin import SwinConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    torch.manual_seed(0)
    widths = [8, 16, 32, 64]
    config = UperNetConfig(
        backbone_config=SwinConfig(out_features=["stage1"]), hidden_size=16, auxiliary_in_channels=32,
        auxiliary_channels=8, num_labels=5, auxiliary_concat_input=False, auxiliary_num_convs=1,
    )  # fmt: skip
    norm = norm_of("batch")
    pairs = (
        (UPerHead(widths, 16, 5, 0.0, norm), UperNetHead(config, in_channels=widths), _upper_name),
        (FCNHead(32, 8, 5, 0.0, norm), UperNetFCNHead(config, widths), _fcn_name),
    )
    maps = [torch.randn(2, width, 22 // 2**i + 1, 30 // 2**i + 1) for i, width in enumerate(widths)]
    for ours, theirs, name in pairs:
        state = {key: torch.randn_like(value) * 0.2 for key, value in ours.named_parameters()}
        ours.load_state_dict(state, strict=False)
        missing, unexpected = theirs.load_state_dict({name(key): value for key, value in state.items()}, strict=False)
        assert not unexpected and all(key.endswith(_BUFFERS) for key in missing)
        single = isinstance(ours, FCNHead)
        for train in (True, False):  # running averages of the one are used in the other
            a = ours.train(train)(maps[2] if single else maps)
            b = theirs.train(train)(maps)
            assert torch.allclose(a, b, atol=2e-5), float((a - b).abs().max())  # measured worst 4e-6


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _upper_name(name: str) -> str:
    name = name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier")
    if name.startswith("psp_modules."):
        _, number, rest = name.split(".", 2)
        name = f"psp_modules.{number}.1.{rest}"
    return name


def _fcn_name(name: str) -> str:
    return name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier")


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_an_image_does_not_depend_on_its_neighbours_or_on_being_alone(norm):
    """The pooled 1 x 1 map of one image has no variance over a batch, so a BatchNorm could not take it."""
    model = small(head_norm=norm).double().train()
    model.decoder.decode_head.dropout.p = model.decoder.auxiliary_head.dropout.p = 0.0
    images = torch.randn(3, 3, 50, 70, dtype=torch.float64)
    together = model(images)
    assert together["logits"].shape == (3, 5, 13, 18) and together["auxiliary"].shape == (3, 5, 4, 5)
    for number in range(3):
        alone = model(images[number : number + 1])
        for name, scores in alone.items():
            assert torch.allclose(scores[0], together[name][number], rtol=0, atol=1e-12)
    assert set(model.eval()(images)) == {"logits"}
    assert not list(model.buffers())


def test_maps_are_normed_each_by_its_own_norm_and_the_last_by_the_encoders():
    model = small().eval()
    images = torch.randn(1, 3, 64, 64)
    raw = model.encoder.forward_features(images)
    seen: list[list[Tensor]] = []
    model.decoder.decode_head.register_forward_pre_hook(lambda _, inputs: seen.append(list(inputs[0])))
    model(images)
    for normed, plain, norm in zip(seen[0][:3], raw, model.decoder.norms, strict=False):
        places = plain.permute(0, 2, 3, 1)
        expected = F.layer_norm(places, norm.normalized_shape, norm.weight, norm.bias, 1e-5).permute(0, 3, 1, 2)
        assert torch.allclose(normed, expected, atol=1e-6)
    assert torch.equal(seen[0][3], raw[3])


def test_fewer_stages_work_and_one_does_not():
    assert small(depths=(1, 1)).eval()(torch.randn(1, 3, 64, 64))["logits"].shape == (1, 5, 16, 16)
    with pytest.raises(ValueError, match="1 stage; UPerNet fuses the maps of 2 or more"):
        small(depths=(1,))
    with pytest.raises(ValueError, match="no norm 'sync'; there are: layer, group, batch, sync_batch"):
        small(head_norm="sync")


def test_a_norm_over_ranks_is_the_batch_norm_of_all_their_images():
    """Values, gradients of inputs and weights, and running averages; torch's own takes no CPU tensors in a group."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 5, 7, dtype=torch.float64) * 3 + 1
    upstream = torch.randn_like(images)
    whole = nn.BatchNorm2d(3).double()
    everything = images.clone().requires_grad_()
    expected = whole(everything)
    (expected * upstream).sum().backward()

    def rank(world):
        norm = BatchNorm(3, sum_with_gradient).double()
        mine = slice(2 * world.rank, 2 * world.rank + 2)
        x = images[mine].clone().requires_grad_()
        out = norm(x)
        (out * upstream[mine]).sum().backward()
        weights = [all_reduce_sum(p.grad) for p in norm.parameters()]  # as an engine does
        return [out.detach(), x.grad, *weights, norm.running_mean, norm.running_var]

    first, second = run_distributed(rank, 2)
    assert torch.allclose(torch.cat([first[0], second[0]]), expected, atol=1e-12)
    assert torch.allclose(torch.cat([first[1], second[1]]), everything.grad, atol=1e-12)
    for a, b, right in zip(first[2:], second[2:], (whole.weight.grad, whole.bias.grad, whole.running_mean,
                                                   whole.running_var), strict=True):  # fmt: skip
        assert torch.equal(a, b) and torch.allclose(a.double(), right, rtol=1e-6, atol=1e-12)


def test_running_averages_stay_float32_and_have_values_where_parameters_have_none():
    norm = BatchNorm(3).bfloat16()
    assert norm.weight.dtype == torch.bfloat16 and norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with on_meta():
        without = BatchNorm(3)
    assert without.weight.is_meta and torch.equal(without.running_var, torch.ones(3))
