"""Weight decay and layer decay reach the parameters that the official code means, and no rule is silently empty."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swinv2_train.config import ConfigError
from swinv2_train.models import swin_v2
from swinv2_train.training.param_groups import build_param_groups, lr_scales, no_decay_names
from tests.support.configs import make_config


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.logit_scale = nn.Parameter(torch.zeros(2, 1, 1))
        self.attn.cpb_mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
        self.attn.qkv = nn.Linear(4, 12, bias=False)
        self.norm1 = nn.LayerNorm(4)


class Stage(nn.Module):
    def __init__(self, depth, last):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        if not last:
            self.downsample = nn.Module()
            self.downsample.reduction = nn.Linear(16, 8, bias=False)
            self.downsample.norm = nn.LayerNorm(8)


class Encoder(nn.Module):
    """Official names, depths (2, 3)."""

    def __init__(self):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 4, 4, 4)
        self.layers = nn.ModuleList([Stage(2, False), Stage(3, True)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


class SimMIMLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.Sequential(nn.Conv2d(4, 48, 1))


def config(no_decay=("1d", "cpb_mlp", "logit_scale", "mask_token"), layer_decay=1.0):
    return make_config(optim={"no_decay": list(no_decay), "layer_decay": layer_decay}).optim


def names_of(groups, module):
    names = {id(p): name for name, p in module.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_norms_biases_cpb_logit_scale_and_mask_token_do_not_decay():
    module = SimMIMLike()
    groups = build_param_groups(module, config())
    names = names_of(groups, module)
    assert set(names) == {"decay", "no_decay"}
    assert {g["name"]: g["weight_decay"] for g in groups} == {"decay": 0.05, "no_decay": 0.0}
    assert all(part in str(names["no_decay"]) for part in ("mask_token", "logit_scale", "cpb_mlp.0.weight", "norm"))
    assert all(name.endswith("weight") for name in names["decay"])
    assert not any(part in name for name in names["decay"] for part in ("norm", "cpb_mlp", "logit_scale"))
    assert "encoder.layers.0.downsample.reduction.weight" in names["decay"]


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none():
    module = SimMIMLike()
    module.encoder.head.weight.requires_grad_(False)
    groups = build_param_groups(module, config(layer_decay=0.8))
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_no_decay_rule_that_matches_nothing_is_rejected_with_near_names():
    with pytest.raises(
        ConfigError,
        match=r"optim\.no_decay pattern 'logit_scales' matches no parameter; names end in: attn\.logit_scale",
    ):
        build_param_groups(SimMIMLike(), config(no_decay=("1d", "logit_scales")))


def test_one_dimensional_counts_the_dimensions_as_built():
    """Under ZeRO-3 every shape is (0,): the rule must look at ds_shape, or all decay would be gone."""
    module = Encoder()
    for parameter in module.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    names = names_of(build_param_groups(module, config(no_decay=("1d",))), module)
    assert "head.weight" in names["decay"]
    assert "head.bias" in names["no_decay"]
    assert no_decay_names({"a": 2, "b": 1, "c": 0}, ["1d"]) == {"b", "c"}


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("patch_embed.proj.weight", 0),
        ("mask_token", 0),
        ("layers.0.blocks.0.attn.logit_scale", 1),
        ("layers.0.blocks.1.norm1.bias", 2),
        ("layers.0.downsample.norm.weight", 2),
        ("layers.0.extra_norms.0.weight", 2),
        ("layers.1.blocks.0.attn.qkv.weight", 3),
        ("layers.1.blocks.2.attn.qkv.weight", 5),
        ("norm.weight", 6),
        ("head.bias", 6),
    ],
)
def test_layer_decay_counts_layers_as_the_official_code(prefix, name, layer):
    """depths (2, 3): n = 2 + 3 + 2 = 7, scale = 0.5 ** (n - 1 - layer)."""
    names = [prefix + n for n, _ in Encoder().named_parameters()] + [prefix + "layers.0.extra_norms.0.weight"]
    assert lr_scales(names, 0.5)[prefix + name] == (layer, 0.5 ** (6 - layer))


def test_decoder_belongs_to_the_last_layer_and_groups_carry_their_scale():
    module = SimMIMLike()
    groups = build_param_groups(module, config(layer_decay=0.5))
    names = names_of(groups, module)
    assert "decoder.0.weight" in names["layer_6_decay"]
    scales = {g["name"]: g["lr_scale"] for g in groups}
    assert scales["layer_6_decay"] == 1.0
    assert scales["layer_0_decay"] == 0.5**6


def test_layer_decay_without_layers_is_rejected():
    with pytest.raises(ConfigError, match=r"optim\.layer_decay \(0\.9\) needs parameters named layers\.I\.blocks\.J"):
        build_param_groups(nn.Linear(3, 3), config(no_decay=("1d",), layer_decay=0.9))


def test_the_official_pretraining_rule_of_decaying_position_bias_and_logit_scale_is_a_setting_and_not_the_default():
    """The official SimMIM code means to spare both, but its patterns never match behind 'encoder.'."""
    from swinv2_train.models import SimMIM, SwinTransformerV2

    encoder = SwinTransformerV2(
        img_size=32, num_classes=0, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4,
        pretrained_window_sizes=(0, 0),
    )  # fmt: skip
    module = SimMIM(encoder, encoder_stride=8)
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def decayed(**optim) -> set[str]:
        groups = build_param_groups(module, make_config(optim=optim).optim)
        return {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}

    spared = {name for name in names.values() if "cpb_mlp" in name and name.endswith("weight") or "logit_scale" in name}
    assert len(spared) == 2 * 3 and not spared & decayed()
    assert decayed(no_decay=["1d", ".bias", "mask_token"]) == decayed() | spared


def test_a_classifiers_head_learns_faster_than_its_encoder_and_an_encoder_alone_has_no_share():
    """optim.encoder_lr_scale, where no name says which parameters are the encoder's."""
    settings, module = config(), Encoder()
    settings.encoder_lr_scale = 0.1
    groups = build_param_groups(module, settings)
    scales = {name: group["lr_scale"] for group in groups for name in names_of([group], module)[group["name"]]}
    assert {scales.pop("head.weight"), scales.pop("head.bias")} == {1.0}
    assert set(scales.values()) == {0.1} and len(scales) == len(list(module.parameters())) - 2
    assert {group["name"] for group in groups} == {"decay", "no_decay", "encoder_decay", "encoder_no_decay"}
    del module.head
    with pytest.raises(ConfigError, match=r"optim.encoder_lr_scale \(0.1\) is for an encoder with heads beside it"):
        build_param_groups(module, settings)


def test_frozen_parameters_are_named_by_patterns_and_change_no_other_ones_rate():
    """Layers are counted as if all were trained; a no-decay pattern may match frozen ones alone."""
    config = make_config(optim={"layer_decay": 0.5, "no_decay": ["patch"]})

    def rates(freeze: list[str]) -> dict[str, float]:
        config.optim.freeze = freeze
        sizes = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}
        module = swin_v2("tiny", num_classes=3, img_size=64, window_size=2, **sizes)
        groups = build_param_groups(module, config.optim)
        scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
        return {name: scale[id(p)] for name, p in module.named_parameters() if id(p) in scale}

    every, some = rates([]), rates(["layers.1.blocks.1", "patch_embed"])
    assert some == {name: rate for name, rate in every.items() if "blocks.1" not in name and "patch_embed" not in name}
    with pytest.raises(ConfigError, match=r"optim.freeze pattern 'layer.0' matches no parameter; names end in"):
        rates(["layer.0"])
    with pytest.raises(ConfigError, match=r"optim.freeze \(patch_embed, layers, norm, head\) leaves nothing to train"):
        rates(["patch_embed", "layers", "norm", "head"])
