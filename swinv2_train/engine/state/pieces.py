"""What a rank holds of each tensor in an engine's state, as views into its memory, whatever the engine or ZeRO stage.

| engine | where a trained parameter's float32 master, AdamW's moments and the weight's own average lie |
|---|---|
| local, stage 0 | whole, on every rank |
| stage 1, 2 | each parameter group is one flat tensor, cut into as many equal parts as there are ranks, without regard to where a parameter ends |
| stage 3 | each parameter is cut into as many equal parts as there are ranks, the last ones padded |

Checked with DeepSpeed 0.19.8.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swinv2_train.engine.state.ema import WeightEMA


class Piece(NamedTuple):
    """A run of a tensor's elements, in the order of its flattened form, that this rank holds."""

    name: str
    start: int
    """Index of the first element."""
    tensors: dict[str, Tensor]
    """Views of one dimension and one length: "weight"; "exp_avg", "exp_avg_sq" and, with optim.ema_decay, "ema" of what
    is trained."""
    step: Tensor | None
    """AdamW's count of steps, shared by pieces of one flat tensor; None for what is not trained."""
    replicated: bool
    """True when every rank holds the same."""


def whole_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Tensors without optimizer state that every rank holds whole: buffers, parameters that are not trained."""
    return [Piece(name, 0, {"weight": tensor.detach().view(-1)}, None, True) for name, tensor in tensors.items()]


def plain_pieces(module: nn.Module, optimizer: torch.optim.Optimizer, ema: WeightEMA) -> list[Piece]:
    """The parameters where nothing is sharded."""
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    pieces = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            pieces += whole_pieces({name: parameter})
            continue
        state = _state(optimizer, parameter, group_of[id(parameter)])
        kept = {key: state[key] for key in ("exp_avg", "exp_avg_sq")} | ema.state_for(parameter)
        flat = {kind: tensor.view(-1) for kind, tensor in kept.items()}
        pieces.append(Piece(name, 0, {"weight": parameter.detach().view(-1), **flat}, state["step"], True))
    return pieces


def in_memory(piece: Piece) -> Piece:
    """A copy that stays when the piece is gone."""
    return piece._replace(tensors={kind: tensor.clone() for kind, tensor in piece.tensors.items()})


def _state(optimizer: torch.optim.Optimizer, key: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """AdamW's state of one of its tensors; made as its first step would make it where there is none yet."""
    state = optimizer.state[key]
    if not state:
        state["step"] = torch.zeros((), device=key.device if group["fused"] else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(key), torch.zeros_like(key)
    return state
