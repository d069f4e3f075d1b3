"""One pass over an evaluation loader, in lockstep on all ranks; every sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.distributed import all_gather, all_reduce_max, all_reduce_sum, gather_objects, raise_together
from swinv2_train.monitoring.metrics import Means
from swinv2_train.tasks.metrics import Finish, Mean, Metric, Records, Rows, Sums

Batch = dict[str, Any]


class StoppedError(Exception):
    """A rank is to stop.  Raised on every rank, between the same two pieces of work."""


def never() -> bool:
    """No stop is asked for."""
    return False


def in_lockstep(batches: Iterable[Batch], stop: Callable[[], bool] = never) -> Iterator[Batch]:
    """The batches, of which every rank has equally many; what one rank finds wrong with its data, all raise.

    stop: asked before each batch; StoppedError on all ranks where it is True on any.
    """
    remaining = iter(batches)
    while True:
        found, problem = next_batches(remaining, 1)
        state = all_reduce_max(2 if problem is not None else int(stop()))
        if state == 2:
            raise_together(problem)
        if state == 1:
            raise StoppedError
        if not found:
            return
        yield found[0]


def next_batches(batches: Iterator[Batch], count: int) -> tuple[list[Batch], ConfigError | None]:
    """The next batches (fewer at the end), or what is wrong with this rank's data, for all ranks to hear together."""
    try:
        return list(islice(batches, count)), None
    except ConfigError as error:
        return [], error


Score = Callable[[Batch], Mapping[str, Metric]]
"""From a batch to what a task measures of it (tasks/metrics.py)."""


def evaluate_loader(score: Score, batches: Iterable[Batch], stop: Callable[[], bool] = never) -> dict[str, float]:
    """The scores of one pass of an evaluation loader, over all ranks; every sample counts once.

    Raises StoppedError on every rank where stop says so on any, between two batches.
    """
    means, sums, rows, records = Means(), SumsOverRanks(), RowsOfRanks(), RecordsOfRanks()
    for batch in in_lockstep(batches, stop):
        metrics, weight = score(batch), batch["weight"]
        means.add({name: each for name, each in metrics.items() if isinstance(each, Tensor)}, weight=weight.sum())
        for name, each in metrics.items():
            if isinstance(each, Mean):
                means.add({name: each.value}, weight=each.weight)
        sums.add({name: each for name, each in metrics.items() if isinstance(each, Sums)}, weight)
        rows.add({name: each for name, each in metrics.items() if isinstance(each, Rows)}, weight)
        records.add({name: each for name, each in metrics.items() if isinstance(each, Records)}, weight)
    return means.read() | sums.read() | rows.read() | records.read()


class SumsOverRanks:
    """Adds up whole numbers, exactly in whatever order, without waiting for the device until they are read."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._finish: dict[str, Finish] = {}

    def add(self, sums: Mapping[str, Sums], weight: Tensor) -> None:
        """Sums of a batch; weight: (B,) of its images."""
        for name, each in sums.items():
            assert not each.values.is_floating_point(), f"{name} is {each.values.dtype}; whole numbers add up exactly"
            absent = (weight == 0).to(each.values.device).view(-1, *[1] * (each.values.ndim - 1))
            total = each.values.masked_fill(absent, 0).sum(dim=0, dtype=torch.int64)
            self._totals[name] = self._totals[name] + total if name in self._totals else total
            self._finish[name] = each.finish

    def read(self) -> dict[str, float]:
        """The finished scores, the same on every rank; one collective for each name."""
        scores: dict[str, float] = {}
        for name in sorted(self._totals):
            scores |= self._finish[name](all_reduce_sum(self._totals[name]))
        return scores


class RowsOfRanks:
    """Collects rows of numbers, and sorts them: the result is the same whichever rank saw which image."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}
        self._finish: dict[str, Finish] = {}

    def add(self, rows: Mapping[str, Rows], weight: Tensor) -> None:
        """Rows of a batch; weight: (B,) of its images."""
        for name, each in rows.items():
            counts = (weight > 0).to(each.image.device)[each.image]
            self._rows.setdefault(name, []).append(each.values.detach().double()[counts])
            self._finish[name] = each.finish

    def read(self) -> dict[str, float]:
        """The finished scores, the same on every rank; two collectives for each name."""
        scores: dict[str, float] = {}
        for name in sorted(self._rows):
            everyone = gather_rows(torch.cat(self._rows[name]).cpu())
            order = np.lexsort(everyone.numpy().T[::-1])
            scores |= self._finish[name](everyone[torch.from_numpy(order)])
        return scores


class RecordsOfRanks:
    """Collects the records of images, each once, and sorts them: the same whichever rank saw which image."""

    def __init__(self) -> None:
        self._records: dict[str, list[bytes]] = {}
        self._finish: dict[str, Callable[[Sequence[bytes]], dict[str, float]]] = {}

    def add(self, records: Mapping[str, Records], weight: Tensor) -> None:
        """Records of a batch; weight: (B,) of its images."""
        for name, each in records.items():
            counted = [value for value, there in zip(each.values, (weight > 0).tolist(), strict=True) if there]
            self._records.setdefault(name, []).extend(counted)
            self._finish[name] = each.finish

    def read(self) -> dict[str, float]:
        """The finished scores, the same on every rank; a collective of objects for each name."""
        scores: dict[str, float] = {}
        for name in sorted(self._records):
            everyone = sorted(each for rank in gather_objects(self._records[name]) for each in rank)
            scores |= self._finish[name](everyone)
        return scores


def gather_rows(mine: Tensor) -> Tensor:
    """The rows of all ranks, in the order of ranks, on each.  mine: (n, columns), n of this rank.  Two collectives."""
    lengths = all_gather(torch.tensor(len(mine)))  # (ranks,)
    padded = mine.new_zeros(int(lengths.max()), *mine.shape[1:])
    padded[: len(mine)] = mine
    return torch.cat([rows[:length] for rows, length in zip(all_gather(padded), lengths.tolist(), strict=True)])
