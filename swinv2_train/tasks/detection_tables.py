"""What there is to say of found objects beside a few numbers: classes, precision over recall, and what is confused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from swinv2_train.tasks.detection_scores import BOX, MASK, Image, average_precision, read_records

MOST_CONFUSIONS = 20


def detection_tables(records: Sequence[bytes]) -> dict[str, Any]:
    """Of the records of all images, as JSON holds it: null where a class has no objects.

    class_objects: right objects of each class, without crowds.  class_box_ap, class_box_ap50 and, with masks, those of
    masks: percent.  box_precision_at_recall: percent at an overlap of 0.50, the mean over classes, for recall of 0,
    0.01, ... 1; class_box_precision_at_recall: of each class.  confusions: [right class, named class, objects], the
    commonest first, -1 for none.
    """
    images = read_records(records)
    labels = [label for image in images for part in ("truth", "found") for label in image[part]["classes"]]
    num_classes = max(labels, default=-1) + 1
    masks = any(image["truth"]["masks"] or image["found"]["masks"] for image in images)
    right = Counter(
        label for image in images
        for label, crowd in zip(image["truth"]["classes"], image["truth"]["crowd"], strict=True) if not crowd
    )  # fmt: skip
    found: dict[str, Any] = {"class_objects": [right[number] for number in range(num_classes)]}
    if not num_classes:
        return found
    for kind in (BOX, MASK) if masks else (BOX,):
        each = average_precision(images, num_classes, kind)
        found[f"class_{kind}_ap"], found[f"class_{kind}_ap50"] = _plain(each.class_ap), _plain(each.class_ap50)
        there = each.precision[:, ~np.isnan(each.precision).all(axis=0)]
        found[f"class_{kind}_precision_at_recall"] = [
            None if np.isnan(column).all() else column.round(1).tolist() for column in each.precision.T
        ]
        found[f"{kind}_precision_at_recall"] = there.mean(axis=1).round(2).tolist() if there.size else []
    pairs = sorted(confusions(images).items(), key=lambda pair: (-pair[1], pair[0]))
    wrong = [[*pair, count] for pair, count in pairs if pair[0] != pair[1]]
    return {**found, "confusions": wrong[:MOST_CONFUSIONS]}


def _plain(values: np.ndarray) -> list[float | None]:
    """JSON has no nan."""
    return [None if math.isnan(value) else round(value, 3) for value in values.tolist()]


def confusions(
    images: Sequence[Image], least_score: float = 0.3, least_overlap: float = 0.5
) -> dict[tuple[int, int], int]:
    """How often an object of a class was found as one of another: (right class, named class) -> objects.

    Each detection of at least least_score, the most certain first, takes the object of any class that it overlaps most,
    by at least least_overlap, and that is not taken; -1 is no object, or none found.  Crowds do not count.
    """
    counts: dict[tuple[int, int], int] = {}
    for image in images:
        truth, found = image["truth"], image["found"]
        boxes = np.array(truth["boxes"], np.float64).reshape(-1, 4)
        free = ~np.array(truth["crowd"], bool)
        is_crowd = ~free
        for place in np.argsort(-np.array(found["scores"]), kind="stable").tolist():
            if found["scores"][place] < least_score:
                break
            overlap = _overlaps(np.array(found["boxes"][place]), boxes)
            best = int(np.argmax(np.where(free, overlap, -1))) if free.any() else -1
            right = -1
            if best >= 0 and overlap[best] >= least_overlap:
                right, free[best] = truth["classes"][best], False
            elif (overlap[is_crowd] >= least_overlap).any():
                continue
            pair = (right, found["classes"][place])
            counts[pair] = counts.get(pair, 0) + 1
        for place in np.flatnonzero(free).tolist():
            pair = (truth["classes"][place], -1)
            counts[pair] = counts.get(pair, 0) + 1
    return counts


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    sides = np.clip(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0, None)
    shared = sides.prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - shared
    found: np.ndarray = shared / np.maximum(area, 1e-12)
    return found
