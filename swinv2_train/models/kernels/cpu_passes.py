"""What lies between a block's matrix products on a CPU, each in one pass: cpu_passes.cpp; and its table of position
biases: cpu_position.cpp.

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
CHUNKS = 64  # at most
OFFSETS = 64  # of a chunk, at least
OFFSET_CHUNKS = 8  # at most.  Nothing of this depends on the machine, as sums do on it


class _Rows(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_long), ("channels", ctypes.c_long), ("of_sample", ctypes.c_long), ("chunks", ctypes.c_long),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


class _Table(ctypes.Structure):
    _fields_ = [
        ("offsets", ctypes.c_long), ("axes", ctypes.c_long), ("hidden", ctypes.c_long), ("heads", ctypes.c_long),
        ("chunks", ctypes.c_long), ("range", ctypes.c_float),
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


def position_table(coordinates: Tensor, first: Tensor, bias: Tensor, second: Tensor, range: float) -> Tensor:
    """range * sigmoid(second @ relu(first @ c + bias)) of every offset c: (offsets, h) float32, in a block where
    :func:`serves` says so.

    coordinates: (offsets, A) float32, of which no gradient is known.  first: (J, A), J whole vectors.  bias: (J,).
    second: (h, J).
    """
    first, bias = first.to(second.dtype), bias.to(second.dtype)
    out: Tensor = _PositionTable.apply(coordinates, first, bias, second, range)
    return out


def _rows(x: Tensor, eps: float = 0.0) -> _Rows:
    rows = x.numel() // x.shape[-1]
    return _Rows(rows, x.shape[-1], rows // len(x), max(1, min(CHUNKS, rows // CHUNK)), eps)


def _call(name: str, dtype: torch.dtype, sizes: ctypes.Structure, *tensors: Tensor | None) -> None:
    """dtype: of maps and parameters."""
    function = getattr(cpu_attention.library(), name)
    half = int(dtype == torch.bfloat16)
    function(half, ctypes.byref(sizes), *map(address, tensors), torch.get_num_threads())


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
        _call(
            "add_norm_forward", branch.dtype, rows, branch, plus, residual, factors, weight, bias, out, means, inverses
        )
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
        tensors = (grad, branch, plus, factors, weight, means, inverses, grad_branch, *parts)
        _call("add_norm_backward", branch.dtype, rows, *tensors)
        grad_weight, grad_bias, grad_plus = parts.sum(1).to(weight.dtype)
        return grad_branch, grad_plus, grad, None, grad_weight, grad_bias, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plus: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _call("gelu_forward", x.dtype, _rows(x), x, plus, y)
        ctx.save_for_backward(x, plus)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, plus = ctx.saved_tensors
        rows, grad_x = _rows(x), torch.empty_like(x)
        parts = x.new_empty(rows.chunks, rows.channels, dtype=torch.float32)
        _call("gelu_backward", x.dtype, rows, grad.contiguous(), x, plus, grad_x, parts)
        return grad_x, parts.sum(0).to(plus.dtype)


class _PositionTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coordinates: Tensor, first: Tensor, bias: Tensor, second: Tensor, range: float) -> Tensor:
        layers = coordinates.contiguous(), first.contiguous(), bias.contiguous(), second.contiguous()
        (offsets, axes), (heads, hidden) = coordinates.shape, second.shape
        chunks = max(1, min(OFFSET_CHUNKS, offsets // OFFSETS))
        ctx.sizes = _Table(offsets, axes, hidden, heads, chunks, range)
        table = coordinates.new_empty(offsets, heads)
        _call("position_table_forward", second.dtype, ctx.sizes, *layers, table)
        ctx.save_for_backward(*layers, table)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, (*layers, table) = ctx.sizes, ctx.saved_tensors
        dtype = layers[-1].dtype
        parts = grad.new_empty(sizes.chunks, sizes.heads + sizes.axes + 1, sizes.hidden)
        _call("position_table_backward", dtype, sizes, *layers, table, grad.contiguous(), parts)
        grads = parts.sum(0).to(dtype)
        return None, grads[sizes.heads : -1].t(), grads[-1], grads[: sizes.heads], None
