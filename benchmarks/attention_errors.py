"""How far the fused attention is from float64: windows x dtypes, forward and every gradient, shifted and padded.

    python -m benchmarks.attention_errors [--windows 8 12 16 24 32] [--dtypes bfloat16 float16 float32]

On CUDA; or on a CPU in Triton's interpreter (TRITON_INTERPRET=1), which knows float32 alone.  Prints one JSON line for
each case: the largest error of output and gradients as shares of their largest entries, the same of the eager path in
that dtype, and whether a second pass gave the same bits.  A case that raises is a line with "failed", and the others go
on.  Exit code 1 where a case fails, is above its bound or has other bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor

from swinv2_train.models.cosine import window_attention
from swinv2_train.models.kernels import dispatch
from swinv2_train.models.windows import WindowGrid, window_grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = 2
NAMES = ("out", "d_qkv", "d_scale", "d_table")
BOUNDS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}


def gradients(attention: Any, tensors: list[Tensor], grad: Tensor, grid: WindowGrid) -> list[Tensor]:
    """The output and the gradients of qkv, scale and table."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attention(*leaves, grid, HEADS)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    shares = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    return {name: float(f"{share:.2e}") for name, share in zip(NAMES, shares, strict=True)}


def compare(window: int, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Four windows, of which two have rows of padding."""
    grid = window_grid((2 * window - window // 4, 2 * window), (window, window), True)
    generator = torch.Generator().manual_seed(window)
    qkv = torch.randn(1, *grid.size, 3 * HEADS * head_dim, generator=generator)
    scale = 10 + 20 * torch.rand(HEADS, 1, 1, generator=generator)
    table = 16 * torch.rand((2 * window - 1) ** 2, HEADS, generator=generator)
    grad = torch.randn(1, *grid.size, HEADS * head_dim, generator=generator)
    qkv, grad = qkv.to(DEVICE, dtype), grad.to(DEVICE, dtype)
    tensors = [qkv, scale.to(DEVICE), table.to(DEVICE)]
    exact = gradients(window_attention, [x.double() for x in tensors], grad.double(), grid)
    first, second = (gradients(dispatch.fused_window_attention, tensors, grad, grid) for _ in range(2))
    return {
        "fused": errors(first, exact),
        "eager": errors(gradients(window_attention, tensors, grad, grid), exact),
        "same_bits": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 12, 16, 24, 32])
    parser.add_argument("--dtypes", nargs="+", choices=list(BOUNDS), default=list(BOUNDS))
    parser.add_argument("--head-dim", type=int, default=32)
    options = parser.parse_args()
    if DEVICE.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            print("attention_errors needs a CUDA device or TRITON_INTERPRET=1", file=sys.stderr)
            return 2
        dispatch._compiled = lambda qkv: False  # not the kernel in C++
    good = True
    for dtype in options.dtypes:
        for window in options.windows:
            line: dict[str, Any] = {"window": window, "dtype": dtype}
            try:
                line |= compare(window, getattr(torch, dtype), options.head_dim)
                worst = max(line["fused"].values(), key=lambda share: math.inf if math.isnan(share) else share)
                line["good"] = line["same_bits"] and worst <= BOUNDS[dtype]
            except Exception as error:  # noqa: BLE001  whatever a compiler or driver raises
                line |= {"failed": f"{type(error).__name__}: {error}"[:500], "good": False}
            print(json.dumps(line), flush=True)
            good &= line["good"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
