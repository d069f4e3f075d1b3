"""Activation checkpointing as a policy that is applied to a finished module from outside.

The forward of a block, or of its attention, is replaced on the instance, so parameter names, state dicts and isinstance
checks stay as they are.  Every policy replays the random state, so drop path draws the same numbers again.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_train.config import ConfigError, Recompute, parse_recompute
from swinv2_train.engine.host_copies import HostCopies

Forward = Callable[..., Any]


def apply_recompute(module: nn.Module, policy: str, block_types: tuple[type[nn.Module], ...]) -> int:
    """Compute parts of the model again in the backward pass instead of keeping their activations.

    policy: as model.recompute (docs/model.md).  What is recomputed keeps its input only: as it is, in CPU memory
    (torch or fairscale), or cut into as many parts as there are model-parallel ranks (DeepSpeed).
    block_types: the classes of the module's blocks.  Returns the number of wrapped modules; raises ConfigError for an
    unknown policy and for one that finds nothing in this model.
    """
    blocks = [(name, child) for name, child in module.named_modules() if isinstance(child, block_types)]
    recompute = parse_recompute(policy, max((_stage(name) for name, _ in blocks), default=1))
    if recompute.part is None:
        return 0
    targets = _targets(recompute, blocks)
    if not targets:
        names = ", ".join(block_type.__name__ for block_type in block_types)
        raise ConfigError(
            f"model.recompute ({policy}): the model's blocks ({len(blocks)} {names}) leave nothing to recompute; "
            "set model.recompute=none"
        )
    again = functools.partial(_cpu, HostCopies()) if recompute.place == "cpu" else _PLACES.get(recompute.place, _stay)
    for target in targets:
        assert "forward" not in vars(target), "this module is recomputed already"
        if recompute.place == "fairscale":
            from fairscale.nn.checkpoint import checkpoint_wrapper

            checkpoint_wrapper(target, offload_to_cpu=True)
        else:
            # Through a weak reference: a module that holds itself in a cycle is freed late, and its memory with it.
            vars(target)["forward"] = functools.partial(_recomputed, again, type(target).forward, weakref.ref(target))
    return len(targets)


def _stage(name: str) -> int:
    """The stage, from 1, that a block of this name is in; a model without stages is one."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.blocks\.\d+$", name)
    return int(match[1]) + 1 if match else 1


def _targets(recompute: Recompute, blocks: list[tuple[str, nn.Module]]) -> list[nn.Module]:
    if recompute.part == "attention":
        attentions = [getattr(block, "attn", None) for _, block in blocks]
        return [attention for attention in attentions if isinstance(attention, nn.Module)]
    first, last = recompute.stages or (1, len(blocks))
    return [
        block
        for number, (name, block) in enumerate(blocks, 1)
        if first <= _stage(name) <= last and (recompute.keep_every is None or number % recompute.keep_every)
    ]


def _recomputed(
    again: Callable[..., Any], forward: Forward, target: weakref.ref[nn.Module], x: Tensor, *rest: Any
) -> Any:
    run = functools.partial(forward, target())
    return again(run, x, *rest) if torch.is_grad_enabled() else run(x, *rest)


def _stay(run: Forward, x: Tensor, *rest: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(run, x, *rest, use_reentrant=False)


def _cpu(copies: HostCopies, run: Forward, x: Tensor, *rest: Any) -> Any:
    with _saved_on_cpu(copies, x):  # of all that is saved, the checkpoint leaves its input alone to these hooks
        return _stay(run, x, *rest)


def _saved_on_cpu(copies: HostCopies, x: Tensor) -> AbstractContextManager[Any]:
    if x.is_meta:  # a shape moves nowhere, but it must not count as kept on the device either
        return torch.autograd.graph.saved_tensors_hooks(
            lambda saved: (saved.shape, saved.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1], device="meta")
        )
    return torch.autograd.graph.saved_tensors_hooks(copies.keep, copies.fetch)


def _partitioned(run: Forward, x: Tensor, *rest: Any) -> Any:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    if not checkpointing.is_configured():
        checkpointing.configure(None, partition_activations=True)
    if not x.requires_grad:  # or DeepSpeed would compute no gradient at all, of no weight either
        x = x.detach().requires_grad_()
    # An alias, because DeepSpeed empties the tensor that it is given, and others still read it (a block's residual).
    return checkpointing.checkpoint(lambda alias: run(alias, *rest), x.view_as(x))


_PLACES: dict[str, Callable[..., Any]] = {"stay": _stay, "partitioned": _partitioned}


def recompute_warning(policy: str) -> str | None:
    """What the user should know of a policy that works but does not do what its name promises here."""
    if not policy.endswith("@partitioned"):
        return None
    return (
        f"model.recompute ({policy}) frees nothing here: DeepSpeed cuts saved inputs over model-parallel ranks, and "
        "under data parallelism every rank's inputs are its own; use @stay, or @cpu to move them out"
    )
