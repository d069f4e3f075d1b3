"""What autograd saves in CPU memory: the same bits, sent ahead of its turn, memory used again, also after an error."""

from __future__ import annotations

import gc
import mmap

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from swinv2_train.engine.deepspeed.startup import lock_what_is_used
from swinv2_train.engine.host_copies import HostCopies, page_locked


class Watched(HostCopies):
    def __init__(self):
        super().__init__()
        self.events: list[str] = []
        self.names: dict[int, int] = {}

    def keep(self, x):
        kept = super().keep(x)
        self.names[id(kept)] = len(self.names)
        self.events.append(f"keep {self.names[id(kept)]}")
        return kept

    def _send(self, kept):
        if kept.back is None:
            self.events.append(f"send {self.names[id(kept)]}")
        super()._send(kept)

    def fetch(self, kept):
        back = super().fetch(kept)
        self.events.append(f"fetched {self.names[id(kept)]}")
        return back


def three_layers(copies):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)]
    leaf = torch.randn(5, 8, requires_grad=True)

    def step(backward=True):
        x = leaf * 1
        for layer in layers:
            if copies is None:
                x = layer(x)
            else:
                with saved_tensors_hooks(copies.keep, copies.fetch):
                    x = checkpoint(layer, x, use_reentrant=False)
        if backward:
            leaf.grad = None
            x.square().sum().backward()
        return x.detach(), leaf.grad

    return step


def test_bits_are_the_same_and_each_is_sent_one_ahead():
    copies = Watched()
    for found, expected in zip(three_layers(copies)(), three_layers(None)(), strict=True):
        assert torch.equal(found, expected)
    assert copies.events == [
        "keep 0", "keep 1", "keep 2", "send 2", "send 1", "fetched 2", "send 0", "fetched 1", "fetched 0",
    ]  # fmt: skip


def test_memory_is_used_again_also_of_a_graph_that_never_went_back():
    copies = HostCopies()
    step = three_layers(copies)
    addresses = set()
    for backward in (True, False, True):
        step(backward)
        gc.collect()
        (free,) = copies._free.values()
        addresses |= {memory.data_ptr() for memory in free}
        assert len(free) == 3 and len(addresses) == 3


def test_a_graph_that_is_kept_can_go_back_twice():
    copies = HostCopies()
    x = torch.randn(4, requires_grad=True)
    with saved_tensors_hooks(copies.keep, copies.fetch):
        out = (x * x).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second) and torch.equal(first, 2 * x.detach())


def test_any_layout_and_type_comes_back_as_it_was():
    copies = HostCopies()
    for x in (
        torch.randn(3, 4).t(),
        torch.zeros(0, 3),
        torch.tensor(5),
        torch.randn(2, 2).bfloat16(),
        torch.ones(3) > 0,
    ):
        back = copies.fetch(copies.keep(x))
        assert torch.equal(back, x) and back.dtype == x.dtype and back.data_ptr() != x.data_ptr() or x.numel() == 0


def test_whole_pages_are_locked_of_the_size_that_was_asked_for(monkeypatch):
    """By what the driver is told; tests/gpu/test_host_copies.py asks a real one."""
    calls = []

    class Driver:
        def cudaHostRegister(self, address, nbytes, flags):
            calls.append(("lock", address, nbytes))
            return code

        def cudaHostUnregister(self, address):
            calls.append(("unlock", address))

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    for code in (0, 2):
        calls.clear()
        memory = page_locked(3 * mmap.PAGESIZE + 1)
        address = memory.data_ptr()
        assert memory.numel() == 3 * mmap.PAGESIZE + 1 and address % mmap.PAGESIZE == 0
        assert calls == [("lock", address, 4 * mmap.PAGESIZE)]
        view = memory[:10].detach()
        del memory
        view.fill_(7)  # memory stays locked as long as somebody looks at it
        assert len(calls) == 1
        del view
        assert calls[1:] == ([("unlock", address)] if code == 0 else [])


def test_deepspeed_page_locks_no_more_than_it_uses(monkeypatch):
    """By what it tells the driver for a buffer of an offloaded partition; torch's own pinning would round up."""
    locked = []

    class Driver:
        def cudaHostRegister(self, address, nbytes, flags):
            locked.append(nbytes)
            return 0

        def cudaHostUnregister(self, address):
            locked.pop()

    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    accelerator = CUDA_Accelerator()
    lock_what_is_used(accelerator)
    tensor = torch.arange(5_000_001.0).view(3, -1)
    copy = accelerator.pin_memory(tensor)
    assert copy.shape == tensor.shape and torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
    fresh = accelerator.pin_memory(tensor.bfloat16(), make_copy=False)
    assert fresh.shape == tensor.shape and fresh.dtype == torch.bfloat16
    assert locked == [-(-n * 5_000_001 // mmap.PAGESIZE) * mmap.PAGESIZE for n in (4, 2)]
    partition = copy.view(-1).data  # as DeepSpeed hands them on
    del copy, fresh
    assert len(locked) == 1 and partition[5_000_000] == 5_000_000
    del partition
    assert locked == []
