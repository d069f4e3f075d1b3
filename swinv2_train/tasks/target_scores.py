"""Scores of several classes, and of numbers, per image: from all images' rows at once, so exact on any number of ranks.

Percent, but for errors of numbers, which are in the numbers' own units.  What they equal: docs/evaluation.md#targets.
Of predictions one of which is no number (nan) every score is nan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.tasks.metrics import Metric, Rows, Sums

LABEL_COUNTS, RANKING = "f1", "ranking"
"""The names of a multilabel task's Sums and Rows, of which label_tables makes a table."""


def multilabel_scores(logits: Tensor, targets: Tensor, threshold: float) -> dict[str, Metric]:
    """val/map, val/auroc, val/f1_micro and val/f1_macro of a batch.

    logits, targets: (B, C), targets 0 and 1, nan where it is not known whether a class applies: no score counts that.
    """
    known = ~targets.isnan()
    right, said = targets == 1, logits > math.log(threshold / (1 - threshold))
    no_number = known & logits.isnan()
    counts = torch.stack([right & said, known & ~right & said, right & ~said, no_number], dim=1).long()  # (B, 4, C)
    rows = torch.cat([logits.double(), targets.nan_to_num(nan=-1.0).double()], dim=1)
    return {
        LABEL_COUNTS: Sums(counts, f1_scores),
        RANKING: Rows(rows, torch.arange(len(rows), device=rows.device), ranking_scores),
    }


def f1_scores(counts: Tensor) -> dict[str, float]:
    """(4, C) right, wrongly said, missed and no number -> F1 of all together and the mean over classes, of a class
    without any 0.

    As scikit-learn's f1_score with average=micro and macro.
    """
    return {"val/f1_micro": 100 * float(_f1(counts.sum(dim=1))), "val/f1_macro": 100 * float(_f1(counts).mean())}


def _f1(counts: Tensor) -> Tensor:
    """(4, ...) as f1_scores' -> (...) float64, 0 to 1."""
    right, wrong, missed, no_number = counts.double().cpu()
    found = 2 * right / (2 * right + wrong + missed).clamp(min=1)
    return found.masked_fill(no_number > 0, math.nan)


def label_tables(counts: Tensor, rows: Tensor) -> dict[str, Any]:
    """Of every class, as JSON holds it: class_images, the images where it applies; class_ap, its average precision,
    null where it applies to none; class_f1 at the threshold, null where it is neither there nor said.  Percent.

    counts: as f1_scores'; rows: as ranking_scores'.
    """
    right, _, missed, _ = counts.cpu()
    some = counts.sum(dim=0).cpu() > 0
    f1 = torch.where(some, 100 * _f1(counts), math.nan).tolist()
    precisions = (100 * average_precision(*each) if each[1].any() else math.nan for each in _known_of_classes(rows))
    return {
        "class_images": (right + missed).tolist(),
        "class_ap": [None if math.isnan(value) else value for value in precisions],
        "class_f1": [None if math.isnan(value) else value for value in f1],
    }


def _known_of_classes(rows: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(n, 2 C) scores and targets -> of each class the scores, and whether it applies, of the images where that is
    known.
    """
    classes = rows.shape[1] // 2
    scores, targets = rows[:, :classes].numpy(), rows[:, classes:].numpy()
    for each in range(classes):
        known = targets[:, each] >= 0
        yield scores[known, each], targets[known, each] == 1


def ranking_scores(rows: Tensor) -> dict[str, float]:
    """(n, 2 C) scores and targets of all images -> mean average precision and area under the ROC curve.

    Means over the classes that have both images where they apply and, for the area, others; nan where none has.
    """
    precisions, areas = [], []
    for scores, right in _known_of_classes(rows):
        if not right.any():
            continue
        precisions.append(average_precision(scores, right))
        if not right.all():
            areas.append(area_under_roc(scores, right))
    return {
        "val/map": 100 * float(np.mean(precisions)) if precisions else math.nan,
        "val/auroc": 100 * float(np.mean(areas)) if areas else math.nan,
    }


def average_precision(scores: np.ndarray, right: np.ndarray) -> float:
    """The sum over thresholds of precision x what recall gains there; equal scores are one threshold.

    scores: (n,) float64; right: (n,) bool, at least one.  As scikit-learn's average_precision_score.
    """
    if np.isnan(scores).any():
        return math.nan
    _, place, count = np.unique(-scores, return_inverse=True, return_counts=True)
    hits = np.bincount(place, weights=right, minlength=len(count))
    return float((hits.cumsum() / count.cumsum() * hits).sum() / hits.sum())


def area_under_roc(scores: np.ndarray, right: np.ndarray) -> float:
    """The share of pairs of one image where the class applies and one where not in which the first scores higher.

    Equal scores are half a pair.  scores: (n,) float64; right: (n,) bool, of both kinds.
    """
    if np.isnan(scores).any():
        return math.nan
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = count.cumsum() - (count - 1) / 2  # of each score, the mean of those of its equals, from 1
    positives = int(right.sum())
    above = float(ranks[place][right].sum()) - positives * (positives + 1) / 2
    return above / (positives * (len(right) - positives))


def regression_scores(values: Tensor, targets: Tensor) -> dict[str, Metric]:
    """val/mae, val/rmse and val/r2 of a batch.  values, targets: (B, K) in the numbers' units, nan = not known."""
    rows = torch.cat([values.double(), targets.double()], dim=1)
    return {"errors": Rows(rows, torch.arange(len(rows), device=rows.device), error_scores)}


def error_scores(rows: Tensor) -> dict[str, float]:
    """(n, 2 K) predicted and right numbers -> the mean absolute error and the root of the mean squared one over all
    known numbers, and the mean over the K of R2 = 1 - squared errors / squared distances from the mean.

    As torchmetrics' MeanAbsoluteError, MeanSquaredError(squared=False) and R2Score (uniform average); of a number that
    is the same everywhere R2 is 1 where every prediction is exact, else 0, and one without two images is left out.
    """
    count = rows.shape[1] // 2
    said, right = rows[:, :count].numpy(), rows[:, count:].numpy()
    known = ~np.isnan(right)
    errors = (said - right)[known]
    if not len(errors):
        return dict.fromkeys(("val/mae", "val/rmse", "val/r2"), math.nan)
    r2 = []
    for each in range(count):
        own = right[known[:, each], each]
        if len(own) < 2:
            continue
        squared = float(((said[known[:, each], each] - own) ** 2).sum())
        if math.isnan(squared):
            r2.append(squared)
        elif own.min() == own.max():  # not by the distances from the mean, which is rounded
            r2.append(float(squared == 0))
        else:
            r2.append(1 - squared / float(((own - own.mean()) ** 2).sum()))
    return {
        "val/mae": float(np.abs(errors).mean()),
        "val/rmse": math.sqrt(float((errors**2).mean())),
        "val/r2": float(np.mean(r2)) if r2 else math.nan,
    }
