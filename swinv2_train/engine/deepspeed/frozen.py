"""ZeRO-3 blocks of which something is trained, behind parts of the model of which nothing is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def follow_inputs(module: nn.Module, block_types: tuple[type[nn.Module], ...]) -> None:
    """Give the input of every block that is trained a gradient, also where nothing before the block has one.

    Trap 12: DeepSpeed 0.19.8 takes the gradients of a leaf module from its full backward hook, and torch calls that
    hook before the module's own backward pass where no input has a gradient.  DeepSpeed would take zeros for what is
    yet to come, and let go of the weights that the backward pass needs.  To be called before deepspeed.initialize,
    whose own hooks look at the inputs too.
    """
    for block in module.modules():
        if isinstance(block, block_types) and any(parameter.requires_grad for parameter in block.parameters()):
            block.register_forward_pre_hook(_followed)


def _followed(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The inputs with the first one's gradient asked for, where none would have one."""
    first, *rest = inputs
    if not torch.is_grad_enabled() or any(torch.is_tensor(each) and each.requires_grad for each in inputs):
        return None
    return (first.detach().requires_grad_(), *rest)
