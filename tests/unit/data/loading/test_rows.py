"""Rows of a batch: where torch.stack would have put them, and none kept that has its place."""

from __future__ import annotations

import weakref

import pytest
import torch

from swinv2_train.data.loading.rows import BatchRows
from swinv2_train.data.loading.shared_memory import BatchMemory


def row(number: int) -> dict:
    """An image that lies as a decoder leaves it (H, W, C), a flag, and a plain value."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (5, 4, 3), generator=generator, dtype=torch.uint8)
    return {"image": pixels.permute(2, 0, 1), "mask": torch.rand(6, generator=generator) < 0.5, "name": f"n{number}"}


@pytest.mark.parametrize("room", ["there", "none", "of other rows"])
def test_a_batch_is_what_stacking_all_rows_gives(room):
    """Damaged ones, the first too, are those of the stand-in; their weight is 0."""
    rows = [None, row(1), row(2), None, row(4)]
    shapes = {"image": torch.zeros(3, 5, 4 if room == "there" else 5, dtype=torch.uint8), "mask": torch.zeros(6) < 0}
    memory = BatchMemory({**shapes, "weight": torch.tensor(1.0)}, len(rows), 1)
    out = {} if room == "none" else memory.tensors(0)
    made = BatchRows(len(rows), out)
    for each in rows:
        made.add(each)
    assert made.first is rows[1]
    batch = made.batch(made.first)
    filled = [rows[1] if each is None else each for each in rows]
    for name in ("image", "mask"):
        assert torch.equal(batch[name], torch.stack([each[name] for each in filled])) and batch[name].is_contiguous()
    assert batch["name"] == [each["name"] for each in filled]
    assert torch.equal(batch["weight"], torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    assert (batch["weight"] is out.get("weight")) == (room == "there") == (batch["image"] is out.get("image"))


def test_a_row_is_free_as_soon_as_it_has_its_place():
    """The next image is made in its memory; all of a batch at once take pages that fault."""
    made, alive = BatchRows(4, {}), []
    for number in range(4):
        each = row(number)
        alive.append(weakref.ref(each["image"]))
        made.add(each)
        del each
    assert [reference() is not None for reference in alive] == [True, False, False, False]  # a stand-in may be wanted


@pytest.mark.parametrize(
    "other",
    [
        {"image": torch.zeros(1, 5, 4, dtype=torch.uint8)},  # copying would repeat it for every colour
        {"image": torch.zeros(3, 5, 4)},
        {"mask": torch.zeros(1) < 0},
    ],
)
def test_a_row_of_another_shape_or_type_is_no_row(other):
    made = BatchRows(2, {})
    made.add(row(0))
    with pytest.raises(AssertionError, match="differs from row to row"):
        made.add(row(1) | other)


def test_a_batch_that_lacks_rows_is_none():
    made = BatchRows(3, {})
    made.add(row(0))
    with pytest.raises(AssertionError, match="1 rows of a batch of 3"):
        made.batch(row(0))
