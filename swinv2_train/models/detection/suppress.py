"""Of boxes that overlap, the best."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swinv2_train.models.detection.boxes import iou

LEAST_SOFT_SCORE = 1e-3
"""A score that soft-NMS has brought below this counts no more (mmcv's default)."""


def kept_by_nms(boxes: Tensor, scores: Tensor, usable: Tensor, threshold: float) -> Tensor:
    """Whether each box is left when every better one removes those that overlap it by more: (B, N) bool.

    boxes (B, N, 4), scores (B, N) float32, best first; boxes that are not usable remove nothing and are not kept.
    """
    if boxes.is_meta:  # how many are left is not known beforehand, and every box has its place all the same
        return torch.empty_like(usable)
    from torchvision.ops import nms  # here, because it imports torch's compiler

    kept = torch.zeros_like(usable)
    nowhere = torch.where(usable.unsqueeze(-1), boxes, 0.0)
    for b in range(len(boxes)):  # apart, so that nothing depends on the other images of a batch
        kept[b, nms(nowhere[b], scores[b].masked_fill(~usable[b], -torch.inf), threshold)] = True
    return kept & usable


class Detections(NamedTuple):
    """The best D detections of each image, the best first; places without one have score 0 and class -1."""

    boxes: Tensor
    """(B, D, 4) float32."""
    scores: Tensor
    """(B, D) float32."""
    classes: Tensor
    """(B, D) int64."""
    finite: Tensor
    """(B,) bool: whether all scores of the image are numbers; one that is none is no detection."""


class Suppression(NamedTuple):
    """How overlapping detections of one class are thinned out."""

    number: int
    """Detections that an image has."""
    least_score: float
    """Those with a score of at most this are none."""
    threshold: float
    """IoU from which on a better detection lowers another one's score."""
    soft: str
    """none (to 0: plain NMS), linear (times 1 - IoU) or gaussian (times exp(-IoU^2 / 0.5), at any IoU)."""

    def factor(self, overlaps: Tensor) -> Tensor:
        """What a score is multiplied by (arXiv:1704.04503, equations 1 and 3)."""
        if self.soft == "gaussian":
            return torch.exp(-(overlaps**2) / 0.5)
        beyond = overlaps > self.threshold
        return torch.where(beyond, 1 - overlaps, 1.0) if self.soft == "linear" else (~beyond).to(overlaps.dtype)

    def __call__(self, boxes: Tensor, scores: Tensor) -> Detections:
        """Takes the best box of all classes `number` times and lowers, each time, the scores of its class's others.

        boxes (B, N, K, 4), or (B, N, 1, 4) for boxes of any class; scores (B, N, K).  That is NMS of each class and
        then the best of all; of equal scores the first comes first.
        """
        least = self.least_score if self.soft == "none" else max(self.least_score, LEAST_SOFT_SCORE)
        batch, _, classes = scores.shape
        left = torch.where(scores > self.least_score, scores, 0.0)
        rows = torch.arange(batch, device=scores.device)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.number):
            best, at = left.flatten(1).max(dim=1)
            row, kind = at // classes, at % classes
            of_class = boxes[rows, :, kind if boxes.shape[2] > 1 else 0]  # (B, N, 4)
            box = of_class.gather(1, row.view(-1, 1, 1).expand(-1, 1, 4))
            there = best > (0 if self.soft == "none" else least)
            found.append((box[:, 0], torch.where(there, best, 0.0), torch.where(there, kind, -1)))
            lowered = left[rows, :, kind] * self.factor(iou(box, of_class))  # (B, N)
            lowered = lowered.scatter(1, row.unsqueeze(1), 0.0)
            left[rows, :, kind] = lowered
        chosen, values, kinds = (torch.stack(each, dim=1) for each in zip(*found, strict=True))
        finite = scores.isfinite().flatten(1).all(dim=1)
        return Detections(torch.where((kinds >= 0).unsqueeze(-1), chosen, 0.0), values, kinds, finite)
