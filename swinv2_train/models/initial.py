"""The values that parameters start from, as rules by name: a parameter can be given its values without its module.

The rules are those of the constructors.  So a model too large for one process is built without values, and each process
makes those of its own share (:mod:`swinv2_train.training.initial_values`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.batch_norm import BatchNorm
from swinv2_train.models.detection.layers import Drawn
from swinv2_train.models.initial_rules import Constant, Normal, Rule, Uniform
from swinv2_train.models.lora import A, B, LoraLinear
from swinv2_train.models.swin_v2 import SwinBlock, SwinTransformerV2
from swinv2_train.models.upernet import HeadConv2d

STD = 0.02


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Models that are built in this context have their parameters on the meta device: shapes that take no memory."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leave out what would only change values: on the meta device torch imports its compiler for it, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUES_ONLY and (target := args[0] if args else kwargs["tensor"]).is_meta:
            return target
        return func(*args, **kwargs)


_VALUES_ONLY = frozenset(
    [
        *(getattr(torch.Tensor, name) for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_")),
        *(torch.Tensor.fill_, torch.Tensor.zero_),  # in place so far
        *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),  # which call those unseen
        *(torch.Tensor.mul, torch.log),  # number x tensor, and its logarithm: WindowAttention's logit_scale
    ]
)


def initial_rule(model: nn.Module, name: str) -> Rule:
    """What a parameter of a SwinTransformerV2 or of a model around one starts from; its values are not looked at.

    Linear layers and the mask token: normal, 0.02; biases 0; norms 1 and 0, those of a block's two branches 0 and 0
    (official code); convolutions and adapters' A as torch's (uniform, 1/sqrt(fan in)), their B 0; necks
    and heads as their layers say; logit scales log 10.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    above, _, own_name = path.rpartition(".")
    if isinstance(owner, Drawn):
        return owner.initial if leaf == "weight" else Constant(0.0)
    if isinstance(owner, LoraLinear) and leaf in (A, B):
        return Uniform(1.0 / math.sqrt(owner.in_features)) if leaf == A else Constant(0.0)
    if isinstance(owner, nn.Linear):
        return Normal(STD) if leaf == "weight" else Constant(0.0)
    if isinstance(owner, HeadConv2d):
        return Normal(owner.initial_std) if leaf == "weight" else Constant(0.0)
    if isinstance(owner, nn.Conv2d | nn.Conv3d):
        return Uniform(1.0 / math.sqrt(owner.in_channels * math.prod(owner.kernel_size)))
    if isinstance(owner, nn.LayerNorm):
        branch = isinstance(model.get_submodule(above), SwinBlock) and own_name in ("norm1", "norm2")
        return Constant(1.0 if leaf == "weight" and not branch else 0.0)
    if isinstance(owner, nn.GroupNorm | BatchNorm):
        return Constant(1.0 if leaf == "weight" else 0.0)
    if isinstance(owner, WindowAttention):
        return Constant(float(torch.log(torch.tensor(10.0))) if leaf == "logit_scale" else 0.0)
    assert isinstance(owner, SwinTransformerV2) and leaf == "mask_token", f"{name} has no rule for its initial values"
    return Normal(STD)
