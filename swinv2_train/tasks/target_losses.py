"""The losses of whole images, by what their target is (task.target, task.loss).

# B images, C classes (or numbers), x logits, y targets
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.config import ClassifyConfig


class TargetLoss(Protocol):
    """The loss of each image, (B,) float32."""

    class_weights: Tensor | None
    """(C,) what each class counts; None = 1."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits: (B, C) float32.  targets: of the form that the target's transform gives."""


class SingleLoss:
    """Of one class per image: cross-entropy with label smoothing, or focal loss of the same soft target."""

    def __init__(self, task: ClassifyConfig) -> None:
        self.smoothing = task.label_smoothing
        self.gamma = task.focal_gamma if task.loss_name == "focal" else 0.0
        self.class_weights: Tensor | None = None
        """(C,) what an image of each class counts; None = 1."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """targets: (B,) int64."""
        if self.gamma:
            losses = focal_of_classes(logits, targets, self.gamma, self.smoothing)
        else:
            losses = F.cross_entropy(logits, targets, label_smoothing=self.smoothing, reduction="none")
        return losses if self.class_weights is None else losses * self.class_weights[targets]


class MultilabelLoss:
    """Of any number of classes per image: the mean over those of which it is known whether they apply.

    Each is a sum of y x (a loss of p) and (1 - y) x (a loss of 1 - p), so that losses of mixed targets are mixtures of
    losses.
    """

    def __init__(self, task: ClassifyConfig) -> None:
        self.task = task
        self.class_weights: Tensor | None = None
        """(C,) what a class that applies counts; None = 1."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """targets: (B, C) of 0 and 1, nan where it is not known."""
        known = ~targets.isnan()
        y = targets.nan_to_num(nan=0.0)
        y = y * (1 - self.task.label_smoothing) + self.task.label_smoothing / 2
        applies, otherwise = self._parts(logits)
        if self.class_weights is not None:
            applies = applies * self.class_weights
        return mean_of_known(y * applies + (1 - y) * otherwise, known)

    def _parts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The loss where each class applies, and where it does not, (B, C)."""
        log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
        if self.task.loss_name == "bce":
            return -log_p, -log_q
        p, q = logits.sigmoid(), (-logits).sigmoid()
        if self.task.loss_name == "focal":
            return -(q**self.task.focal_gamma) * log_p, -(p**self.task.focal_gamma) * log_q
        positive, negative = self.task.asymmetric_gamma
        clip = self.task.asymmetric_clip
        shifted = (p - clip).clamp(min=0)  # arXiv:2009.14119 eq. 5
        if clip:
            log_q = (q + clip).clamp(max=1).log()
        return -(q**positive) * log_p, -(shifted**negative) * log_q


class RegressionLoss:
    """Of numbers: Huber's, quadratic up to delta and linear beyond, or the squared error; the mean over those known."""

    def __init__(self, task: ClassifyConfig) -> None:
        self.class_weights: Tensor | None = None
        self.delta = task.huber_delta if task.loss_name == "huber" else None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """targets: (B, K) normalised, nan where a number is not known."""
        known = ~targets.isnan()
        y = targets.nan_to_num(nan=0.0)
        if self.delta is None:
            errors = F.mse_loss(logits, y, reduction="none")
        else:
            errors = F.huber_loss(logits, y, reduction="none", delta=self.delta)
        return mean_of_known(errors, known)


LOSSES: Mapping[str, Callable[[ClassifyConfig], TargetLoss]] = {
    "single": SingleLoss,
    "multilabel": MultilabelLoss,
    "regression": RegressionLoss,
}


def focal_of_classes(logits: Tensor, labels: Tensor, gamma: float, smoothing: float) -> Tensor:
    """-sum over k of y_k (1 - p_k)^gamma log p_k, (B,), with y smoothed (arXiv:1708.02002 eq. 4, over softmax).

    logits: (B, C); labels: (B,) int64.
    """
    log_p = logits.log_softmax(dim=1)
    each = -((-torch.expm1(log_p)).clamp(min=0) ** gamma) * log_p
    own = each.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (1 - smoothing) * own + smoothing * each.mean(dim=1)


def mean_of_known(losses: Tensor, known: Tensor) -> Tensor:
    """(B, C) -> (B,): over what is known of each image; 0 where nothing is."""
    return losses.masked_fill(~known, 0).sum(dim=1) / known.sum(dim=1).clamp(min=1)
