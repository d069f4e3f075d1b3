"""Detections of several views made one: NMS against torchvision, soft-NMS against a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.tasks.detections import Detections, merged


def detections(seed: int, count: int = 60) -> Detections:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (count, 2))], axis=1).astype(np.float32)
    masks = [encode_mask(np.arange(12).reshape(3, 4) == number % 12) for number in range(count)]
    scores = torch.from_numpy(rng.random(count).astype(np.float32))
    return Detections(torch.from_numpy(boxes), scores, torch.from_numpy(rng.integers(0, 3, count)), masks)


def overlap(one: list[float], other: list[float]) -> float:
    shared = max(min(one[2], other[2]) - max(one[0], other[0]), 0) * max(
        min(one[3], other[3]) - max(one[1], other[1]), 0
    )
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (area - shared)


def soft_nms(found: Detections, method: str, iou: float, sigma: float, least: float) -> list[tuple[int, float]]:
    """As the paper's figure 2 writes it, class by class."""
    boxes, classes = found.boxes.tolist(), found.classes.tolist()
    result = []
    for label in set(classes):
        left = {number: float(found.scores[number]) for number in range(len(boxes)) if classes[number] == label}
        while left:
            best = max(left, key=lambda number: left[number])
            score = left.pop(best)
            if score >= least:
                result.append((best, score))
            for number in left:
                shared = overlap(boxes[best], boxes[number])
                if method == "soft_nms_gaussian":
                    left[number] *= math.exp(-(shared**2) / sigma)
                elif shared > iou:
                    left[number] *= 1 - shared
    return sorted(result, key=lambda each: -each[1])


@pytest.mark.parametrize("method", ["soft_nms_linear", "soft_nms_gaussian"])
@pytest.mark.parametrize("seed", range(4))
def test_soft_nms_is_the_papers_loop(method: str, seed: int) -> None:
    found = detections(seed)
    right = soft_nms(found, method, iou=0.3, sigma=0.5, least=0.05)
    assert len(right) > 25
    for most in (20, 1000):
        mine = merged([found], method, iou=0.3, most=most, sigma=0.5, least_score=0.05)
        places = [number for number, _ in right[:most]]
        torch.testing.assert_close(
            mine.scores, torch.tensor([score for _, score in right[:most]]), rtol=1e-5, atol=1e-6
        )
        assert torch.equal(mine.boxes, found.boxes[places]) and torch.equal(mine.classes, found.classes[places])
        assert found.masks is not None and mine.masks == [found.masks[place] for place in places]


@pytest.mark.parametrize("seed", range(4))
def test_nms_of_several_views_is_torchvisions_of_all_of_them(seed: int) -> None:
    views = [detections(seed), detections(seed + 100, 30), detections(seed + 200, 0)]
    boxes, scores, classes = (torch.cat([each[place] for each in views]) for place in range(3))
    kept = batched_nms(boxes, scores, classes, 0.5)
    mine = merged(views, "nms", iou=0.5, most=1000)
    assert torch.equal(mine.boxes, boxes[kept]) and torch.equal(mine.scores, scores[kept])
    assert 20 < len(kept) < 90 and mine.masks is not None and len(mine.masks) == len(kept)


def test_nothing_found_stays_nothing() -> None:
    for method in ("nms", "soft_nms_linear", "soft_nms_gaussian"):
        mine = merged([detections(0, 0)], method, iou=0.5, most=10)
        assert mine.boxes.shape == (0, 4) and mine.scores.shape == (0,) and mine.masks == []
