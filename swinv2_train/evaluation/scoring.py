"""One pass over an evaluation loader, in lockstep on all ranks; every sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from swinv2_train.config import ConfigError
from swinv2_train.distributed import any_rank, raise_together
from swinv2_train.monitoring.metrics import Means

Batch = dict[str, Any]


def together(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, of which every rank has equally many; what one rank finds wrong with its data, all raise."""
    remaining = iter(batches)
    while True:
        found, problem = fetch(remaining, 1)
        if any_rank(problem is not None):
            raise_together(problem)
        if not found:
            return
        yield found[0]


def fetch(batches: Iterator[Batch], count: int) -> tuple[list[Batch], ConfigError | None]:
    """The next batches (fewer at the end), or what is wrong with this rank's data, for all ranks to hear together."""
    try:
        return list(islice(batches, count)), None
    except ConfigError as error:
        return [], error


Score = Callable[[dict[str, Any]], dict[str, torch.Tensor]]
"""From a batch to means over it, weighted by batch["weight"]."""


def evaluate(score: Score, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The means of a score over one pass of an evaluation loader, over all ranks; every sample counts once."""
    means = Means()
    for batch in together(batches):
        means.add(score(batch), weight=batch["weight"].sum())
    return means.read()
