"""Which candidates stand for which object, and which of them are learnt from: as many of every image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swinv2_train.models.detection.boxes import areas, intersections, over_union
from swinv2_train.models.detection.objects import Objects

NEGATIVE, IGNORED = -1, -2
CROWD_SHARE = 0.5
"""A candidate of whose area this share lies in one crowd is no example of background."""
_BITS = 0xFFFFFFFF
_INDEX_BITS = 24
"""Candidates of an image are fewer than two to this power."""


class Rule(NamedTuple):
    """When a candidate stands for an object."""

    positive: float
    """From this IoU on it does."""
    negative: float
    """Below this one it stands for none; it is ignored between the two."""
    best: float | None
    """Those with the highest IoU with an object stand for it in any case, from this IoU on; None = not."""


def assigned(candidates: Tensor, objects: Objects, rule: Rule, usable: Tensor | None = None) -> Tensor:
    """The place of the object that each candidate stands for, or NEGATIVE, or IGNORED: (B, N) int64.

    candidates: (B, N, 4) or (N, 4).  usable: (B, N) bool, the candidates that there are; None = all.  Of several
    objects whose best candidate one is, it is the last's (mmdetection; torchvision leaves it with the highest IoU's).
    """
    count, rows = len(objects.boxes), []
    for b in range(count):  # at 1536 px the overlaps of one image with 100 objects are 240 MB
        mine = candidates if candidates.ndim == 2 else candidates[b]
        rows.append(_assigned_of_one(mine, objects.boxes[b], objects.real[b], objects.ignored[b], rule))
    found = torch.stack(rows)
    return found if usable is None else found.masked_fill(~usable, IGNORED)


def _assigned_of_one(candidates: Tensor, boxes: Tensor, real: Tensor, crowds: Tensor, rule: Rule) -> Tensor:
    each = candidates.unsqueeze(1)
    shared = intersections(each, boxes)  # (N, M)
    overlaps = over_union(shared, each, boxes).masked_fill(~real, -1.0)
    highest, place = overlaps.max(dim=1)
    found = torch.full_like(place, IGNORED)
    found = torch.where(highest < rule.negative, NEGATIVE, found)
    found = torch.where(highest >= rule.positive, place, found)
    if rule.best is not None:
        tops = overlaps.amax(dim=0)  # (M,)
        best = (overlaps == tops) & (tops >= rule.best) & real
        numbers = torch.arange(1, len(boxes) + 1, device=boxes.device, dtype=torch.int32)  # half the bytes to read
        last = torch.where(best, numbers, 0).amax(dim=1).long()
        found = torch.where(last > 0, last - 1, found)
    in_crowd = shared.masked_fill(~crowds, 0.0).amax(dim=1) >= CROWD_SHARE * areas(candidates).clamp(min=1e-6)
    return torch.where((found == NEGATIVE) & in_crowd, IGNORED, found)


class Sample(NamedTuple):
    """The candidates that are learnt from, those that stand for objects first; S of each image."""

    at: Tensor
    """(B, S) int64, the index of each among the candidates."""
    place: Tensor
    """(B, S) int64, of the object, 0 where there is none."""
    positive: Tensor
    """(B, S) bool: whether it stands for an object."""
    taken: Tensor
    """(B, S) bool: False where there were not enough candidates."""


def sampled(found: Tensor, draw: Tensor, stream: int, number: int, most_positive: int) -> Sample:
    """At most most_positive candidates that stand for objects, filled up to number with those that stand for none.

    found: (B, N), of assigned.  draw: (B,); stream: tells the choices of one image apart.
    """
    keys = priorities(draw, stream, found.shape[1])
    positive, at = _first(found >= 0, keys, most_positive)  # (B,), (B, most_positive)
    negative, filling = _first(found == NEGATIVE, keys, number)
    slots = torch.arange(number, device=found.device).expand(len(found), -1)
    positive = positive.unsqueeze(1)
    index = torch.where(
        slots < positive,
        at.gather(1, slots.clamp(max=at.shape[1] - 1)),
        filling.gather(1, (slots - positive).clamp(0, filling.shape[1] - 1)),
    )
    is_positive = slots < positive
    taken = is_positive | (slots - positive < negative.unsqueeze(1))
    return Sample(index, found.gather(1, index).clamp(min=0), is_positive, taken)


def _first(wanted: Tensor, keys: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """How many are wanted, at most `most`, and the indices of those with the highest keys before any others."""
    most = min(most, keys.shape[1])
    return wanted.sum(dim=1).clamp(max=most), torch.where(wanted, keys, -1).topk(most, dim=1).indices


def priorities(draw: Tensor, stream: int, count: int) -> Tensor:
    """Random numbers for the candidates of each image, all different: (B, count) int64, 0 or more.

    A function of (draw, stream, index) alone, the same on every device: a hash of 32 bits (Wellons's lowbias32).
    """
    index = torch.arange(count, device=draw.device)
    seeds = _hashed(_hashed(draw & _BITS) + (draw >> 32 & _BITS) + 0x9E3779B9 * (stream + 1))
    return _hashed(seeds.unsqueeze(1) + _hashed(index)) << _INDEX_BITS | index


def _hashed(values: Tensor) -> Tensor:
    """int64 -> 0 .. 2**32 - 1; products beyond 2**63 keep their low bits."""
    values = values & _BITS
    values = (values ^ values >> 16) * 0x7FEB352D & _BITS
    values = (values ^ values >> 15) * 0x846CA68B & _BITS
    return values ^ values >> 16


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest `count` of float32 scores (B, N) and their indices; of equal ones the first.

    So bfloat16 scores, of which many are equal, are chosen alike whatever the batch.
    """
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0: minus zero becomes zero
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    index = torch.arange(scores.shape[1], device=scores.device)
    chosen = (order | (_BITS - index)).topk(min(count, scores.shape[1]), dim=1).indices
    return scores.gather(1, chosen), chosen


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values (B, N, ...) at index (B, S): (B, S, ...)"""
    return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(*index.shape, *values.shape[2:]))
