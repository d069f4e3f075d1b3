"""The bytes of a state on disk: those that every version has written, whatever writes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from swinv2_train.engine.state.files import Snapshot
from swinv2_train.storage.safetensors_files import DTYPES


def test_a_rank_s_state_file_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    """The digest was taken of what version 0.1.0 wrote: one of every dtype, an empty tensor, and names to escape."""
    tensors = {f"weight/{name}": torch.arange(5).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"exp_avg/empty": torch.zeros(0), 'ema/näme"': torch.linspace(-1, 1, 7)[2:6]}
    starts, steps = {"F32": 3, 'näme"': 0}, {"F32": 12.0}
    Snapshot(0, {"world_size": 1}, starts, steps, tensors, copying=None).write(tmp_path)
    written = (tmp_path / "rank_0000.safetensors").read_bytes()
    assert hashlib.sha256(written).hexdigest() == "d6e9634a8c60070850af01bc871eb8b53a3e835afd08b0c8603b32a719cda8b0"
