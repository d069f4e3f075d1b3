"""Activation checkpointing as a policy that is applied to a finished module from outside.

The block's forward is replaced on the instance, so parameter names, state dicts and isinstance checks stay as they
are.  Both policies replay the random state, so drop path draws the same numbers when a block is computed again.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn

from swinv2_train.config import ConfigError

POLICIES = ("none", "blocks", "offload")


def apply_recompute(module: nn.Module, policy: str, block_types: tuple[type[nn.Module], ...] | None = None) -> int:
    """Recompute each transformer block in the backward pass instead of keeping its activations.

    policy: "none"; "blocks" keeps only each block's input (torch checkpoint, non-reentrant); "offload" keeps that input
    in CPU memory (fairscale checkpoint_wrapper; not under torch.autocast, which it replays in the wrong dtype).
    block_types: the classes to wrap; None = SwinBlock.  Returns the number of wrapped blocks; raises ConfigError for an
    unknown policy and for a module without such blocks.
    """
    if policy not in POLICIES:
        raise ConfigError(f"model.recompute '{policy}' is unknown; choose {', '.join(POLICIES)}")
    if policy == "none":
        return 0
    if block_types is None:
        from swinv2_train.models.swin_v2 import SwinBlock

        block_types = (SwinBlock,)
    blocks = [child for child in module.modules() if isinstance(child, block_types)]
    if not blocks:
        names = ", ".join(block_type.__name__ for block_type in block_types)
        raise ConfigError(
            f"model.recompute ({policy}): the model has no {names} to recompute; set model.recompute=none"
        )
    for block in blocks:
        assert "forward" not in vars(block), "this block is recomputed already"
        if policy == "blocks":
            # Through a weak reference: a module that holds itself in a cycle is freed late, and its memory with it.
            vars(block)["forward"] = functools.partial(_checkpointed, type(block).forward, weakref.ref(block))
        else:
            from fairscale.nn.checkpoint import checkpoint_wrapper

            checkpoint_wrapper(block, offload_to_cpu=True)
    return len(blocks)


def _checkpointed(forward: Any, block: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(block(), *args, **kwargs)
    return checkpoint(functools.partial(forward, block()), *args, use_reentrant=False, **kwargs)
