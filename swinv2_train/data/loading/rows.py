"""The rows of one micro-batch, each copied to its place as soon as it is made.

Its pixels are in the processor's caches then, and the next image is made in the same memory.  Rows that wait for the
last one take memory of their own each, which the system hands out, and clears, anew for every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swinv2_train.data.loading.shared_memory import Batch, fits

Row = dict[str, Any]
"""A sample by name: tensors, all of fixed shape, and plain values, which stay in the host's memory."""


def tensors_of(row: Row) -> dict[str, Tensor]:
    """What of a row is stacked."""
    return {name: value for name, value in row.items() if isinstance(value, Tensor)}


class BatchRows:
    """A batch of `size` rows under way: add() each, then batch().

    out: name -> (size, ...) and "weight", where the batch is to be put; where its rows are others, it is put anywhere.
    """

    def __init__(self, size: int, out: Mapping[str, Tensor]) -> None:
        self.first: Row | None = None
        """The first row that there was."""
        self._size, self._out = size, out
        self._weights: list[float] = []
        self._fits = False
        self._tensors: dict[str, Tensor] = {}
        self._plain: dict[str, list[Any]] = {}

    def add(self, row: Row | None) -> None:
        """The next row; None = a stand-in of weight 0 comes there."""
        if row is not None:
            self._put(len(self._weights), row)
        self._weights.append(float(row is not None))

    def batch(self, stand_in: Row) -> Batch:
        """The rows' tensors as (size, ...), their plain values as lists, and "weight" float32 (size,)."""
        assert len(self._weights) == self._size, f"{len(self._weights)} rows of a batch of {self._size}"
        for number, weight in enumerate(self._weights):
            if not weight:
                self._put(number, stand_in)
        weights = torch.tensor(self._weights)
        if self._fits:
            weights = self._out["weight"].copy_(weights)
        return {**self._tensors, **self._plain, "weight": weights}

    def _put(self, number: int, row: Row) -> None:
        if self.first is None:
            self._begin(row)
        for name, values in self._plain.items():
            values[number] = row[name]
        for name, rows in self._tensors.items():
            value, place = row[name], rows[number]
            assert value.shape == place.shape and value.dtype == place.dtype, f"'{name}' differs from row to row"
            place.copy_(value)

    def _begin(self, row: Row) -> None:
        self.first, tensors = row, tensors_of(row)
        self._plain = {name: [None] * self._size for name in row if name not in tensors}
        self._fits = fits(self._out, {**tensors, "weight": torch.tensor(1.0)}, self._size)
        self._tensors = {
            name: self._out[name] if self._fits else value.new_empty((self._size, *value.shape))
            for name, value in tensors.items()
        }
