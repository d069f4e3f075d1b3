"""Linear layers in float32 on a CPU whose vectors torch's own products do not use whole.

Torch multiplies float32 by MKL, which gives processors that are not Intel's a kernel of half their width: with AVX-512
0.4 times, with AVX2 0.8 times the speed of oneDNN's on the same cores (benchmarks/cpu_products_202611.md).  OneDNN has
a door in torch through convolutions: one of 1 x 1 over a map whose channels lie last is the product.

Legend: R rows, I channels in, O channels out.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.kernels.traced import traced

LEAST = 2**22  # multiplications from which on a call's overhead is below a tenth
BATCHES = range(17, 65)  # of rows; from 17 on torch gives a convolution to oneDNN whatever the number of threads


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., I) with weight (O, I) and bias (O,) to (..., O), by whatever is faster on this processor."""
    if not serves(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether such a product goes by oneDNN: large ones in float32, where MKL would be slower."""
    return (
        not traced(x)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST
        and not torch.is_autocast_enabled("cpu")
        and mkl_is_slow()
        and _batch(x.numel() // x.shape[-1]) is not None
    )


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor of another maker, and has oneDNN too."""
    cpu = Path("/proc/cpuinfo")
    other = cpu.exists() and "AuthenticAMD" in cpu.read_text()
    return other and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@functools.cache
def _batch(rows: int) -> int | None:
    return next((batch for batch in BATCHES if rows % batch == 0), None)


def _map(x: Tensor) -> Tensor:
    """(R, C) as (B, C, R / B, 1), channels last in memory."""
    rows, channels = x.shape
    batch = _batch(rows)
    assert batch is not None, "ask serves() first"
    return x.view(batch, rows // batch, 1, channels).permute(0, 3, 1, 2)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(R, I) with (O, I) to (R, O)."""
    out = torch.mkldnn_convolution(_map(x), weight[:, :, None, None], bias, [0, 0], [1, 1], [1, 1], 1)
    return out.permute(0, 2, 3, 1).reshape(len(x), -1)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(R, O) and (R, I) to (O, I).  With AVX2 oneDNN's is slower than MKL's, with AVX-512 it is best with O >= I."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return grad.t() @ x
    if grad.shape[1] < x.shape[1]:
        return weight_gradient(x, grad).t().contiguous()
    weight = x.new_empty(grad.shape[1], x.shape[1], 1, 1)  # its sizes are asked for, not its numbers
    _, found, _ = torch.ops.aten.convolution_backward(
        _map(grad), _map(x), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return found.view(weight.shape[:2])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if of_x else None,
            weight_gradient(grad, x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
