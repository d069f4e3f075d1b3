"""What lies between a block's matrix products on a CPU, each in one pass: cpu_passes.cpp.

In float32 and bfloat16, of which the first is computed; where something else is asked for, or there is no compiler,
torch's own operations serve.

Legend: B batch, ... the axes of a map, C channels.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinv2_train.models.kernels import cpu_attention
from swinv2_train.models.kernels.cpu_attention import address
from swinv2_train.models.kernels.traced import traced

CHANNELS = 16  # of which channels are a multiple: whole vectors, whatever the processor's width
CHUNK = 64  # rows of a chunk, at least
CHUNKS = 64  # at most.  Neither depends on the machine, as sums do on them


class _Rows(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_long), ("channels", ctypes.c_long), ("of_sample", ctypes.c_long), ("chunks", ctypes.c_long),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether a block with such weights may compute by passes: x (B, ..., C) is the map that it is given."""
    return (
        not traced(x)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in cpu_attention.DTYPES
        and x.shape[-1] % CHANNELS == 0
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and cpu_attention.problem() is None
    )


def add_norm(
    branch: Tensor, plus: Tensor | None, residual: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """residual + factors * LayerNorm(branch + plus): (B, ..., C), where :func:`serves` says so; bfloat16 is rounded
    once, at the end.

    branch, residual: (B, ..., C).  plus: (C,), None = nothing.  factors: (B, 1, ...), of whom no gradient is known,
    None = all are 1.  weight, bias: (C,).
    """
    plus, weight, bias = (x.to(branch.dtype) for x in (torch.zeros_like(bias) if plus is None else plus, weight, bias))
    factors = None if factors is None else factors.float()
    out: Tensor = _AddNorm.apply(branch, plus, residual, factors, weight, bias, eps)
    return out


def gelu(x: Tensor, plus: Tensor | None = None) -> Tensor:
    """gelu(x + plus) of x (..., C) in a block where :func:`serves` says so; torch's where C is not whole vectors.

    plus: (C,), the bias of the layer that x comes from; None = nothing.
    """
    plus = x.new_zeros(x.shape[-1]) if plus is None else plus.to(x.dtype)
    out: Tensor = _Gelu.apply(x, plus) if x.shape[-1] % CHANNELS == 0 else F.gelu(x + plus)
    return out


def _rows(x: Tensor, eps: float = 0.0) -> _Rows:
    rows = x.numel() // x.shape[-1]
    return _Rows(rows, x.shape[-1], rows // len(x), max(1, min(CHUNKS, rows // CHUNK)), eps)


def _call(name: str, rows: _Rows, *tensors: Tensor | None) -> None:
    """The first tensor is a map, and says the maps' type."""
    half = tensors[0] is not None and tensors[0].dtype == torch.bfloat16
    function = getattr(cpu_attention.library(), name)
    function(int(half), ctypes.byref(rows), *map(address, tensors), torch.get_num_threads())


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, plus: Tensor, residual: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        branch, residual = branch.contiguous(), residual.contiguous()
        factors = None if factors is None else factors.contiguous()
        rows = _rows(branch, eps)
        out, (means, inverses) = torch.empty_like(branch), branch.new_empty(2, rows.rows, dtype=torch.float32)
        _call("add_norm_forward", rows, branch, plus, residual, factors, weight, bias, out, means, inverses)
        ctx.save_for_backward(branch, plus, factors, weight, means, inverses)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, plus, factors, weight, means, inverses = ctx.saved_tensors
        grad = grad.contiguous()
        rows = _rows(branch)
        grad_branch = torch.empty_like(branch)
        parts = means.new_empty(3, rows.chunks, rows.channels)
        _call("add_norm_backward", rows, grad, branch, plus, factors, weight, means, inverses, grad_branch, *parts)
        grad_weight, grad_bias, grad_plus = parts.sum(1).to(weight.dtype)
        return grad_branch, grad_plus, grad, None, grad_weight, grad_bias, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plus: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _call("gelu_forward", _rows(x), x, plus, y)
        ctx.save_for_backward(x, plus)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, plus = ctx.saved_tensors
        rows, grad_x = _rows(x), torch.empty_like(x)
        parts = x.new_empty(rows.chunks, rows.channels, dtype=torch.float32)
        _call("gelu_backward", rows, grad.contiguous(), x, plus, grad_x, parts)
        return grad_x, parts.sum(0).to(plus.dtype)
