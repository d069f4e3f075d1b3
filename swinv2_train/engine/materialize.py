"""Memory for a module that was built without values: whole parameters, or this rank's partitions of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swinv2_train.engine.state.pieces import Piece


class Initializer(Protocol):
    """Where the initial values of parameters come from (training/initial_values.py)."""

    def fill(self, target: Tensor, name: str, start: int) -> None:
        """Put the elements from start on of a parameter into target, which has one dimension, any dtype and device."""
        ...


def fill_weights(pieces: Iterable[Piece], values: Initializer) -> None:
    """Write the initial values of these parts of parameters."""
    for piece in pieces:
        values.fill(piece.tensors["weight"], piece.name, piece.start)


def is_meta(module: nn.Module) -> bool:
    """True for a module on the meta device.  Its buffers, of which SwinV2 has none, would have no values at all."""
    without = [parameter.is_meta for parameter in module.parameters()]
    assert all(without) or not any(without), "parts of the module are on the meta device"
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer on the meta device"
    return any(without)


def allocate(module: nn.Module) -> None:
    """Give a module without values whole float32 parameters in CPU memory, not yet written to."""
    for parameter in module.parameters():
        _allocate(parameter, torch.float32, torch.device("cpu"))


def allocate_partitions(module: nn.Module, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Give a module without values the ZeRO-3 parameters that deepspeed.initialize(config=settings) expects.

    One parameter at a time is whole for a moment, and not written to.  deepspeed.zero.Init would draw its values, in
    dtype, and send them to all ranks; here nothing is sent.  Only the steps of its conversion are used (0.19.8).
    """
    import deepspeed

    init = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)
    for parameter in module.parameters():
        _allocate(parameter, dtype, device)
        init._convert_to_deepspeed_param(parameter)
        vars(parameter)["partition"]()


def _allocate(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> None:
    """In place, so that parameter groups go on to hold it."""
    empty = torch.empty(parameter.shape, dtype=dtype, device=device)
    swap_tensors: Any = torch.utils.swap_tensors  # which torch has not typed
    swap_tensors(parameter, nn.Parameter(empty, parameter.requires_grad))
