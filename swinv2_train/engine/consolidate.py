"""An engine's sharded state on disk as one dictionary of float32 tensors, whatever number of ranks wrote it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.engine.checks import FACTS


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The float32 masters by official name, on the CPU, from what an engine's ``save`` wrote under directory.

    Reads pickled files: only for directories that the user's own run wrote.  Raises ConfigError when it cannot.
    """
    try:
        facts = json.loads((directory / FACTS).read_text())
        if facts["engine"] == "local":
            return dict(torch.load(directory / "local.pt", map_location="cpu", weights_only=True)["module"])
        from swinv2_train.engine.zero import TAG

        if facts["zero_stage"] == 0:
            path = directory / TAG / "mp_rank_00_model_states.pt"
            state = torch.load(path, map_location="cpu", weights_only=False)["module"]
            return {name: tensor.float() for name, tensor in state.items()}
        from swinv2_train.engine.startup import import_deepspeed

        with _quiet():
            import_deepspeed()
            if facts["zero_stage"] == 1 and facts["precision"] == "bf16":
                return _merge_bf16_partitions(directory / TAG, facts["world_size"])
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            merged = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=TAG)
        return {name: tensor.float() for name, tensor in merged.items()}
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{directory}: the weights cannot be read ({error}); name another checkpoint") from error


def _merge_bf16_partitions(folder: Path, world_size: int) -> dict[str, Tensor]:
    """What DeepSpeed's own merger cannot read: stage 1 with bf16 weights and fp32 gradients has a format of its own.

    Each rank's file holds its slice of every group's flat float32 masters, and which part of it belongs to which
    parameter.
    """
    weights = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    pieces: dict[str, list[Tensor]] = {}
    for rank in range(world_size):
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        for flat, slices in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True):
            for name, part in slices.items():
                pieces.setdefault(name, []).append(flat[part.start : part.start + part.numel])
    merged = {name: torch.cat(parts).view(weights[name].shape) for name, parts in pieces.items()}
    return {name: merged.get(name, tensor).float() for name, tensor in weights.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's prints, bars and compiler probes, which write to the descriptors themselves, go nowhere inside."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(nowhere)
