"""scripts/benchmark_memory.py: what it calls a training step trains."""

from __future__ import annotations

import copy

import pytest
import torch

from scripts.benchmark_memory import SMALL, Case, Share, in_own_process
from swinv2_train.models import SwinTransformerV2


def test_the_share_of_one_rank_trains_like_adamw():
    """With all of every parameter on one rank it is torch's AdamW; of two ranks, the first half moves alike."""
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
    inputs = torch.randn(16, 5)
    models = [copy.deepcopy(start) for _ in range(3)]
    plain = torch.optim.AdamW(models[0].parameters(), lr=1e-4)
    shares = [Share(models[1], 1), Share(models[2], 2)]
    for model in models:
        model(inputs).square().mean().backward()
    plain.step()
    for share in shares:
        share.step()
    for first, expected, whole, half in zip(*(m.parameters() for m in (start, *models)), strict=True):
        assert torch.equal(whole, expected) and whole.grad is None
        moved = -(-half.numel() // 2)
        assert torch.equal(half.flatten()[:moved], expected.flatten()[:moved])
        assert torch.equal(half.flatten()[moved:], first.flatten()[moved:])


@pytest.mark.slow
def test_a_case_is_measured_in_a_process_of_its_own_and_a_refusal_is_told():
    official, ours = (Case(name, 128, 8, 1, "blocks") for name in ("official", "ours"))
    result = in_own_process(ours, "cpu", "small")
    parameters = sum(p.numel() for p in SwinTransformerV2(**SMALL, img_size=128, window_size=8).parameters())
    assert result["peak"] > result["states"] > 2 * parameters / 2**30
    refused = in_own_process(Case("official", 128, 12, 1), "cpu", "small")
    assert "square maps that windows tile" in refused["failed"]
    assert "peak" in in_own_process(official, "cpu", "small")
