"""Image classification, from scratch or from a pre-trained encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.config import ClassifyConfig, Config, DataConfig, pair
from swinv2_train.data.crop import centre_crop, random_flip, random_resized_crop
from swinv2_train.data.shards import SampleError
from swinv2_train.models import multiply_adds
from swinv2_train.tasks import Forward, Normalise, build_model


@dataclass(frozen=True)
class ClassifyTransform:
    """A crop of the image and, where they are needed, its label: {"images": uint8 (3, H, W), "labels": int64 ()}."""

    data: DataConfig
    img_size: tuple[int, int]
    num_classes: int
    train: bool
    needs_label: bool = True

    def __call__(self, image: Tensor, label: int | None, rng: np.random.Generator) -> dict[str, Tensor]:
        if self.needs_label and (label is None or not 0 <= label < self.num_classes):
            raise SampleError(f"label {label} is not within 0..{self.num_classes - 1} (task.num_classes)")
        if self.train:
            data = self.data
            image = random_resized_crop(image, self.img_size, data.crop_scale, data.crop_ratio, data.interpolation, rng)
            image = random_flip(image, data.hflip, rng)
        else:
            squash = self.data.eval_crop == "squash"
            image = centre_crop(image, self.img_size, self.data.eval_crop_pct, self.data.interpolation, squash)
        return {"images": image, "labels": torch.tensor(label)} if self.needs_label else {"images": image}


class ClassifyTask:
    """Cross-entropy with label smoothing; top-1 and top-5 accuracy in percent."""

    has_picture = False

    def __init__(self, config: Config, task: ClassifyConfig, device: torch.device) -> None:
        self.module = build_model(config.model, task.num_classes)
        self.multiply_adds = multiply_adds(self.module)
        self.label_smoothing = task.label_smoothing
        self.num_classes = task.num_classes
        self.normalise = Normalise(config.data.mean, config.data.std, device)
        img_size = pair("model.img_size", config.model.img_size)
        self.train_transform, self.eval_transform = (
            ClassifyTransform(config.data, img_size, task.num_classes, train=train) for train in (True, False)
        )

    def loss(self, forward: Forward, batch: dict[str, Any]) -> Tensor:
        logits = forward(images=self.normalise(batch["images"])).float()  # (B, classes)
        labels, weight = batch["labels"].to(logits.device), batch["weight"].to(logits.device)
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        return _mean(losses, weight)

    def count(self, batch: dict[str, Any]) -> float:
        return float(batch["weight"].sum())

    def scores(self, forward: Forward, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.scores_and_predictions(forward, batch)[0]

    def scores_and_predictions(self, forward: Forward, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The scores, and the most likely class of each image, (B,) int64.

        batch["labels"]: (B,), or (B, L) where an image has up to L right classes, filled up with -1.  A prediction is
        right when it is one of them; the loss is of their joint probability.
        """
        logits = forward(images=self.normalise(batch["images"])).float()
        labels, weight = batch["labels"].to(logits.device), batch["weight"].to(logits.device)
        labels = labels.view(len(logits), -1)  # (B, L)
        ranking = logits.topk(min(5, self.num_classes), dim=1).indices  # (B, 5)
        hits = (ranking.unsqueeze(2) == labels.unsqueeze(1)).any(dim=2)
        log_p = logits.log_softmax(dim=1).gather(1, labels.clamp(min=0)).masked_fill(labels < 0, float("-inf"))
        scores = {
            "val/loss": _mean(-log_p.logsumexp(dim=1), weight),
            "val/top1": 100 * _mean(hits[:, 0].float(), weight),
            "val/top5": 100 * _mean(hits.any(dim=1).float(), weight),
        }
        return scores, ranking[:, 0]

    def picture(self, forward: Forward, batch: dict[str, Any]) -> np.ndarray:
        raise AssertionError("classification has no picture")


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1e-12)
