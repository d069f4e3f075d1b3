"""The right objects of an image, what a detector says of it, and of several views of it made one: NMS and soft-NMS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from swinv2_train.data.mask_codes import Rle


class Truth(TypedDict):
    """The objects of an image that is evaluated, in its own pixels."""

    boxes: np.ndarray
    """float32 (N, 4): x0, y0, x1, y1."""
    classes: np.ndarray
    """int64 (N,)"""
    crowd: np.ndarray
    """bool (N,)"""
    area: np.ndarray
    """float64 (N,): pixels of the object."""
    masks: list[Rle | None]
    """None for an object that is known by its box alone."""


class Detections(NamedTuple):
    """Of one image, in its own pixels."""

    boxes: Tensor
    """float32 (D, 4): x0, y0, x1, y1."""
    scores: Tensor
    """float32 (D,)"""
    classes: Tensor
    """int64 (D,)"""
    masks: list[Rle] | None
    """Run lengths of the image's size; None where masks are not asked for."""

    def chosen(self, places: Tensor, scores: Tensor) -> Detections:
        """Those at `places` (n,), with these scores."""
        masks = None if self.masks is None else [self.masks[place] for place in places.tolist()]
        return Detections(self.boxes[places], scores, self.classes[places], masks)


def merged(
    views: Sequence[Detections], method: str, iou: float, most: int, sigma: float = 0.5, least_score: float = 1e-3
) -> Detections:
    """What is left of the detections of all views of one image, the most certain first, at most `most`.

    method: nms, soft_nms_linear or soft_nms_gaussian.  iou: the overlap with a more certain one of the same class from
    which a detection is dropped, or, by linear soft-NMS, counts less.  sigma: of gaussian soft-NMS.  least_score: what
    soft-NMS leaves with less is dropped.  Equal scores go by their place.
    """
    together = Detections(
        torch.cat([each.boxes for each in views]).float(),
        torch.cat([each.scores for each in views]).float(),
        torch.cat([each.classes for each in views]),
        None if any(each.masks is None for each in views) else [mask for each in views for mask in each.masks or ()],
    )
    places, scores = suppressed(together, method, iou, most, sigma, least_score)
    return together.chosen(places, scores)


def suppressed(
    found: Detections, method: str, iou: float, most: int, sigma: float, least_score: float
) -> tuple[Tensor, Tensor]:
    """The places (n,) of the detections that are left and their scores (n,); arguments as merged's.

    One at a time is taken, the most certain of what is left, and what overlaps it counts less from then on; scores only
    fall, so the first `most` that are taken are the best ones.  Source: soft-NMS, arXiv:1704.04503, equations 2 and 3.
    """
    scores, boxes = found.scores.clone(), found.boxes
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = torch.ones_like(scores, dtype=torch.bool)
    least = least_score if method != "nms" else -torch.inf
    places, kept = [], []
    for _ in range(min(most, len(scores))):
        best = scores.masked_fill(~left, -torch.inf).argmax()
        if not left[best] or scores[best] < least:
            break
        places.append(best)
        kept.append(scores[best].clone())
        left[best] = False
        overlap = _overlap(boxes[best], area[best], boxes, area)
        mine = left & (found.classes == found.classes[best])
        if method == "nms":
            left &= ~(mine & (overlap > iou))
        elif method == "soft_nms_linear":
            scores = torch.where(mine & (overlap > iou), scores * (1 - overlap), scores)
        else:
            scores = torch.where(mine, scores * torch.exp(-(overlap**2) / sigma), scores)
    if not places:
        return torch.zeros(0, dtype=torch.int64, device=scores.device), scores[:0]
    return torch.stack(places), torch.stack(kept)


def _overlap(box: Tensor, box_area: Tensor, boxes: Tensor, area: Tensor) -> Tensor:
    """(N,): the share of the union of `box` (4,) and each of boxes (N, 4) that both have."""
    sides = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])
    shared = sides.clamp(min=0).prod(dim=1)
    return shared / (box_area + area - shared).clamp(min=1e-12)
