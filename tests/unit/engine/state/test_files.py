"""The copies that a background save writes: equal to the tensors, apart from them, in memory that is kept."""

from __future__ import annotations

import torch

from swinv2_train.engine.state.files import HostMemory


def tensors() -> dict[str, torch.Tensor]:
    """Neighbours in one flat tensor, in no order, with a gap and an overlap; other storages; every kind of size."""
    flat = torch.randn(1000)
    return {
        "second": flat[10:20],
        "first": flat[:10],
        "third": flat[20:21],
        "first again": flat[:10],
        "behind a gap": flat[31:100],
        "nothing": flat[40:40],
        "whole numbers": torch.arange(5),
        "half": torch.randn(7).bfloat16(),
        "yes and no": torch.tensor([True, False, True]),
        "of another flat tensor": torch.randn(50)[3:30],
    }


def test_copies_equal_the_tensors_and_do_not_follow_them():
    originals = tensors()
    expected = {key: tensor.clone() for key, tensor in originals.items()}
    memory = HostMemory()
    copies, _ = memory.copies_of(originals)
    memory.wait()
    for tensor in originals.values():
        tensor.zero_()
    assert list(copies) == list(expected)
    for key, tensor in expected.items():
        assert copies[key].dtype == tensor.dtype and torch.equal(copies[key], tensor), key


def test_the_memory_is_kept_for_the_next_copies():
    """Fresh memory costs several times what the copying does."""
    memory, originals = HostMemory(), tensors()
    first, again = (memory.copies_of(originals)[0]["second"].untyped_storage().data_ptr() for _ in range(2))
    assert first == again
