"""Linear layers in float32 on a CPU whose vectors torch's own products do not use whole.

Torch multiplies float32 by MKL, which gives AMD's processors a kernel for vectors of 8: half the speed of oneDNN where
they have AVX-512, and nine tenths of it held to AVX2 (benchmarks/cpu_products_202611.md).  OneDNN has two doors in
torch: the linear layer that torch's own compiler calls, and a convolution of 1 x 1 over a map whose channels lie last.

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

LEAST = 2**22  # multiplications, a tenth of a millisecond: below, a call costs more than it gains (not measured finely)
FEW_ROWS = 1024  # a weight's gradient sums over rows; up to so many the linear layer's kernel does that well
BATCHES = range(17, 65)  # from 17 images on torch gives a convolution to oneDNN whatever the number of threads


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
    )


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on an AMD processor, and has oneDNN too."""
    cpu = Path("/proc/cpuinfo")
    amd = cpu.exists() and "AuthenticAMD" in cpu.read_text()
    onednn = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return amd and torch._C.has_mkl and onednn


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(R, I) with (O, I), of any strides, to (R, O); no gradient is known of it."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(R, O) and (R, I) to (O, I).  Of many rows oneDNN's with AVX2 is slower than MKL's, and with AVX-512 it is a
    convolution's, best with O >= I."""
    rows = len(x)
    if rows <= FEW_ROWS:
        return product(grad.t(), x.t())
    batch = _batch(rows)
    if batch is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return grad.t() @ x
    if grad.shape[1] < x.shape[1]:
        return weight_gradient(x, grad).t().contiguous()
    given, back = (each.view(batch, rows // batch, 1, -1).permute(0, 3, 1, 2) for each in (x, grad))
    weight = x.new_empty(grad.shape[1], x.shape[1], 1, 1)  # its sizes are asked for, not its numbers
    _, found, _ = torch.ops.aten.convolution_backward(
        back, given, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return found.view(weight.shape[:2])


@functools.cache
def _batch(rows: int) -> int | None:
    """As how many images a convolution takes them."""
    return next((batch for batch in BATCHES if rows % batch == 0), None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_bias = grad.sum(0) if of_bias else None
        if torch.is_grad_enabled():  # a second derivative is wanted
            return grad @ weight if of_x else None, grad.t() @ x if of_weight else None, grad_bias
        grad = grad.contiguous()
        grad_x = product(grad, weight.t()) if of_x else None
        return grad_x, weight_gradient(grad, x) if of_weight else None, grad_bias
