"""torch.compile, block by block (regional compilation): blocks of one shape share their graphs."""

from __future__ import annotations

from torch import nn

GRAPHS = 64  # of one function: per stage, shifted or not, with factors of stochastic depth or without, and per map size


def compile_blocks(module: nn.Module, block_types: tuple[type[nn.Module], ...], backend: str = "inductor") -> None:
    """Compile every block of a module, at its first call; each size of map gets graphs of its own.

    Each block's own compile() does it, so parameters, their names and the random numbers drawn stay what they are.
    Under ZeRO-3 the gathering of weights cuts the graphs at every layer; what is between is still compiled.
    """
    import torch._dynamo  # here: it takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in module.modules():
        if isinstance(block, block_types):
            block.compile(dynamic=False, backend=backend)
