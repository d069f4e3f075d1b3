"""The cross-entropy of every pixel of an image, in float32, one image at a time.

Legend: B batch, K classes, H W pixels, h w places of the map of scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinv2_train.models.precision import at_least_float32
from swinv2_train.models.resize import resized


class PixelLoss:
    """Sums of cross-entropies over the pixels of each image, and what they are to be divided by.

    denominator: "all" (mmsegmentation's rule: a mean over all pixels, ignored ones too, so that every image of a batch
    counts the same) or "valid" (torch's rule: over those that are not ignored, by the weights of their classes).
    class_weights: what a pixel of each class counts, (K,); None = 1.
    """

    def __init__(self, denominator: str, ignore_index: int, class_weights: list[float] | None) -> None:
        self.valid = denominator == "valid"
        self.ignore_index = ignore_index
        self.class_weights = class_weights

    def sums(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits: (B, K, h, w), resized bilinearly to labels, int64 (B, H, W).  Returns (B,), at least float32.

        The scores of an image's pixels are computed again in the backward pass, so that those of one image alone are in
        memory (157 MB for 150 classes and 512 x 512 pixels).
        """
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, device=logits.device, dtype=at_least_float32(logits).dtype)
        found = []
        for scores, right in zip(logits.unbind(), labels.unbind(), strict=True):
            if torch.is_grad_enabled():
                again = checkpoint(self._sum, scores, right, weights, use_reentrant=False, preserve_rng_state=False)
                found.append(again)
            else:
                found.append(self._sum(scores, right, weights))
        return torch.stack(found)

    def _sum(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """(K, h, w), (H, W) -> ()"""
        scores = resized(at_least_float32(logits)[None], (labels.shape[0], labels.shape[1]))
        losses = F.cross_entropy(scores, labels[None], weights, ignore_index=self.ignore_index, reduction="none")
        return losses.sum()

    def counts(self, labels: Tensor) -> Tensor:
        """What the sums of each image are over: (B,) float64.  labels: int64 (B, H, W)."""
        if not self.valid:
            return torch.full((len(labels),), labels[0].numel(), dtype=torch.float64, device=labels.device)
        counted = labels != self.ignore_index
        if self.class_weights is None:
            return counted.flatten(1).sum(dim=1, dtype=torch.float64)
        weights = torch.tensor(self.class_weights, dtype=torch.float64, device=labels.device)
        return (weights[labels.clamp(max=len(weights) - 1)] * counted).flatten(1).sum(dim=1)
