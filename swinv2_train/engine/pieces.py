"""What a rank holds of each tensor in an engine's state, as views into its memory, whatever the engine or ZeRO stage.

| engine | where a trained parameter's float32 master, AdamW's averages and the weight's own average lie |
|---|---|
| local, stage 0 | whole, on every rank |
| stage 1, 2 | each parameter group is one flat tensor, cut into as many equal parts as there are ranks, without regard to where a parameter ends |
| stage 3 | each parameter is cut into as many equal parts as there are ranks, the last ones padded |

Checked with DeepSpeed 0.19.8.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swinv2_train.engine.ema import WeightAverages


class Piece(NamedTuple):
    """A run of a tensor's elements, in the order of its flattened form, that this rank holds."""

    name: str
    start: int
    """Of the first element."""
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


def plain_pieces(module: nn.Module, optimizer: torch.optim.Optimizer, ema: WeightAverages) -> list[Piece]:
    """The parameters where nothing is sharded."""
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    pieces = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            pieces += whole_pieces({name: parameter})
            continue
        state = _state(optimizer, parameter, group_of[id(parameter)])
        averages = {key: state[key] for key in ("exp_avg", "exp_avg_sq")} | ema.beside(parameter)
        flat = {kind: tensor.view(-1) for kind, tensor in averages.items()}
        pieces.append(Piece(name, 0, {"weight": parameter.detach().view(-1), **flat}, state["step"], True))
    return pieces


def zero_1_2_pieces(module: nn.Module, optimizer: Any, ema: WeightAverages) -> Iterator[Piece]:
    """The parameters under ZeRO 1 and 2; optimizer: DeepSpeed's."""
    inner = optimizer.optimizer
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield from whole_pieces({name: parameter})
            continue
        mapping = vars(parameter)["_hp_mapping"]
        if mapping is None:  # it lies in other ranks' parts
            continue
        group = inner.param_groups[mapping.param_group_index]
        (flat,) = group["params"]
        address = mapping.hp_fragment_address
        first = mapping.lp_fragment_address.start
        yield _flat_piece(name, first, flat, address.start, address.numel, inner, group, ema)


def zero_3_pieces(module: nn.Module, optimizer: Any, rank: int, ema: WeightAverages) -> Iterator[Piece]:
    """The parameters under ZeRO-3; optimizer: DeepSpeed's."""
    for name, parameter in module.named_parameters():
        yield from _zero_3_piece(name, parameter, optimizer, rank, ema)


def _zero_3_piece(
    name: str, parameter: nn.Parameter, optimizer: Any, rank: int, ema: WeightAverages
) -> Iterator[Piece]:
    """A parameter's piece, if this rank has more of it than padding."""
    shard, numel = vars(parameter)["ds_tensor"], vars(parameter)["ds_numel"]
    first = rank * shard.ds_numel
    held = min(shard.ds_numel, numel - first)
    if held <= 0:
        return
    if not parameter.requires_grad:
        yield Piece(name, first, {"weight": shard.detach().view(-1)[:held]}, None, False)
        return
    inner = optimizer.optimizer
    sub_group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[sub_group]
    group = inner.param_groups[optimizer.sub_group_to_group_id[sub_group]]
    yield _flat_piece(name, first, flat, start, held, inner, group, ema)


def swapped_pieces(module: nn.Module, optimizer: Any, rank: int, ema: WeightAverages) -> Iterator[Piece]:
    """The parameters under ZeRO-3 whose masters and AdamW's averages are on disk: read, and written back with the
    weights that are made of them, one flat tensor at a time.  A piece may be used until the next one is asked for."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield from _zero_3_piece(name, parameter, optimizer, rank, ema)
    for number, parameters in enumerate(optimizer.fp16_groups):
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        for parameter in parameters:
            yield from _zero_3_piece(names[id(parameter)], parameter, optimizer, rank, ema)
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)


def in_memory(piece: Piece) -> Piece:
    """A copy that stays when the piece is gone."""
    return piece._replace(tensors={kind: tensor.clone() for kind, tensor in piece.tensors.items()})


def _flat_piece(
    name: str,
    first: int,
    flat: Tensor,
    start: int,
    numel: int,
    optimizer: Any,
    group: dict[str, Any],
    ema: WeightAverages,
) -> Piece:
    """Elements first .. first + numel of a parameter, which lie in a flat master from start on."""
    state = _state(optimizer, flat, group)
    tensors = {"weight": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    tensors |= ema.beside(flat)
    assert all(start + numel <= tensor.numel() for tensor in tensors.values()), f"{name} is not in memory"
    return Piece(
        name, first, {key: tensor[start : start + numel] for key, tensor in tensors.items()}, state["step"], False
    )


def _state(optimizer: torch.optim.Optimizer, key: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """AdamW's state of one of its tensors; made as its first step would make it where there is none yet."""
    state = optimizer.state[key]
    if not state:
        state["step"] = torch.zeros((), device=key.device if group["fused"] else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(key), torch.zeros_like(key)
    return state
