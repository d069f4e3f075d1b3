"""Detections thinned out: NMS against torchvision, soft-NMS against the paper's loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from swinv2_train.models.detection.suppress import Suppression

CLASSES = 3


def detections(seed: int, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of any class (1, N, 1, 4) and scores (1, N, K), of which each box has one."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (count, 2))], axis=1).astype(np.float32)
    scores = np.zeros((count, CLASSES), np.float32)
    scores[np.arange(count), rng.integers(0, CLASSES, count)] = rng.uniform(0.06, 1, count)
    return torch.from_numpy(boxes)[None, :, None], torch.from_numpy(scores)[None]


def overlap(one: list[float], other: list[float]) -> float:
    width, height = (max(min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]), 0) for axis in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (area - width * height)


def soft_nms(boxes: list[list[float]], scores: dict[int, float], soft: str, iou: float) -> list[tuple[float, int]]:
    """As the paper's figure 2 writes it, for one class."""
    left, result = dict(scores), []
    while left:
        best = max(left, key=lambda number: left[number])
        result.append((left.pop(best), best))
        for number in left:
            shared = overlap(boxes[best], boxes[number])
            if soft == "gaussian":
                left[number] *= math.exp(-(shared**2) / 0.5)
            elif shared > iou:
                left[number] *= 1 - shared
    return result


@pytest.mark.parametrize("soft", ["linear", "gaussian"])
@pytest.mark.parametrize("seed", range(3))
def test_soft_nms_is_the_papers_loop(soft: str, seed: int) -> None:
    boxes, scores = detections(seed)
    right: list[tuple[float, int, int]] = []
    for label in range(CLASSES):
        mine = {n: float(score) for n, score in enumerate(scores[0, :, label]) if score > 0}
        right += [(score, n, label) for score, n in soft_nms(boxes[0, :, 0].tolist(), mine, soft, 0.3) if score > 0.05]
    right.sort(reverse=True)
    assert 25 < len(right) < 60
    for most in (20, 60):
        found = Suppression(most, 0.05, 0.3, soft)(boxes, scores)
        wanted = right[:most]
        count = len(wanted)
        np.testing.assert_allclose(found.scores[0, :count], [score for score, _, _ in wanted], rtol=1e-5)
        assert torch.equal(found.boxes[0, :count], boxes[0, [n for _, n, _ in wanted], 0])
        assert found.classes[0].tolist() == [label for _, _, label in wanted] + [-1] * (most - count)


@pytest.mark.parametrize("seed", range(3))
def test_nms_is_torchvisions(seed: int) -> None:
    boxes, scores = detections(seed, 90)
    best, labels = scores[0].max(dim=1)
    kept = batched_nms(boxes[0, :, 0], best, labels, 0.5)
    found = Suppression(90, 0.05, 0.5, "none")(boxes, scores)
    there = found.classes[0] >= 0
    assert torch.equal(found.boxes[0, there], boxes[0, kept, 0]) and torch.equal(found.scores[0, there], best[kept])
    assert 20 < len(kept) < 90
