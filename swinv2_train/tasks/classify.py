"""What a whole image is: its class, its classes or numbers of it; from scratch or from a pre-trained encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.config import ClassifyConfig, Config, ConfigError, pair
from swinv2_train.data.class_names import listed
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.sample import SampleError, Targets
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.data.transforms.augment import (
    Mixing,
    check_augment,
    color_jitter,
    draw_erasing,
    erase,
    rand_augment,
)
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.data.transforms.crop import eval_crop
from swinv2_train.models import multiply_adds
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.tasks.answers import (
    MOST_EVIDENCE,
    Ask,
    Classes,
    Columns,
    Evidence,
    Prediction,
    Values,
    check_finite,
)
from swinv2_train.tasks.class_weights import class_weights
from swinv2_train.tasks.clip_picture import PICTURE_CLIPS, clip_picture
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import ImageTransform, Normalise, meta_images
from swinv2_train.tasks.metrics import Metric
from swinv2_train.tasks.target_losses import LOSSES, RegressionLoss, TargetLoss, mean_of_known
from swinv2_train.tasks.target_scores import multilabel_scores, regression_scores
from swinv2_train.tasks.task import Batch, Forward, Picture, Predictions

TINY = 1e-38
"""The least probability that a logarithm is taken of."""


@dataclass(frozen=True, kw_only=True)
class ClassifyTransform(ImageTransform):
    """A crop of the image and, where they are needed, its labels: {"images": (C, H, W), "labels": ...}.

    Labels are the class, int64 (); with task.target=multilabel float32 (C,) of 0 and 1, nan where it is not known; with
    regression float64 (K,) in the numbers' own units, nan where one is not known.
    For evaluation at several of task.eval_scales, images are (scales, C, H, W); clips of several views (V, 3, T, H, W).

    For training the crop is augmented, and there are plain values for what is done on the device: "erasing" (an Erasing
    or None) with task.erasing_prob, "mixing_seed" (int) with mixup or cutmix.
    """

    task: ClassifyConfig

    def __call__(self, image: Tensor | Clip, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        labels = self._labels(targets) if self.needs else None
        row = super().__call__(image, targets, rng)
        if self.train:
            row = self._augmented(row["images"], rng)
        elif self.task.eval_scales != [1.0] and isinstance(image, Tensor):
            row = {"images": torch.stack([self._zoomed(image, scale) for scale in self.task.eval_scales])}
        return row if labels is None else {**row, "labels": labels}

    def _labels(self, targets: Targets) -> Tensor:
        count = self.task.num_classes
        if self.task.target == "single":
            label = targets.get("label")
            if label is None or not 0 <= label < count:
                raise SampleError(f"label {label} is not within 0..{count - 1} (task.num_classes)")
            return torch.tensor(label)
        if self.task.target == "multilabel":
            classes = torch.from_numpy(targets["labels"]).long()
            if len(classes) and not (-count <= int(classes.min()) and int(classes.max()) < count):
                raise SampleError(f"labels {classes.tolist()} are not within 0..{count - 1} (task.num_classes)")
            labels = torch.zeros(count)
            labels[classes[classes >= 0]] = 1
            labels[-1 - classes[classes < 0]] = torch.nan
            return labels
        values = targets["values"]
        if values.ndim and len(values) != count:
            raise SampleError(f"{len(values)} values, not {count} (task.num_classes)")
        return torch.from_numpy(np.broadcast_to(values, count).copy())

    def _zoomed(self, image: Tensor, scale: float) -> Tensor:
        """The crop of the image when it is this much larger."""
        return eval_crop(image, self.img_size, replace(self.data, eval_crop_pct=self.data.eval_crop_pct / scale))

    def _augmented(self, image: Tensor, rng: np.random.Generator) -> dict[str, Any]:
        data, task = self.data, self.task
        if task.rand_augment is not None:
            image = rand_augment(image, task.rand_augment, data.mean, data.interpolation, rng)
        if task.color_jitter:
            image = color_jitter(image, task.color_jitter, rng)
        row: dict[str, Any] = {"images": image}
        if task.erasing_prob:
            row["erasing"] = draw_erasing(*self.img_size, task.erasing_prob, rng)
        if task.mixes:
            row["mixing_seed"] = int(rng.integers(2**32))
        return row


class ClassifyTask:
    """A head of a row per class or number on the encoder; its loss and scores are those of task.target."""

    block_types = (SwinBlock,)
    picture: Picture | None = None

    def __init__(self, config: Config, task: ClassifyConfig, device: torch.device) -> None:
        self.module = self.encoder = build_model(config.model, task.num_classes, task.dropout)
        self.multiply_adds = multiply_adds(self.module)
        self.mixing = Mixing(task.mixup_alpha, task.cutmix_alpha, task.mixup_prob, task.mixup_switch_prob)
        self.task, self.num_classes = task, task.num_classes
        self.flip = task.eval_flip
        self.losses: TargetLoss = LOSSES[task.target](task)
        self.predictions = None
        if task.target == "single":
            self.predictions = Predictions(task.num_classes, self.scores_and_predictions, self.probabilities)
        scale = task.value_mean or [0.0], task.value_std or [1.0]
        self.value_mean, self.value_std = (torch.tensor(each, dtype=torch.float64, device=device) for each in scale)
        self.normalise = Normalise.of(config, device)
        self.bands = Bands.of(config)
        img_size = pair("model.img_size", config.model.img_size)
        clips = ClipViews.of(config)
        self.one_view_dims = 4 if clips is None else 5
        if clips is not None:
            clips = replace(clips, views=task.eval_views, crops=task.eval_crops)
            self.picture = self._picture if task.target == "single" else None
        self.train_transform, self.eval_transform = (
            ClassifyTransform(config.data, img_size, train, (task.label_kind,), self.bands, clips, task=task)
            for train in (True, False)
        )

    @staticmethod
    def preflight(task: ClassifyConfig) -> None:
        """What the augmentation is drawn from must be installed."""
        check_augment(task.rand_augment, task.mixes)

    @staticmethod
    def check_source(task: ClassifyConfig, source: Source, key: str) -> None:
        """The model has a class for every label and for every name."""
        if task.target == "regression":
            return
        labels = source.label_range
        if labels is not None and labels[1] >= task.num_classes:
            raise ConfigError(
                f"task.num_classes ({task.num_classes}) is too small: {key} has labels from {labels[0]} to "
                f"{labels[1]}; set task.num_classes={labels[1] + 1} or more"
            )
        if source.classes is not None and len(source.classes) > task.num_classes:
            raise ConfigError(
                f"task.num_classes ({task.num_classes}) is too small: {key} has {len(source.classes)} classes "
                f"({listed(source.classes)}); set task.num_classes={len(source.classes)} or more"
            )

    def begin(self, source: Source | Stream, names: tuple[str, ...] | None) -> None:
        """Classes get the weights that the training images, or a file, give them."""
        weights = class_weights(self.task, source, names)
        self.losses.class_weights = None if weights is None else weights.to(self.normalise.mean.device)

    def notes(self, source: Source | Stream) -> tuple[str, ...]:
        """Where the model has more classes than the images."""
        labels = source.label_range
        if labels is None or labels[1] + 1 >= self.num_classes:
            return ()
        return (f"task.num_classes is {self.num_classes}, but the labels end at {labels[1]}",)

    def meta_batch(self, size: int) -> dict[str, Tensor]:
        """Images and labels without contents."""
        labels = torch.empty(size, dtype=torch.int64, device="meta")
        if self.task.target != "single":
            labels = torch.empty(size, self.num_classes, device="meta")
        return {**meta_images(size, self.encoder.input_size, self.bands), "labels": labels}

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        images = self.normalise(batch["images"])
        if "erasing" in batch:
            erase(images, batch["erasing"])
        kept = self.mixing(images, batch["mixing_seed"][0]) if "mixing_seed" in batch else None
        logits = forward(images=images).float()  # (B, classes)
        labels, weight = self._learned(batch["labels"].to(logits.device)), batch["weight"].to(logits.device)
        if kept is not None and self.task.target == "regression":  # no loss of numbers is linear in them
            labels = kept.unsqueeze(1) * labels + (1 - kept).unsqueeze(1) * labels.flip(0)
            weight, kept = kept * weight + (1 - kept) * weight.flip(0), None
        losses = self.losses(logits, labels)
        if "sources" in batch:  # with mixup and cutmix, by the label of the image itself
            batch["image_losses"] = losses.detach(), weight
        if kept is None:
            return _mean(losses, weight)
        partners = self.losses(logits, labels.flip(0))
        # these losses are linear in the target; each label counts by its own image's weight, wherever that went
        mixed = kept * weight * losses + (1 - kept) * weight.flip(0) * partners
        return mixed.sum() / weight.sum().clamp(min=1e-12)

    def _learned(self, labels: Tensor) -> Tensor:
        """Labels as the loss compares them with logits: numbers in standard deviations from their mean."""
        if self.task.target != "regression":
            return labels
        return ((labels - self.value_mean) / self.value_std).float()

    def count(self, batch: Batch) -> float:
        return float(batch["weight"].sum())

    def scores(self, forward: Forward, batch: Batch) -> Mapping[str, Metric]:
        if self.task.target == "single":
            return self.scores_and_predictions(forward, batch)[0]
        logits = self._logits(forward, batch)
        labels, weight = batch["labels"].to(logits.device), batch["weight"].to(logits.device)
        if self.task.target == "multilabel":
            known = ~labels.isnan()
            each = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(nan=0.0), reduction="none")
            loss = _mean(mean_of_known(each, known), weight)
            return {"val/loss": loss, **multilabel_scores(logits, labels, self.task.threshold)}
        loss = _mean(RegressionLoss(self.task)(logits, self._learned(labels)), weight)
        return {"val/loss": loss, **regression_scores(self.values(logits), labels)}

    def values(self, logits: Tensor) -> Tensor:
        """Numbers in the units of their labels, (B, K) float64."""
        return logits.double() * self.value_std + self.value_mean

    def scores_and_predictions(self, forward: Forward, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The scores, and the most likely class of each image, (B,) int64.

        batch["labels"]: (B,), or (B, L) where an image has up to L right classes, filled up with -1.  A prediction is
        right when it is one of them; the loss is of their joint probability.  An image with a logit that is no number
        is taken for another class than its own.
        """
        logits = self._logits(forward, batch)
        labels, weight = batch["labels"].to(logits.device), batch["weight"].to(logits.device)
        labels = labels.view(len(logits), -1)  # (B, L)
        ranking = logits.topk(min(5, self.num_classes), dim=1).indices  # (B, 5)
        hits = (ranking.unsqueeze(2) == labels.unsqueeze(1)).any(dim=2)
        lost = logits.isnan().any(dim=1)  # topk would rank nan first
        hits &= ~lost.unsqueeze(1)
        log_p = logits.log_softmax(dim=1).gather(1, labels.clamp(min=0)).masked_fill(labels < 0, float("-inf"))
        scores = {
            "val/loss": _mean(-log_p.logsumexp(dim=1), weight),
            "val/top1": 100 * _mean(hits[:, 0].float(), weight),
            "val/top5": 100 * _mean(hits.any(dim=1).float(), weight),
        }
        return scores, torch.where(lost, (labels[:, 0].clamp(min=0) + 1) % self.num_classes, ranking[:, 0])

    def probabilities(self, forward: Forward, batch: Batch) -> Tensor:
        """Of each class, (B, num_classes) float32."""
        return self._logits(forward, batch).softmax(dim=1)

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Of an evaluation batch, (B, classes) float32; of several views those of the mean probabilities, or the mean
        number.  A forward pass per view: every rank makes equally many, and none is of more than a micro-batch.
        """
        views = self._views(batch)
        if not self.flip and len(views) == 1:
            logits: Tensor = forward(images=self.normalise(views[0])).float()
            return logits
        views += tuple(view.flip(-1) for view in views) if self.flip else ()
        each = torch.stack([forward(images=self.normalise(view)).float() for view in views])
        if self.task.target == "regression":
            return each.mean(dim=0)
        if self.task.target == "multilabel":
            applies, not_so = (x.sigmoid().mean(dim=0).clamp(min=TINY).log() for x in (each, -each))
            return applies - not_so
        return each.softmax(dim=2).mean(dim=0).clamp(min=TINY).log()

    @staticmethod
    def answer_columns(task: ClassifyConfig, top_k: int) -> Columns:
        """The best classes, each with its name and probability; the classes that apply; or the numbers."""
        if task.target == "regression":
            return Values.columns(task.num_classes)
        if task.target == "multilabel":
            return Classes.columns(task.num_classes)
        return Prediction.columns(min(top_k, task.num_classes))

    def answers(self, forward: Forward, batch: Batch, ask: Ask) -> Sequence[Prediction | Classes | Values]:
        if self.task.target == "regression":
            return Values.of(self.values(self._logits(forward, batch)))
        if self.task.target == "multilabel":
            return Classes.of(self._logits(forward, batch).sigmoid(), self.task.threshold, ask)
        return Prediction.of(self.probabilities(forward, batch), ask)

    def overlay(self, batch: Batch, number: int, answer: Any, names: Sequence[str] | None) -> None:
        return

    def evidence(self, outputs: Tensor, number: int | None, name: Callable[[int], str]) -> list[Evidence]:
        """Logits of the likeliest class, of the classes that apply (or the likeliest), or the numbers."""
        logits = outputs[0].float()  # (classes,)
        check_finite(logits)
        numbers = [number] if number is not None else self._said(logits)
        if self.task.target == "regression":
            values = self.values(logits.detach())
            return [Evidence(f"value {name(each)}: {float(values[each]):.4g}", logits[each]) for each in numbers]
        shares = logits.detach().softmax(0) if self.task.target == "single" else logits.detach().sigmoid()
        return [Evidence(f"{name(each)}: {100 * float(shares[each]):.1f} %", logits[each]) for each in numbers]

    def _said(self, logits: Tensor) -> list[int]:
        if self.task.target == "regression":
            return list(range(min(len(logits), MOST_EVIDENCE)))
        order: list[int] = logits.argsort(descending=True, stable=True)[:MOST_EVIDENCE].tolist()
        if self.task.target == "single":
            return order[:1]
        return [each for each in order if float(logits[each].sigmoid()) > self.task.threshold] or order[:1]

    def features(self, forward: Forward, batch: Batch) -> Tensor:
        views = self._views(batch)
        pooled: Tensor = sum(forward(images=self.normalise(view), features=True) for view in views) / len(views)
        return pooled

    def _views(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) or clips (B, 3, T, H, W), one for each view in which they are seen."""
        images: Tensor = batch["images"]
        return images.unbind(1) if images.ndim > self.one_view_dims else (images,)

    def _picture(self, forward: Forward, batch: Batch, names: Sequence[str] | None = None) -> np.ndarray:
        """The first clips of a batch, their middle view, below what they are and what they were taken for."""
        few = {**batch, "images": batch["images"][:PICTURE_CLIPS]}
        views = self._views(few)
        right: list[list[int]] = [[] for _ in few["images"]]
        if "labels" in batch:
            labels = batch["labels"][:PICTURE_CLIPS].view(len(right), -1).tolist()
            right = [[label for label in row if label >= 0] for row in labels]
        return clip_picture(views[len(views) // 2], right, self.probabilities(forward, few), names)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1e-12)
