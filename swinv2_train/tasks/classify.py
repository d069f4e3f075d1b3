"""Image classification, from scratch or from a pre-trained encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.config import ClassifyConfig, Config, DataConfig, mixes, pair
from swinv2_train.data.sample import SampleError
from swinv2_train.data.transforms.augment import Mixing, color_jitter, draw_erasing, erase, rand_augment
from swinv2_train.data.transforms.crop import eval_crop, random_flip, random_resized_crop
from swinv2_train.models import multiply_adds
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import Normalise
from swinv2_train.tasks.task import Forward


@dataclass(frozen=True)
class ClassifyTransform:
    """A crop of the image and, where they are needed, its label: {"images": uint8 (3, H, W), "labels": int64 ()}.

    For training the crop is augmented, and there are plain values for what is done on the device: "erasing" (an Erasing
    or None) with task.erasing_prob, "mixing_seed" (int) with mixup or cutmix.
    """

    data: DataConfig
    img_size: tuple[int, int]
    task: ClassifyConfig
    train: bool
    needs_label: bool = True

    def __call__(self, image: Tensor, label: int | None, rng: np.random.Generator) -> dict[str, Any]:
        if self.needs_label and (label is None or not 0 <= label < self.task.num_classes):
            raise SampleError(f"label {label} is not within 0..{self.task.num_classes - 1} (task.num_classes)")
        row = self._augmented(image, rng) if self.train else {"images": eval_crop(image, self.img_size, self.data)}
        return {**row, "labels": torch.tensor(label)} if self.needs_label else row

    def _augmented(self, image: Tensor, rng: np.random.Generator) -> dict[str, Any]:
        data, task = self.data, self.task
        image = random_resized_crop(image, self.img_size, data.crop_scale, data.crop_ratio, data.interpolation, rng)
        image = random_flip(image, data.hflip, rng)
        if task.rand_augment is not None:
            image = rand_augment(image, task.rand_augment, data.mean, data.interpolation, rng)
        if task.color_jitter:
            image = color_jitter(image, task.color_jitter, rng)
        row: dict[str, Any] = {"images": image}
        if task.erasing_prob:
            row["erasing"] = draw_erasing(*self.img_size, task.erasing_prob, rng)
        if mixes(task):
            row["mixing_seed"] = int(rng.integers(2**32))
        return row


class ClassifyTask:
    """Cross-entropy with label smoothing, of mixed images with the labels of both; top-1 and top-5 in percent."""

    has_picture = False
    block_types = (SwinBlock,)

    def __init__(self, config: Config, task: ClassifyConfig, device: torch.device) -> None:
        self.module = build_model(config.model, task.num_classes)
        self.multiply_adds = multiply_adds(self.module)
        self.label_smoothing = task.label_smoothing
        self.mixing = Mixing(task.mixup_alpha, task.cutmix_alpha, task.mixup_prob, task.mixup_switch_prob)
        self.num_classes = task.num_classes
        self.normalise = Normalise(config.data.mean, config.data.std, device)
        img_size = pair("model.img_size", config.model.img_size)
        self.train_transform, self.eval_transform = (
            ClassifyTransform(config.data, img_size, task, train=train) for train in (True, False)
        )

    def loss(self, forward: Forward, batch: dict[str, Any]) -> Tensor:
        images = self.normalise(batch["images"])
        if "erasing" in batch:
            erase(images, batch["erasing"])
        kept = self.mixing(images, batch["mixing_seed"][0]) if "mixing_seed" in batch else None
        logits = forward(images=images).float()  # (B, classes)
        labels, weight = batch["labels"].to(logits.device), batch["weight"].to(logits.device)
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        if kept is None:
            return _mean(losses, weight)
        partners = F.cross_entropy(logits, labels.flip(0), label_smoothing=self.label_smoothing, reduction="none")
        # cross-entropy is linear in the target; each label counts by its own image's weight, wherever that went
        mixed = kept * weight * losses + (1 - kept) * weight.flip(0) * partners
        return mixed.sum() / weight.sum().clamp(min=1e-12)

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

    def features(self, forward: Forward, batch: dict[str, Any]) -> Tensor:
        pooled: Tensor = forward(images=self.normalise(batch["images"]), features=True)
        return pooled

    def picture(self, forward: Forward, batch: dict[str, Any]) -> np.ndarray:
        raise AssertionError("classification has no picture")


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1e-12)
