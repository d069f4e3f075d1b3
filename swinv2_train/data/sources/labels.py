"""What is known of the labels of many images, as arrays.

What a label is depends on the task: one class (LABEL), the classes that apply (LABELS), or numbers (VALUES).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from swinv2_train.data.sample import LABEL, VALUES, Targets


@dataclass(frozen=True, eq=False)
class Labels:
    """Of many images, or rows of a table, what one of the three kinds says of each.  Picklable.

    Several classes are kept as their numbers one image after the other; -1 - c stands for class c that is not known to
    apply or not.
    """

    kind: str
    """LABEL, LABELS or VALUES."""
    values: np.ndarray
    """LABEL: int64 (n,), -1 without one.  LABELS: int32 of all images.  VALUES: float64 (n, K), nan where not known."""
    ends: np.ndarray | None = None
    """LABELS: int64 (n,), where each image's numbers end in values."""
    missing: np.ndarray | None = None
    """LABELS: bool (n,), where nothing is known of an image."""
    classes: tuple[str, ...] | None = None
    """Names of the classes; None where they are known by number alone, and for VALUES."""
    unknown: tuple[int, ...] = ()
    """Classes of which nothing is known in any image."""
    by_columns: bool = False
    """LABELS: each class is a column, so that of others nothing is known."""

    def of(self, rows: np.ndarray) -> Self:
        """Those of these rows, int64 (m,), in this order; -1 = nothing is known."""
        there = rows >= 0
        if self.ends is None:
            values = self.values[np.where(there, rows, 0)]
            values[~there] = -1 if self.kind == LABEL else math.nan
            return replace(self, values=values)
        assert self.missing is not None
        starts = np.concatenate([[0], self.ends[:-1]])[rows]
        lengths = np.where(there, self.ends[rows] - starts, 0)
        ends = np.cumsum(lengths)
        places = np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
        return replace(self, values=self.values[places], ends=ends, missing=~there | self.missing[rows])

    def absent(self) -> np.ndarray:
        """bool (n,), where nothing is known of an image."""
        if self.missing is not None:
            return self.missing
        found: np.ndarray = self.values < 0 if self.kind == LABEL else np.isnan(self.values).all(axis=1)
        return found

    def target(self, place: int) -> Targets:
        """Of one image; empty where nothing is known."""
        if self.ends is None:
            if self.kind == VALUES:
                values = self.values[place]
                return {} if np.isnan(values).all() else {"values": values}
            return {"label": int(self.values[place])} if self.values[place] >= 0 else {}
        assert self.missing is not None
        if self.missing[place]:
            return {}
        numbers = self.values[self.ends[place - 1] if place else 0 : self.ends[place]]
        return {"labels": np.concatenate([numbers, -1 - np.array(self.unknown, np.int32)])}

    def used(self) -> frozenset[int]:
        """The classes that images have."""
        if self.kind == VALUES:
            return frozenset()
        return frozenset(np.unique(self.values[self.values >= 0]).tolist())

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same with numbers[c] for class c, of names `classes`; a number below 0 is of a class that is dropped."""
        place = np.asarray([*numbers, -1], np.int64)
        if self.ends is None:
            return replace(self, values=np.where(self.values >= 0, place[self.values], -1), classes=classes)
        known = self.values >= 0
        found = place[np.where(known, self.values, -1 - self.values)]
        kept = found >= 0
        values = np.where(known, found, -1 - found)[kept].astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(kept)])[self.ends]
        others = set(range(len(classes or ()))) - set(numbers) if self.by_columns else set[int]()
        unknown = {int(place[each]) for each in self.unknown if place[each] >= 0} | others
        return replace(self, values=values, ends=ends, classes=classes, unknown=tuple(sorted(unknown)))

    def digest(self) -> bytes:
        """Distinguishes these from others."""
        found = hashlib.sha256(f"{self.kind} {self.classes} {self.unknown}".encode())
        for part in (self.values, self.ends, self.missing):
            found.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        return found.digest()
