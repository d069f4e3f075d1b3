"""The heads of a detector on its proposals: one stage (Mask R-CNN), or three that refine boxes (Cascade R-CNN, HTC).

Legend: B images, P proposals, M places of objects, S samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.detection.boxes import clipped, decode, encode, giou
from swinv2_train.models.detection.choose import Rule, Sample, assigned, rows_at, sampled
from swinv2_train.models.detection.heads import BOX_SIDE, MASK_SIDE, BoxHead, MaskHead, of_class
from swinv2_train.models.detection.mask_targets import mask_targets
from swinv2_train.models.detection.objects import Objects
from swinv2_train.models.detection.pool import aligned, pooled
from swinv2_train.models.detection.rpn import Proposals, smooth_l1
from swinv2_train.models.detection.semantic import LEVEL, ROI_SIDE, SemanticHead

POSITIVE_SHARE = 0.25
"""Of the samples that stand for objects, at most."""
BOX_STREAM, MASK_STREAM = 1, 11
"""Of the random choices of the first stage (choose.priorities); the next ones follow."""
GIOU_WEIGHT = 10.0


class Stage(NamedTuple):
    """What is special about a stage."""

    rule: Rule
    stds: tuple[float, float, float, float]
    weight: float
    """Of its losses."""


ONE_STAGE = (Stage(Rule(0.5, 0.5, best=0.5), (0.1, 0.1, 0.2, 0.2), 1.0),)
"""Mask R-CNN (mmdetection's values)."""
CASCADE = tuple(
    Stage(Rule(threshold, threshold, best=None), (0.1 / n, 0.1 / n, 0.2 / n, 0.2 / n), weight)
    for threshold, n, weight in ((0.5, 1, 1.0), (0.6, 2, 0.5), (0.7, 3, 0.25))
)
"""Cascade R-CNN (arXiv:1712.00726)."""


class RoISettings(NamedTuple):
    """What the heads are made of and learn from."""

    stages: Sequence[Stage]
    num_classes: int
    convs: int
    """Convolutions of a box head (BoxHead)."""
    norm: str
    width: int
    class_agnostic: bool
    box_loss: str
    """l1 or smooth_l1 (of deltas), or giou (of boxes, times 10)."""
    masks: bool
    box_samples: int
    mask_samples: int
    interleaved: bool
    """A mask stage sees the boxes that the box stage has refined (HTC); otherwise those that it started from."""
    mask_flow: bool
    """A mask head takes the features of the one before it (HTC)."""
    semantic_classes: int = 0
    """Classes of pixels of the semantic branch, whose features boxes and masks take (HTC); 0 = no branch."""


class Pyramid(NamedTuple):
    """The maps that boxes are read from."""

    maps: Sequence[Tensor]
    """(B, C, h_i, w_i), the largest first."""
    strides: Sequence[int]
    extent: Tensor
    """(B, 2) int64: rows and columns that are of the image."""
    width: int
    """Of the crop in pixels."""
    semantic: Tensor | None = None
    """(B, C, h, w), the features of the semantic branch, of the size of maps[1]."""

    def features(self, boxes: Tensor, side: int) -> Tensor:
        """Of boxes (B, N, 4): (B * N, C, side, side) float32; those of the semantic branch are added to the maps'."""
        found = pooled(self.maps, self.strides, boxes, side)
        if self.semantic is None:
            return found
        image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        more = aligned(self.semantic, boxes.flatten(0, 1), image, 1 / self.strides[LEVEL], ROI_SIDE)
        return found + (more if side == ROI_SIDE else F.adaptive_avg_pool2d(more, side))


class Chosen(NamedTuple):
    """What a stage learns from."""

    boxes: Tensor
    """(B, S, 4), 0 where nothing is taken."""
    sample: Sample
    own: Tensor
    """(B, S) bool: whether it is an object's own box, and no proposal."""
    classes: Tensor
    """(B, S) int64: of the object; K for background."""


class RoIHead(nn.Module):
    """Box heads and mask heads, one of each for each stage, and the semantic branch where there is one.

    levels: maps of the pyramid.
    """

    def __init__(self, channels: int, settings: RoISettings, levels: int) -> None:
        super().__init__()
        self.settings = settings
        classes, count = settings.num_classes, len(settings.stages)
        self.bbox_head = nn.ModuleList(
            BoxHead(channels, classes, settings.convs, settings.norm, settings.width, settings.class_agnostic)
            for _ in range(count)
        )
        heads = range(count if settings.masks else 0)
        self.mask_head = nn.ModuleList(MaskHead(channels, classes, flow=settings.mask_flow and i > 0) for i in heads)
        semantic = settings.semantic_classes
        self.semantic_head = SemanticHead(channels, levels, semantic) if semantic else None

    # ----------------------------------------------------------------------------------------------------------------
    # Training

    def losses(self, pyramid: Pyramid, proposals: Proposals, objects: Objects) -> Tensor:
        """Of each image, of each stage those of class and box, and of mask: (B, n) float32.

        An image's is what the published definition gives for a batch of that image alone: sums over its samples by
        their number, of masks over those that stand for objects by theirs.
        """
        found: list[Tensor] = []
        settings, candidates = self.settings, proposals
        for i, stage in enumerate(settings.stages):
            chosen = self._chosen(candidates, objects, stage.rule, BOX_STREAM + i)
            losses, candidates = self._box_losses(i, pyramid, chosen, objects)
            found += [stage.weight * each for each in losses]
            if settings.masks:
                if settings.interleaved:
                    chosen = self._chosen(candidates, objects, stage.rule, MASK_STREAM + i)
                found.append(stage.weight * self._mask_loss(i, pyramid, chosen, objects))
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def _chosen(self, candidates: Proposals, objects: Objects, rule: Rule, stream: int) -> Chosen:
        """Samples of the candidates and the objects' own boxes."""
        boxes = torch.cat([candidates.boxes, objects.boxes], dim=1)
        usable = torch.cat([candidates.usable, objects.real], dim=1)
        number = self.settings.box_samples
        found = assigned(boxes, objects, rule, usable)
        sample = sampled(found, objects.draw, stream, number, int(number * POSITIVE_SHARE))
        taken = torch.where(sample.taken.unsqueeze(-1), rows_at(boxes, sample.at), 0.0)
        classes = objects.classes.gather(1, sample.place)
        classes = torch.where(sample.positive, classes, self.settings.num_classes)
        return Chosen(taken, sample, sample.at >= candidates.boxes.shape[1], classes)

    def _box_losses(self, i: int, pyramid: Pyramid, chosen: Chosen, objects: Objects) -> tuple[list[Tensor], Proposals]:
        """Of class and box, (B,) each, and the boxes that the stage makes of its samples, for the next one."""
        stage, sample, settings = self.settings.stages[i], chosen.sample, self.settings
        count, number = chosen.classes.shape
        logits, every = self.bbox_head[i](pyramid.features(chosen.boxes, BOX_SIDE))
        entropy = F.cross_entropy(logits, chosen.classes.flatten(), reduction="none").view(count, number)
        deltas = of_class(every, chosen.classes.flatten()).view(count, number, 4)
        wanted = torch.where(sample.positive.unsqueeze(-1), rows_at(objects.boxes, sample.place), chosen.boxes)
        if settings.box_loss == "giou":
            distance = GIOU_WEIGHT * (1 - giou(decode(deltas, chosen.boxes, stage.stds), wanted))
        else:
            beta = 1.0 if settings.box_loss == "smooth_l1" else 0.0
            distance = smooth_l1(deltas, encode(wanted, chosen.boxes, stage.stds), beta).sum(dim=-1)
        taken = sample.taken.sum(dim=1).clamp(min=1)
        losses = [(entropy * sample.taken).sum(dim=1) / taken, (distance * sample.positive).sum(dim=1) / taken]
        with torch.no_grad():
            said = logits[:, :-1].argmax(dim=1)
            classes = torch.where(sample.positive.flatten(), chosen.classes.flatten(), said)
            moved = of_class(every, classes).view(count, number, 4)
            refined = self._refined(moved, chosen.boxes, stage, pyramid)
        return losses, Proposals(refined, sample.taken & ~chosen.own)  # the objects' own boxes come again by themselves

    @staticmethod
    def _refined(deltas: Tensor, boxes: Tensor, stage: Stage, pyramid: Pyramid) -> Tensor:
        return clipped(decode(deltas, boxes, stage.stds), pyramid.extent)

    def _mask_loss(self, i: int, pyramid: Pyramid, chosen: Chosen, objects: Objects) -> Tensor:
        """Binary cross-entropy of the right class's mask, the mean over samples whose object has a mask: (B,)"""
        assert objects.masks is not None, "masks are learnt from masks"
        number = self.settings.mask_samples  # the first ones, for those that stand for objects come first
        sample, boxes, classes = chosen.sample, chosen.boxes[:, :number], chosen.classes[:, :number]
        known = (objects.masks.flatten(2).amax(dim=2) > 0).gather(1, sample.place)
        positive = (sample.positive & known)[:, :number]
        boxes = torch.where(positive.unsqueeze(-1), boxes, 0.0)
        features = pyramid.features(boxes, MASK_SIDE)
        logits = of_class(self._mask_logits(i, features), classes.flatten())  # (B * N, 28, 28)
        with torch.no_grad():
            wanted = mask_targets(objects.masks, pyramid.width, boxes, sample.place[:, :number], 2 * MASK_SIDE)
        entropy = F.binary_cross_entropy_with_logits(logits, wanted.flatten(0, 1), reduction="none")
        each = entropy.mean(dim=(1, 2)).view(positive.shape)
        return (each * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)

    def _mask_logits(self, last: int, features: Tensor) -> Tensor:
        """What a mask head says, (R, K, 28, 28); with mask flow the heads before it have their part in it."""
        before: Tensor | None = None
        for i in range(last + 1) if self.settings.mask_flow else (last,):
            before = self._head(i).features(features, before)
        assert before is not None, "there is a head"
        return self._head(last).logits(before)

    def _head(self, i: int) -> MaskHead:
        head = self.mask_head[i]
        assert isinstance(head, MaskHead)
        return head

    # ----------------------------------------------------------------------------------------------------------------
    # Inference

    def scored(self, pyramid: Pyramid, proposals: Proposals) -> tuple[Tensor, Tensor]:
        """The last stage's boxes (B, P, K or 1, 4), and the probability of each class (B, P, K), 0 for no proposal.

        Each stage refines the boxes of the one before by the deltas of their likeliest class; logits of all stages are
        averaged.
        """
        boxes, total = proposals.boxes, []
        for i, stage in enumerate(self.settings.stages):
            logits, every = self.bbox_head[i](pyramid.features(boxes, BOX_SIDE))
            total.append(logits)
            if i + 1 < len(self.settings.stages):
                deltas = of_class(every, logits[:, :-1].argmax(dim=1)).view_as(boxes)
                boxes = self._refined(deltas, boxes, stage, pyramid)
        every = every.view(*boxes.shape[:2], -1, 4)
        found = clipped(decode(every, boxes.unsqueeze(2), stage.stds), pyramid.extent)
        scores = torch.stack(total).mean(dim=0).softmax(dim=1)[:, :-1].view(*boxes.shape[:2], -1)
        return found, scores * proposals.usable.unsqueeze(-1)

    def masks(self, pyramid: Pyramid, boxes: Tensor, classes: Tensor) -> Tensor:
        """The probability that each of 28 x 28 places of a box is its object's: (B, D, 28, 28) float32.

        boxes (B, D, 4), classes (B, D).  The mean of the stages' probabilities; of their logits with mask flow, as HTC.
        """
        features = pyramid.features(boxes, MASK_SIDE)
        found = [self._mask_logits(i, features) for i in range(len(self.mask_head))]
        chosen = torch.stack([of_class(each, classes.flatten()) for each in found])
        mean = chosen.mean(dim=0).sigmoid() if self.settings.mask_flow else chosen.sigmoid().mean(dim=0)
        return mean.view(*boxes.shape[:2], *mean.shape[1:])
