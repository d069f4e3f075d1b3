"""Weights made of the masters outside of a step, under ZeRO-3 on CUDA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swinv2_train.distributed import World
from swinv2_train.engine.deepspeed.engine import ZeroEngine


@pytest.mark.parametrize(("device", "waits"), [("cuda:0", 1), ("cpu", 0)])
def test_the_device_is_waited_for_when_weights_are_made_anew(device, waits, monkeypatch):
    """DeepSpeed gathers them by a stream of its own, which waits for no other: it could gather what was there before.
    What a card makes of it is listed in docs/cluster.md."""
    weights, masters = torch.zeros(4, dtype=torch.bfloat16), torch.arange(4.0)
    seen, order = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append((device, weights.tolist(), list(order))))
    engine = ZeroEngine.__new__(ZeroEngine)
    engine._stage, engine._on_disk, engine._world = 3, False, World(0, 0, 1, 1, torch.device(device))
    optimizer = SimpleNamespace(
        fp16_partitioned_groups_flat=[weights],
        fp32_partitioned_groups_flat=[masters],
        invalidate_secondary_tensor=lambda: order.append("invalidated"),
    )
    engine._ds = SimpleNamespace(optimizer=optimizer)
    engine._renew_weights()
    assert weights.tolist() == masters.tolist() and order == ["invalidated"]
    assert seen == [(torch.device(device), masters.tolist(), ["invalidated"])] * waits
