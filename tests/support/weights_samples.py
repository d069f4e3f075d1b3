"""Small models with every parameter at random, and others' names for them by tables of the tests' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_train.models import SimMIM, SwinTransformerV2

SMALL: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 7,
    "embed_dim": 8,
    "depths": (2, 2, 3, 2),
    "num_heads": (1, 2, 4, 8),
    "window_size": 4,  # shifted on the maps of 16 and 8, clamped to 2 on the last
    "drop_path_rate": 0.0,
}


def randomise(module: nn.Module, seed: int = 0, largest_logit_scale: float = 9.0) -> None:
    """Fill every parameter: with the zeros of res-post-norm in place, no block would reach the output.

    largest_logit_scale: above log 100 = 4.6 the models clamp.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("logit_scale"):
                parameter.copy_((2 + 2 * noise).clamp(max=largest_logit_scale))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)


def classifier(largest_logit_scale: float = 9.0, **overrides: Any) -> SwinTransformerV2:
    """A small classifier, ready to compare."""
    model = SwinTransformerV2(**{**SMALL, **overrides}).eval()
    randomise(model, largest_logit_scale=largest_logit_scale)
    return model


def simmim(largest_logit_scale: float = 9.0, **overrides: Any) -> SimMIM:
    """A small SimMIM model, ready to compare."""
    encoder = SwinTransformerV2(**{**SMALL, "num_classes": 0, **overrides})
    model = SimMIM(encoder, encoder_stride=4 * 2 ** (len(encoder.depths) - 1)).eval()
    randomise(model, largest_logit_scale=largest_logit_scale)
    return model


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Same names, same bits."""
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:5]
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def with_official_buffers(state: Mapping[str, Tensor], window: int = 4) -> dict[str, Tensor]:
    """As the official code saves it: with the tables that follow from the window."""
    full = dict(state)
    for name in state:
        if name.endswith("attn.logit_scale"):
            stem = name.removesuffix("logit_scale")
            full[f"{stem}relative_coords_table"] = torch.zeros(1, 2 * window - 1, 2 * window - 1, 2)
            full[f"{stem}relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.int64)
            if ".blocks.1." in name:
                full[f"{stem.removesuffix('attn.')}attn_mask"] = torch.zeros(4, window**2, window**2)
    return full


def old_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm until 0.8: the official names and places."""
    return dict(state)


def current_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm since 0.9: merging belongs to the stage that follows, and the head is in two parts."""
    named = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
        if parts[0] == "head":
            parts.insert(1, "fc")
        named[".".join(parts)] = tensor
    return named


def mmpretrain(state: Mapping[str, Tensor], num_stages: int = 4) -> dict[str, Tensor]:
    """mmpretrain 1.2: names as in its swin_transformer_v2.py, and the merging's columns as its nn.Unfold gives them."""
    table = {
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
        "attn.": "attn.w_msa.",
        "patch_embed.proj": "patch_embed.projection",
    }
    named = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            named[name.replace("head.", "head.fc.")] = tensor
            continue
        if name.startswith("norm."):
            named[f"backbone.norm{num_stages - 1}.{name[5:]}"] = tensor
            continue
        first, dot, others = name.partition(".blocks.")
        for ours, theirs in table.items():
            first, others = first.replace(ours, theirs), others.replace(ours, theirs)
        name = first + dot + others
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) + 1}.{rest}"
            if name.endswith("reduction.weight"):
                dim = tensor.shape[1] // 4
                order = [(2 * s + r) * dim + c for c in range(dim) for r in range(2) for s in range(2)]
                tensor = tensor[:, order]  # theirs: channel c, row r, column s from outside in
        named["backbone." + name.replace("layers.", "stages.", 1)] = tensor
    return named
