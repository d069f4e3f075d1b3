"""torch.compile, block by block (regional compilation): blocks of one shape share their graphs."""

from __future__ import annotations

import torch
from torch import nn

from swinv2_train.models.kernels.dispatch import fused_problem
from swinv2_train.models.swin_v2 import SwinBlock

GRAPHS = 64  # of one function: per stage, shifted or not, with factors of stochastic depth or without, and per map size


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Compile every SwinBlock of a module, at its first call; each size of map gets graphs of its own.

    Parameters, their names and the random numbers drawn stay what they are: stochastic depth is drawn outside.
    Under ZeRO-3 the gathering of weights cuts the graphs at every layer; what is between is still compiled.
    """
    torch.compiler.assume_constant_result(fused_problem)  # type: ignore[no-untyped-call]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in module.modules():
        if isinstance(block, SwinBlock):
            block.branches = torch.compile(block.branches, dynamic=False, backend=backend)  # type: ignore[method-assign]
