"""Products of bf16 matrices by float32 ones, on processors without bf16 units, where torch's own loops take 10 to 100
times as long.

As bf16 units do, the factors' products are summed in float32 and rounded once.  What starts an interpreter of its own
has torch's loops.
"""

from __future__ import annotations

from typing import Any

import torch

_OPERATIONS = ("mm", "addmm", "bmm", "baddbmm")
_LIBRARY = torch.library.Library("aten", "IMPL")


def by_float32() -> None:
    """From now on, in this process and its forks."""
    for name in _OPERATIONS:
        for overload in ("default", "out"):
            _replace(getattr(getattr(torch.ops.aten, name), overload))


def _replace(operation: Any) -> None:
    torchs = torch.library.get_kernel(operation, "CPU")

    def product(keys: Any, *tensors: Any, out: torch.Tensor | None = None, **scalars: Any) -> Any:
        more = scalars if out is None else {**scalars, "out": out}
        if tensors[-1].dtype != torch.bfloat16 or not torch.backends.mkldnn.enabled:
            return torchs.call_boxed(keys, *tensors, **more)
        found = operation.overloadpacket(*(tensor.float() for tensor in tensors), **scalars)
        return found.bfloat16() if out is None else out.resize_(found.shape).copy_(found)

    _LIBRARY.impl(operation, product, "CPU", with_keyset=True)
