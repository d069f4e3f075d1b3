"""What is computed in float32 even where the weights or torch.autocast say bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_INPUTS = 8
"""Below, the gradient of a weight that lies row by row takes MKL six times as long as that of its transpose."""


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast rounds the inputs of a linear layer even when they are float32, so it must be off there."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class Float32Linear(nn.Linear):
    """A Linear that computes in at least float32 whatever its weights' dtype or autocast, and returns that.

    So the position bias is never rounded to bfloat16.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else at_least_float32(self.bias)
        weight = at_least_float32(self.weight)
        with without_autocast(input.device):
            if bias is not None and input.ndim == 2 and self.in_features < FEW_INPUTS and input.device.type == "cpu":
                return torch.addmm(bias, at_least_float32(input), weight.t().contiguous())
            return F.linear(at_least_float32(input), weight, bias)


class Float32LayerNorm(nn.LayerNorm):
    """A LayerNorm whose statistics, sums and arithmetic are in at least float32 whatever the dtype of its input.

    Returns the weights' dtype: bfloat16 for a bfloat16 model, and float32 for a float32 model under autocast, whose
    main branch so stays in float32.  Not only for accuracy: torch's CPU kernel sums the bias gradient of a bfloat16
    norm in bfloat16, and over the 8,192 tokens of a demo batch seven eighths of it are lost (measured with torch 2.13).
    CUDA's kernels read and write bfloat16 and compute in float32 themselves (tests/gpu/test_norm.py), so there a
    bfloat16 input is never copied to float32: 14 bytes an element moved forward and backward instead of 52.
    """

    meta_stands_for = "cuda"
    """The device whose path a tensor on the meta device takes; the planner says "cpu" where it plans for one."""

    def forward(self, input: Tensor) -> Tensor:
        device = self.meta_stands_for if input.is_meta else input.device.type
        if device == "cuda" and input.dtype == self.weight.dtype:
            normed = super().forward(input)
        else:
            weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
            normed = F.layer_norm(input.to(weight.dtype), self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)
