"""An engine's sharded state on disk as float32 tensors that are read one at a time, whatever number of ranks wrote it.

DeepSpeed 0.19.8 keeps the float32 masters (and each of AdamW's averages in the same way) as flat tensors: one for each
rank and parameter group, in which a parameter lies whole, in part or not at all.

| stage | a rank's masters | where a parameter lies in them |
|---|---|---|
| 1, 2 | the flat group is cut into as many equal parts as there are ranks | written down by each rank |
| 3 | each parameter is cut into as many equal parts as there are ranks, the last ones padded | by counting |

The files are mapped into memory, not read: a tensor's pages come from the disk when it is asked for, belong to the page
cache, and can be dropped at any time.
"""

from __future__ import annotations

import functools
import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.engine.checks import FACTS
from swinv2_train.engine.zero import TAG
from swinv2_train.lazy import LazyTensor, LazyTensors


class Slice(NamedTuple):
    """A run of a parameter's elements, in the order of its flattened tensor, inside one rank's flat tensor."""

    rank: int
    group: int
    start: int
    num_elements: int


def read_weights(directory: Path) -> LazyTensors:
    """The float32 masters and persistent buffers by official name, from what an engine's ``save`` wrote in directory.

    Each access reads one tensor into memory of its own.  No code in the files is run: DeepSpeed's few objects besides
    tensors and plain containers are read as inert ones, and a file that holds any other is refused, so the checkpoint
    may be anybody's.  Raises ConfigError that names the file which is missing, damaged or refused.
    """
    try:
        facts = json.loads((directory / FACTS).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory / FACTS}: cannot be read ({error}); name another checkpoint") from error
    try:
        if facts["engine"] == "local":
            return _whole_tensors(_open(directory / "local.pt")["module"])
        folder, stage = directory / TAG, facts["zero_stage"]
        if stage == 0:
            return _whole_tensors(_open(folder / "mp_rank_00_model_states.pt")["module"])
        prefix = "bf16_" if facts["precision"] == "bf16" else ""
        optimizers = [
            _open(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
            for rank in range(facts["world_size"])
        ]
        return _read_zero_3(folder, optimizers) if stage == 3 else _read_zero_1_2(folder, optimizers)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{directory}: not in DeepSpeed 0.19.8's format ({type(error).__name__}: {error}); name another checkpoint"
        ) from error


def _read_zero_1_2(folder: Path, optimizers: Sequence[Mapping[str, Any]]) -> LazyTensors:
    """The weights are whole in one file, rounded; the masters are cut without regard to where a parameter ends."""
    model = _open(folder / "mp_rank_00_model_states.pt")
    masters = [optimizer["single_partition_of_fp32_groups"] for optimizer in optimizers]
    slices = written_slices([optimizer["param_slice_mappings"] for optimizer in optimizers])
    entries = _whole_tensors(model["module"]).entries
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            entries[name] = _entry(name, shape, _parts(masters, slices.get(name, ())))
    return LazyTensors(entries)


def _read_zero_3(folder: Path, optimizers: Sequence[Mapping[str, Any]]) -> LazyTensors:
    """The weights are nowhere but in the masters; parameters that are not trained are cut up as well."""

    def model_states(rank: int) -> Any:
        return _open(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")

    model = model_states(0)
    masters = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
    slices = counted_slices(model["param_shapes"], len(optimizers))
    entries = _whole_tensors(model["module"]).entries  # of most parameters it holds the name alone
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            entries[name] = _entry(name, shape, _parts(masters, slices[name]))
    if model["frozen_param_shapes"]:
        fragments = [model_states(rank)["frozen_param_fragments"] for rank in range(len(optimizers))]
        for name, shape in model["frozen_param_shapes"].items():
            entries[name] = _entry(name, shape, [of_rank[name] for of_rank in fragments])
    return LazyTensors(entries)


def written_slices(mappings: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[Slice]]:
    """Where each parameter lies, by name, under ZeRO 1 and 2.

    mappings: of each rank, for each group, name -> an address with start and numel.
    """
    slices: dict[str, list[Slice]] = {}
    for rank, groups in enumerate(mappings):
        for group, addresses in enumerate(groups):
            for name, address in addresses.items():
                slices.setdefault(name, []).append(Slice(rank, group, address.start, address.numel))
    return slices


def counted_slices(groups: Sequence[Mapping[str, Sequence[int]]], world_size: int) -> dict[str, list[Slice]]:
    """Where each parameter lies, by name, under ZeRO-3.

    groups: of each group, name -> shape in the order of the flat tensor.
    """
    slices: dict[str, list[Slice]] = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // world_size)
            sizes = [min(part, numel - rank * part) for rank in range(world_size)]  # <= 0 where all is padding
            slices[name] = [Slice(rank, group, start, size) for rank, size in enumerate(sizes) if size > 0]
            start += part
    return slices


# --------------------------------------------------------------------------------------------------------------------


def _parts(flats: Sequence[Sequence[Tensor]], slices: Sequence[Slice]) -> list[Tensor]:
    """The slices as views.  flats: of each rank, the flat tensor of each group."""
    return [flats[rank][group][start : start + numel] for rank, group, start, numel in slices]


def _entry(name: str, shape: Sequence[int], parts: Sequence[Tensor]) -> LazyTensor:
    """A parameter in parts: flat, on the disk, in order; what stands after its last element is padding."""
    numel, found = math.prod(shape), sum(part.numel() for part in parts)
    if found < numel:
        raise IndexError(f"{name} has {numel} elements, the files hold {found}")
    return LazyTensor(tuple(shape), torch.float32, functools.partial(_joined, tuple(shape), parts))


def _joined(shape: tuple[int, ...], parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(parts))[: math.prod(shape)].view(shape).float()


def _whole_tensors(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Tensors that lie whole in a mapped file; floating point becomes float32."""

    def entry(tensor: Tensor) -> LazyTensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        read: Callable[[], Tensor] = functools.partial(tensor.to, dtype, copy=True)
        return LazyTensor(tuple(tensor.shape), dtype, read)

    return LazyTensors({name: entry(tensor) for name, tensor in tensors.items()})


class _Inert:
    """Stands for an object of DeepSpeed's: it takes the attributes that the file gives it and does nothing."""


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""All that is in DeepSpeed's files besides tensors and plain containers."""


def _open(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped from the file."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; name another checkpoint") from None
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "Unsupported" in line), str(error))
        raise ConfigError(f"{path}: refused ({reason.splitlines()[0]}); name another checkpoint") from error
    except Exception as error:  # a damaged pickle raises anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); name another checkpoint") from error
