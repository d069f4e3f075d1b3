"""What lies between a block's matrix products on a CPU, each in one pass, forward and backward: cpu_passes.cpp.

In float32 alone; where something else is asked for, or there is no compiler, torch's own operations serve.

Legend: B batch, ... the axes of a map, C channels, K channels of a layer's input.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinv2_train.models.kernels import cpu_attention
from swinv2_train.models.kernels.cpu_attention import address
from swinv2_train.models.kernels.traced import traced

CHANNELS = 16  # of which channels are a multiple: whole vectors, whatever the processor's width
CHUNK = 64  # rows of a chunk, at least
CHUNKS = 64  # at most.  Neither depends on the machine, as sums do on them
BLOCK_BYTES = 2**24  # of a product: smaller ones cost the products of wide layers more than the cache saves the GELU


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
        and x.dtype == weight.dtype == torch.float32
        and whole(x.shape[-1])
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and cpu_attention.problem() is None
    )


def whole(channels: int) -> bool:
    """Whether rows of so many channels are whole vectors."""
    return channels % CHANNELS == 0


def add_norm(
    branch: Tensor, plus: Tensor | None, residual: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """residual + factors * LayerNorm(branch + plus): (B, ..., C) float32, where :func:`serves` says so.

    branch, residual: (B, ..., C).  plus: (C,), None = nothing.  factors: (B, 1, ...), of whom no gradient is known,
    None = all are 1.  weight, bias: (C,).
    """
    plus = torch.zeros_like(bias) if plus is None else plus
    out: Tensor = _AddNorm.apply(branch, plus, residual, factors, weight, bias, eps)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias): (..., K) -> (..., C) float32, where :func:`serves` says so.

    weight: (C, K).  bias: (C,).  Beside x and the result it keeps the GELU's slope for the backward pass, (..., C), as
    the plain operations keep its input.
    """
    out: Tensor = _LinearGelu.apply(x, weight, bias, torch.is_grad_enabled())
    return out


def bias_gelu(product: Tensor, bias: Tensor) -> Tensor:
    """gelu(product + bias): (..., C) float32 of what another layer made; bias: (C,)."""
    out: Tensor = _BiasGelu.apply(product, bias)
    return out


def _rows(x: Tensor, of_sample: int = 1, eps: float = 0.0) -> _Rows:
    rows = x.numel() // x.shape[-1]
    return _Rows(rows, x.shape[-1], of_sample, max(1, min(CHUNKS, rows // CHUNK)), eps)


def _call(name: str, rows: _Rows, *tensors: Tensor | None) -> None:
    addresses = [None if x is None else address(x) for x in tensors]
    getattr(cpu_attention.library(), name)(ctypes.byref(rows), *addresses, torch.get_num_threads())


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, plus: Tensor, residual: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        branch, residual = branch.contiguous(), residual.contiguous()
        factors = None if factors is None else factors.contiguous()
        rows = _rows(branch, branch[0].numel() // branch.shape[-1], eps)
        out, means, inverses = torch.empty_like(branch), branch.new_empty(rows.rows), branch.new_empty(rows.rows)
        _call("add_norm_forward", rows, branch, plus, residual, factors, weight, bias, out, means, inverses)
        ctx.save_for_backward(branch, plus, factors, weight, means, inverses)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, plus, factors, weight, means, inverses = ctx.saved_tensors
        grad = grad.contiguous()
        rows = _rows(branch, branch[0].numel() // branch.shape[-1])
        grad_branch, parts = torch.empty_like(branch), branch.new_empty(3, rows.chunks, rows.channels)
        _call("add_norm_backward", rows, grad, branch, plus, factors, weight, means, inverses, grad_branch, *parts)
        grad_weight, grad_bias, grad_plus = (part.sum(0) for part in parts)
        return grad_branch, grad_plus, grad, None, grad_weight, grad_bias, None


class _LinearGelu(torch.autograd.Function):
    """A block of rows at a time, so that each product is still in the cache when the pass reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], len(weight))
        blocks = _blocks(rows, len(weight))
        slope = x.new_empty(len(rows) if keep else blocks[0].stop, len(weight))
        y = out.view(-1, len(weight))
        for block in blocks:
            product = slope[block] if keep else slope[: block.stop - block.start]
            torch.mm(rows[block], weight.t(), out=product)
            _call("bias_gelu_forward", _rows(product), product, bias, y[block])
        if keep:
            ctx.save_for_backward(x, weight, slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, slope = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.contiguous().view(-1, len(weight))
        grad_x = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        blocks = _blocks(rows, len(weight))
        sizes = [_rows(slope[block]) for block in blocks]
        buffer = slope.new_empty(blocks[0].stop, len(weight))
        parts = slope.new_empty(sum(each.chunks for each in sizes), len(weight)).split([each.chunks for each in sizes])
        for block, size, part in zip(blocks, sizes, parts, strict=True):
            product = buffer[: size.rows]  # its gradient
            _call("bias_gelu_backward", size, grad[block], slope[block], product, part)
            if grad_x is not None:
                torch.mm(product, weight, out=grad_x[block])
            if grad_weight is not None:
                torch.addmm(grad_weight, product.t(), rows[block], beta=float(block.start > 0), out=grad_weight)
        grad_bias = torch.cat(parts).sum(0)
        return None if grad_x is None else grad_x.view_as(x), grad_weight, grad_bias, None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor) -> Tensor:
        slope = product.clone(memory_format=torch.contiguous_format)
        out = torch.empty_like(slope)
        _call("bias_gelu_forward", _rows(slope), slope, bias, out)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (slope,) = ctx.saved_tensors
        rows, grad_product = _rows(slope), torch.empty_like(slope)
        parts = slope.new_empty(rows.chunks, rows.channels)
        _call("bias_gelu_backward", rows, grad.contiguous(), slope, grad_product, parts)
        return grad_product, parts.sum(0)


def _blocks(rows: Tensor, channels: int) -> list[slice]:
    """Equal blocks of BLOCK_BYTES at most, of the rows that a layer makes of these; the first is the largest."""
    count = math.ceil(len(rows) * channels * rows.element_size() / BLOCK_BYTES)
    size = math.ceil(len(rows) / count)
    return [slice(begin, min(begin + size, len(rows))) for begin in range(0, len(rows), size)]
