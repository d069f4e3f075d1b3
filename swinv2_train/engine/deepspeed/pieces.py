"""Where DeepSpeed keeps each parameter's masters and moments, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from swinv2_train.engine.state.ema import WeightEMA
from swinv2_train.engine.state.pieces import Piece, _state, whole_pieces


def zero_1_2_pieces(module: nn.Module, optimizer: Any, ema: WeightEMA) -> Iterator[Piece]:
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


def zero_3_pieces(module: nn.Module, optimizer: Any, rank: int, ema: WeightEMA) -> Iterator[Piece]:
    """The parameters under ZeRO-3; optimizer: DeepSpeed's."""
    for name, parameter in module.named_parameters():
        yield from _zero_3_piece(name, parameter, optimizer, rank, ema)


def _zero_3_piece(name: str, parameter: nn.Parameter, optimizer: Any, rank: int, ema: WeightEMA) -> Iterator[Piece]:
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


def swapped_pieces(module: nn.Module, optimizer: Any, rank: int, ema: WeightEMA) -> Iterator[Piece]:
    """The parameters under ZeRO-3 whose masters and AdamW's moments are on disk: read, and written back with the
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


def _flat_piece(
    name: str,
    first: int,
    flat: Tensor,
    start: int,
    numel: int,
    optimizer: Any,
    group: dict[str, Any],
    ema: WeightEMA,
) -> Piece:
    """Elements first .. first + numel of a parameter, which lie in a flat master from start on."""
    state = _state(optimizer, flat, group)
    tensors = {"weight": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    tensors |= ema.state_for(flat)
    assert all(start + numel <= tensor.numel() for tensor in tensors.values()), f"{name} is not in memory"
    return Piece(
        name, first, {key: tensor[start : start + numel] for key, tensor in tensors.items()}, state["step"], False
    )
