"""A weighted vote of the nearest training images (arXiv:1805.01978 section 3.4), exact, over all ranks.

20 neighbours and a temperature of 0.07 are DINO's (arXiv:2104.14294).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.distributed import World, all_gather, all_reduce_max, all_reduce_sum, all_to_all
from swinv2_train.evaluation.features import Labelled, hits, percent

QUERIES = 1024
"""Images of all ranks whose neighbours are looked for together."""
ROWS = 8192
"""Training images that they are compared with at a time."""

QUANTA = 2**24
"""Steps of a similarity of 1: float32's own below 1."""
LABELS = 2**32
"""More than any label."""


def knn(
    training: Labelled,
    testing: Labelled,
    num_classes: int,
    neighbours: int,
    temperature: float,
    world: World,
    on_progress: Callable[[], None],
) -> list[float]:
    """Top-1 and top-5 in percent of votes of the nearest training images by cosine similarity; exact.

    Every rank looks among its own training images for the neighbours of all ranks' queries, a block at a time.  Of
    equally similar images those of lower classes count, and of equal votes the lower class: no rank, block or position
    decides.  A class without a vote is in no top-5.
    """
    neighbours = min(neighbours, int(all_reduce_sum(torch.tensor(len(training)))))
    rows = max(1, QUERIES // world.world_size)  # of each rank
    right = torch.zeros(2, dtype=torch.float64)
    for block in range(all_reduce_max(math.ceil(len(testing) / rows))):
        part = slice(block * rows, (block + 1) * rows)
        labels, own = testing.labels[part], F.normalize(testing.features[part])
        queries = all_gather(F.pad(own, (0, 0, 0, rows - len(own)))).flatten(0, 1)
        nearest = nearest_keys(queries, training, neighbours, world.device)
        candidates = all_to_all(nearest.view(world.world_size, rows, neighbours))  # of own queries, by each rank
        keys = candidates.transpose(0, 1).flatten(1)[: len(labels)].topk(neighbours).values
        right += hits(votes(keys, num_classes, temperature), labels)
        on_progress()
    return percent(right, testing)


def nearest_keys(queries: Tensor, training: Labelled, neighbours: int, device: torch.device) -> Tensor:
    """Keys of the most similar of this rank's images, (queries, neighbours) int64 on the CPU, the highest first.

    queries: (Q, C) of length 1.  A key is a similarity in steps of 1 / QUANTA and, below it, a label from high to low:
    images of the same key are the same to the vote, so it does not matter which of them is taken.
    """
    queries = queries.to(device)
    best = torch.full((len(queries), neighbours), torch.iinfo(torch.int64).min, device=device)
    for start in range(0, len(training), ROWS):
        part = slice(start, start + ROWS)
        bank = F.normalize(training.features[part].to(device))
        similarity = (queries @ bank.T * QUANTA).round().long()
        keys = similarity * LABELS + (LABELS - 1 - training.labels[part].to(device))
        found = keys.topk(min(neighbours, keys.shape[1])).values
        best = torch.cat([best, found], dim=1).topk(neighbours).values
    return best.cpu()


def votes(keys: Tensor, num_classes: int, temperature: float) -> Tensor:
    """What each class has together, (Q, classes) float64; -inf for one that is not among the neighbours.

    keys: (Q, neighbours) as nearest_keys makes them, the highest first; only the ratio of votes means something.
    """
    similarity = torch.div(keys, LABELS, rounding_mode="floor").double() / QUANTA
    labels = LABELS - 1 - keys.remainder(LABELS)
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    absent = torch.full((len(keys), num_classes), -math.inf, dtype=torch.float64)
    return absent.scatter_(1, labels, 0.0).scatter_add_(1, labels, weights)
