"""Who looks on while a layer computes: those see operations of torch, and no kernels but as one operation each."""

from __future__ import annotations

import torch
from torch import Tensor


def traced(x: Tensor) -> bool:
    """Whether a compiler, the planner or another mode of torch is to see what becomes of x, operation by operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # of torch.jit
        or x.is_meta
        or type(x) is not Tensor  # a fake one, say
        or torch._C._len_torch_dispatch_stack() > 0
    )
