"""Low-rank adapters beside linear layers that are trained no more (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_train.models.fused_layers import copied
from swinv2_train.models.kernels.cpu_products import linear
from swinv2_train.models.swin_v2 import SwinBlock, SwinTransformerV2

A, B = "lora_A", "lora_B"
"""What the names of an adapter's two matrices end in."""
_TASK_PARTS = ("head.", "mask_token")
"""Beginnings of what a task adds inside of an encoder."""


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: y = W x + b + scale B A x (section 4.1), (..., in) -> (..., out).

    A (rank, in) is drawn as torch draws linear layers and B (out, rank) is 0, as in peft, so that at the start y is the
    base's bit for bit.  W and b are the base's own parameters.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = scale
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, input: Tensor, bias: Tensor | None = None, apart: bool = False) -> Any:
        """bias: in place of the layer's own, as models.attention.QkvLinear takes it.  apart: as ApartLinear has it."""
        own = None if apart else self.bias
        out = linear(input, self.weight, own if bias is None else bias)
        out = out + self.scale * linear(linear(input, self.lora_A), self.lora_B)
        return (out, copied(self.bias)) if apart else out


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is one of an adapter's matrices."""
    return name.endswith((f".{A}", f".{B}"))


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, summed in float64: (out, in), in the dtype of weight."""
    return torch.addmm(weight.double(), b.double(), a.double(), alpha=scale).to(weight.dtype)


def add_adapters(encoder: SwinTransformerV2, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Train adapters in an encoder's blocks, and of the encoder itself only what its task adds (head, mask token).

    rank: 1 or more.  Their scale is alpha / rank.  targets: of qkv, proj (attention), fc1 and fc2 (MLP).
    Raises ValueError, with nothing changed, where the rank is larger than a layer's narrower side.
    """
    chosen = [
        (owner, name, getattr(owner, name))
        for block in encoder.modules()
        if isinstance(block, SwinBlock)
        for owner, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2")))
        for name in names
        if name in targets
    ]
    narrowest = min(min(base.in_features, base.out_features) for _, _, base in chosen)
    if rank > narrowest:
        raise ValueError(f"the narrowest layer has {narrowest} channels; set at most {narrowest}")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith(_TASK_PARTS))
    for owner, name, base in chosen:
        setattr(owner, name, LoraLinear(base, rank, alpha / rank))
