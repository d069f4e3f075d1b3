"""Region proposal network (arXiv:1506.01497): which of many anchors hold an object, and where it really is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.detection.anchors import RATIOS, anchors
from swinv2_train.models.detection.boxes import clipped, decode, encode
from swinv2_train.models.detection.choose import Rule, assigned, rows_at, sampled, top
from swinv2_train.models.detection.layers import Conv
from swinv2_train.models.detection.objects import Objects
from swinv2_train.models.detection.suppress import kept_by_nms
from swinv2_train.models.initial_rules import Normal

STDS = (1.0, 1.0, 1.0, 1.0)
RULE = Rule(positive=0.7, negative=0.3, best=0.3)
SAMPLES = 256
"""Anchors of an image that are learnt from, at most half of which stand for objects."""
NMS_IOU = 0.7
STREAM = 0
"""Of the random choice (choose.priorities)."""


class Proposals(NamedTuple):
    """P boxes of each image that may hold an object."""

    boxes: Tensor
    """(B, P, 4) float32."""
    usable: Tensor
    """(B, P) bool: False for a place without a box."""


class RPNHead(nn.Module):
    """The same convolutions on every map: (B, C, h, w) -> logits (B, h * w * 3), deltas (B, h * w * 3, 4), float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        rule = Normal(0.01)
        self.rpn_conv = Conv(channels, channels, 3, rule)
        self.rpn_cls = Conv(channels, len(RATIOS), 1, rule)
        self.rpn_reg = Conv(channels, 4 * len(RATIOS), 1, rule)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.rpn_conv(features))
        logits, deltas = self.rpn_cls(x).permute(0, 2, 3, 1), self.rpn_reg(x).permute(0, 2, 3, 1)
        return logits.flatten(1).float(), deltas.reshape(len(x), -1, 4).float()


class RPNOutputs(NamedTuple):
    """What the network says of all anchors, a tensor for each map."""

    anchors: list[Tensor]
    """(A_i, 4)"""
    logits: list[Tensor]
    """(B, A_i)"""
    deltas: list[Tensor]
    """(B, A_i, 4)"""


def rpn_outputs(head: RPNHead, maps: Sequence[Tensor], strides: Sequence[int]) -> RPNOutputs:
    """Of all maps of a pyramid."""
    logits, deltas = zip(*(head(x) for x in maps), strict=True)
    places = anchors([(x.shape[2], x.shape[3]) for x in maps], strides, maps[0].device)
    return RPNOutputs(places, list(logits), list(deltas))


def proposals(outputs: RPNOutputs, extent: Tensor, per_level: int, count: int) -> Proposals:
    """The `count` best boxes of each image, out of the per_level best of each map, thinned out by NMS on each map.

    extent: (B, 2), the rows and columns of the image, to which boxes are cut.
    """
    boxes, scores = [], []
    with torch.no_grad():
        for places, logits, deltas in zip(*outputs, strict=True):
            best, index = top(logits.detach(), per_level)
            found = clipped(decode(rows_at(deltas.detach(), index), places[index], STDS), extent)
            usable = ((found[..., 2:] - found[..., :2]) > 0).all(dim=-1)
            kept = kept_by_nms(found, best, usable, NMS_IOU)
            boxes.append(found)
            scores.append(best.masked_fill(~kept, -torch.inf))
        every, score = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
        best, index = top(score, count)
        usable = best > -torch.inf
        chosen = torch.where(usable.unsqueeze(-1), rows_at(every, index), 0.0)
        missing = count - chosen.shape[1]
        return Proposals(F.pad(chosen, (0, 0, 0, missing)), F.pad(usable, (0, missing)))


def rpn_losses(outputs: RPNOutputs, objects: Objects, extent: Tensor, inside_only: bool, beta: float) -> Tensor:
    """The two losses of each image: (B, 2) float32, of whether there is an object and of its box.

    Each is a sum over the image's sampled anchors, divided by their number: binary cross-entropy; and the smooth L1
    distance of deltas below beta (0: plain L1), of anchors that stand for an object.
    inside_only: anchors that reach beyond the image are not learnt from.
    """
    places, logits = torch.cat(outputs.anchors), torch.cat(outputs.logits, dim=1)
    deltas = torch.cat(outputs.deltas, dim=1)
    with torch.no_grad():
        usable = inside(places, extent) if inside_only else None
        chosen = sampled(assigned(places, objects, RULE, usable), objects.draw, STREAM, SAMPLES, SAMPLES // 2)
        references = places[chosen.at]
        boxes = torch.where(chosen.positive.unsqueeze(-1), rows_at(objects.boxes, chosen.place), references)
        wanted = encode(boxes, references, STDS)
    said = logits.gather(1, chosen.at)
    entropy = F.binary_cross_entropy_with_logits(said, chosen.positive.to(said.dtype), reduction="none")
    distance = smooth_l1(rows_at(deltas, chosen.at), wanted, beta).sum(dim=-1)
    number = chosen.taken.sum(dim=1).clamp(min=1)
    sums = [entropy * chosen.taken, distance * chosen.positive]
    return torch.stack([each.sum(dim=1) / number for each in sums], dim=1)


def inside(places: Tensor, extent: Tensor) -> Tensor:
    """Whether anchors (A, 4) lie within images of extent (B, 2): (B, A) bool"""
    limits = extent.flip(1).unsqueeze(1)  # columns, rows
    return (places[:, :2] >= 0).all(dim=-1) & (places[:, 2:] <= limits).all(dim=-1)


def smooth_l1(values: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """Element by element; plain L1 where beta is 0 (arXiv:1504.08083, equation 3)."""
    return (
        F.l1_loss(values, wanted, reduction="none")
        if beta == 0
        else F.smooth_l1_loss(values, wanted, reduction="none", beta=beta)
    )
