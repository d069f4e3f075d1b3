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
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            merged = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=TAG)
        return {name: tensor.float() for name, tensor in merged.items()}
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{directory}: the weights cannot be read ({error}); name another checkpoint") from error


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
