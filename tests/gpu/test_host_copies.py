"""Page-locked memory and the copies of saved tensors on a card.  Skipped without a device."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from swinv2_train.engine.host_copies import HostCopies, page_locked

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_memory_of_any_size_is_page_locked_as_long_as_something_uses_it():
    memory = page_locked(5_000_001)
    view = memory[:10].detach()
    assert memory.is_pinned() and memory.numel() == 5_000_001
    del memory
    assert view.is_pinned()


def test_gradients_are_the_same_bits_while_the_passes_write_over_freed_memory():
    """Deep enough that a copy which came late, or was overwritten, would be seen; three steps use the memory again."""
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU()).cuda() for _ in range(24)]
    leaf = torch.randn(4096, 512, device="cuda", requires_grad=True)
    copies = HostCopies()

    def step(moved):
        x = leaf * 1
        for layer in layers:
            if moved:
                with saved_tensors_hooks(copies.keep, copies.fetch):
                    x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        (grad,) = torch.autograd.grad(x.square().sum(), leaf)
        return grad

    expected = step(False)
    for _ in range(3):
        assert torch.equal(step(True), expected)
    (free,) = copies._free.values()
    assert len(free) == 24 and all(memory.tensor.is_pinned() for memory in free)
