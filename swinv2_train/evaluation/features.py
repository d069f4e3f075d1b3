"""One rank's share of labelled images as features of a frozen encoder, and how often scores are right about them.

Features are of whole images (the evaluation's crop, no augmentation), float32, in CPU memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.data.sample import LABEL, Targets
from swinv2_train.distributed import all_reduce_sum
from swinv2_train.evaluation.scoring import in_lockstep
from swinv2_train.tasks.inputs import ImageTransform

Features = Callable[[dict[str, Any]], Tensor]
"""From a batch to (B, C)."""


@dataclass(frozen=True)
class WholeImage(ImageTransform):
    """The evaluation's crop of an image or clip, and its label: {"images": (C, H, W) or (3, T, H, W), "labels": int64
    ()}.
    """

    train: bool = False
    needs: tuple[str, ...] = (LABEL,)

    def __call__(self, image: Tensor | Clip, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        return {**super().__call__(image, targets, rng), "labels": torch.tensor(targets["label"])}


@dataclass(frozen=True)
class Labelled:
    """A rank's share of a set of images, those that count: damaged ones and padding are left out."""

    features: Tensor
    """(n, C) float32, on the CPU."""
    labels: Tensor
    """(n,) int64"""
    positions: Tensor
    """(n,) int64, the number of each among the images of all ranks."""

    def __len__(self) -> int:
        return len(self.labels)


def extract(features: Features, loader: EvalLoader, on_progress: Callable[[], None]) -> Labelled:
    """This rank's share of a loader's images.  What one rank finds wrong with them, every rank raises."""
    room: Tensor | None = None  # for all rows from the start: put together at the end they would be there twice
    filled, position = 0, loader.first_sample
    labels, positions = [], []
    for batch in in_lockstep(loader):
        rows, counts = features(batch).float().cpu(), batch["weight"] > 0
        if room is None:
            room = torch.empty(len(loader) * len(rows), rows.shape[1])
        numbers = torch.arange(position, position + len(rows))
        position += len(rows)
        labels.append(batch["labels"][counts])
        positions.append(numbers[counts])
        room[filled : filled + len(labels[-1])] = rows[counts]
        filled += len(labels[-1])
        on_progress()
    loader.close()
    assert room is not None, "every rank has a batch, if only of padding"
    return Labelled(room[:filled], torch.cat(labels), torch.cat(positions))


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """How many images have their class in the first place and in the first five, (2,) float64.

    scores: (n, classes), -inf for a class that is not in question.  labels: (n,).  Of equal scores the lower class
    comes first.
    """
    right = scores.gather(1, labels.unsqueeze(1))  # (n, 1)
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > right) | ((scores == right) & (classes < labels.unsqueeze(1)))
    place = before.sum(dim=1).masked_fill(right.squeeze(1) == -math.inf, scores.shape[1] + 5)
    return torch.stack([(place < 1).sum(), (place < 5).sum()]).double().cpu()


def percent(right: Tensor, testing: Labelled) -> list[float]:
    """This rank's hits as percent of all ranks' images."""
    *total, images = all_reduce_sum(torch.cat([right, torch.tensor([float(len(testing))])])).tolist()
    return [100 * value / images for value in total]
