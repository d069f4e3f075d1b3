"""Semantic segmentation: the class of every pixel, by UPerNet on a pre-trained encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError, SegmentConfig, pair
from swinv2_train.data.class_names import check_class_count
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.label_values import check_source_values
from swinv2_train.data.sample import SEGMENTATION, Targets
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.data.transforms.label_image import check_sizes, class_numbers, label_dtype, read_label_image
from swinv2_train.data.transforms.segment import SegmentTrainView, eval_image
from swinv2_train.distributed import all_reduce_max, sum_with_gradient
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.models.upernet import UPerNet, upernet_multiply_adds
from swinv2_train.tasks.answers import MOST_EVIDENCE, Ask, ClassMap, Columns, Evidence, check_finite
from swinv2_train.tasks.dense_scores import Box, View, bands, tiles
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import ImageTransform, Normalise, meta_images, neutral_values, picture_bands, viewable
from swinv2_train.tasks.metrics import CONFUSION, Mean, Metric, Sums
from swinv2_train.tasks.pixel_loss import PixelLoss
from swinv2_train.tasks.segment_picture import overlay_picture, segment_picture
from swinv2_train.tasks.task import Batch, Forward

PICTURE_IMAGES = 4
TINY = 1e-38
"""The least probability that a logarithm is taken of."""


@dataclass(frozen=True, kw_only=True)
class SegmentTransform(ImageTransform):
    """An image and the classes of its pixels.

    For training a view of both: {"images": (C, H, W), "labels": uint8 or int32 (H, W), "extent": int64 (2,)}, the last
    being the rows and columns that are of the image and no padding.  For evaluation they keep their own size, so they
    are plain: {"views": [(C, h, w) of each of task.eval_scales], "size": (H, W)}, and "labels": (H, W) where these are
    needed.
    """

    task: SegmentConfig
    needs: tuple[str, ...] = (SEGMENTATION,)
    fill: tuple[float, ...]
    """The value of each band that is 0 when normalised."""

    def __call__(self, image: Tensor | Clip, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        assert isinstance(image, Tensor), "label images are of images"
        task, data = self.task, self.data
        row: dict[str, Any] = {}
        if not self.train:
            sides = ((int(task.resize_long_px * s), int(task.resize_short_px * s)) for s in task.eval_scales)
            row["views"] = [eval_image(image, *each, task.resize).numpy() for each in sides]
            row["size"] = (image.shape[1], image.shape[2])
            if SEGMENTATION not in self.needs:
                return row
        values = read_label_image(targets["segmentation"])
        check_sizes(values.shape[:2], (image.shape[1], image.shape[2]))
        labels = class_numbers(values, task.num_classes, task.reduce_zero_label, task.ignore_index)
        if not self.train:
            return {**row, "labels": labels}
        view = SegmentTrainView(
            size=self.img_size,
            long_px=task.resize_long_px,
            short_px=task.resize_short_px,
            scale=(task.resize_scale[0], task.resize_scale[1]),
            resize=task.resize,
            max_share=task.crop_max_category_share,
            flip=data.hflip,
            dihedral=data.dihedral,
            photometric=task.photometric,
            ignore_index=task.ignore_index,
            fill=self.fill,
        )
        images, cut, extent = view(image, torch.from_numpy(labels), rng)
        return {"images": images.contiguous(), "labels": cut.contiguous(), "extent": extent}


class _Piece(NamedTuple):
    """Tiles of one view that the model sees in one forward pass."""

    view: int
    mirrored: bool
    boxes: list[Box]


class SegmentTask:
    """Cross-entropy of every pixel, of both heads; IoU and accuracy of classes over all pixels of all images."""

    block_types = (SwinBlock,)
    predictions = None

    def __init__(self, config: Config, task: SegmentConfig, device: torch.device) -> None:
        self.encoder = build_model(config.model, num_classes=0)
        total = sum_with_gradient if task.head_norm == "sync_batch" else None
        try:
            self.module = UPerNet(
                self.encoder, task.num_classes, task.head_channels, task.aux_channels, task.dropout, task.head_norm,
                total, task.map_norms,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"task: {error}") from error
        self.multiply_adds = upernet_multiply_adds(self.module)
        self.task = task
        self.pixel_loss = PixelLoss(task.loss_denominator, task.ignore_index, task.class_weights)
        self.tile, self.stride = task.tile_and_stride(config)
        self.most_tiles = config.train.micro_batch_size
        """In one forward pass of evaluation."""
        self.normalise = Normalise.of(config, device)
        self.bands = Bands.of(config)
        img_size = pair("model.img_size", config.model.img_size)
        fill = neutral_values(config)
        self.train_transform, self.eval_transform = (
            SegmentTransform(config.data, img_size, train, bands=self.bands, task=task, fill=fill)
            for train in (True, False)
        )
        self.picture_bands = picture_bands(config)

    @staticmethod
    def preflight(task: SegmentConfig) -> None:
        """Nothing more than torch is needed."""

    @staticmethod
    def check_source(task: SegmentConfig, source: Source, key: str) -> None:
        """The model has a class for every name and for every value of the label images."""
        check_class_count(source.classes, key, task.num_classes)
        check_source_values(source, key, task.num_classes, task.reduce_zero_label, task.ignore_index)

    def begin(self, source: Source | Stream, names: tuple[str, ...] | None) -> None:
        """The loss depends on nothing of theirs."""

    def notes(self, source: Source | Stream) -> tuple[str, ...]:
        """None."""
        return ()

    def meta_batch(self, size: int) -> dict[str, Tensor]:
        """Views and labels without contents."""
        dtype = torch.from_numpy(np.zeros(0, label_dtype(self.task.ignore_index))).dtype
        labels = torch.empty(size, *self.encoder.img_size, dtype=dtype, device="meta")
        extent = torch.empty(size, 2, dtype=torch.int64, device="meta")
        return {**meta_images(size, self.encoder.img_size, self.bands), "labels": labels, "extent": extent}

    # ----------------------------------------------------------------------------------------------------------------
    # Training

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        outputs: dict[str, Tensor] = forward(images=self._views(batch))
        device = outputs["logits"].device
        labels, weight = batch["labels"].to(device).long(), batch["weight"].to(device)
        sums = self.pixel_loss.sums(outputs["logits"], labels)
        if "auxiliary" in outputs:
            sums = sums + self.task.aux_weight * self.pixel_loss.sums(outputs["auxiliary"], labels)
        counts = self.pixel_loss.counts(labels).to(sums.dtype)
        if "sources" in batch:
            batch["image_losses"] = (sums / counts.clamp(min=1e-12)).detach(), self._counted(counts, weight)
        return (sums * weight).sum() / (counts * weight).sum().clamp(min=1e-12)

    def count(self, batch: Batch) -> float:
        weight = batch["weight"]
        if not self.pixel_loss.valid:
            return float(weight.sum())
        return float((self.pixel_loss.counts(batch["labels"].long()) * weight.to(batch["labels"].device)).sum())

    def _counted(self, counts: Tensor, weight: Tensor) -> Tensor:
        """What each image counts, as count adds it up: (B,)."""
        return counts * weight if self.pixel_loss.valid else weight

    def _views(self, batch: Batch) -> Tensor:
        """The normalised views, 0 where they are padding: (B, C, H, W)."""
        images, extent = self.normalise(batch["images"]), batch["extent"]
        for axis, side in ((2, 0), (3, 1)):
            places = torch.arange(images.shape[axis], device=images.device)
            outside = places >= extent[:, side].to(images.device).unsqueeze(1)  # (B, H or W)
            images = images.masked_fill(outside.view(len(images), 1, *((-1, 1) if side == 0 else (1, -1))), 0)
        return images

    # ----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def scores(self, forward: Forward, batch: Batch) -> dict[str, Metric]:
        """The model sees tiles of one image at a time, as many as its sizes ask for, so that nothing depends on the
        other images of a batch; ranks that have fewer see tiles without contents until all have seen equally many.
        """
        classes = self.task.num_classes
        matrix = torch.zeros(len(batch["labels"]), classes, classes, dtype=torch.int64)
        loss, pixels, passes = torch.zeros((), dtype=torch.float64), 0, 0
        images = [number for number, weight in enumerate(batch["weight"].tolist()) if weight > 0]
        planned = {number: self._pieces(batch["views"][number]) for number in images}
        agreed = all_reduce_max(sum(map(len, planned.values())))
        for number in images:
            views = self._seen(forward, batch["views"][number], planned[number])
            passes += len(planned[number])
            matrix[number], each, valid = self._compared(views, batch["labels"][number])
            loss, pixels = loss + each, pixels + valid
        for _ in range(agreed - passes):
            forward(images=self._nothing())
        value = loss / max(pixels, 1)
        return {
            "val/loss": Mean(value, torch.tensor(float(pixels), dtype=torch.float64)),
            CONFUSION: Sums(matrix, segmentation_scores),
        }

    @staticmethod
    def answer_columns(task: SegmentConfig, top_k: int) -> Columns:
        """The size of the image and the classes that occur."""
        return ClassMap.columns()

    def answers(self, forward: Forward, batch: Batch, ask: Ask) -> list[ClassMap | None]:
        found: list[ClassMap | None] = []
        for views, size, weight in zip(batch["views"], batch["size"], batch["weight"].tolist(), strict=True):
            found.append(
                ClassMap.of(self._named(self._seen(forward, views, self._pieces(views)), size), ask)
                if weight > 0
                else None
            )
        return found

    def overlay(self, batch: Batch, number: int, answer: ClassMap, names: Sequence[str] | None) -> np.ndarray:
        image = viewable(torch.from_numpy(batch["views"][number][0]), self.bands, self.picture_bands)
        return overlay_picture(image, answer.classes, self.task.ignore_index, names)

    def evidence(self, outputs: dict[str, Tensor], number: int | None, name: Callable[[int], str]) -> list[Evidence]:
        """A class's logits, summed over the pixels that get it (arXiv:2002.11434): of the commonest classes, or of the
        one that is asked for, over all pixels where none gets it.
        """
        logits = outputs["logits"][0].float()  # (K, h, w)
        check_finite(logits)
        named = logits.argmax(dim=0)
        counts = torch.bincount(named.flatten(), minlength=len(logits))  # (K,)
        order = counts.argsort(descending=True, stable=True)[:MOST_EVIDENCE]
        found = []
        for each in [number] if number is not None else [int(one) for one in order if counts[one]]:
            share = 100 * int(counts[each]) / named.numel()
            pixels = named == each if counts[each] else torch.ones_like(named, dtype=torch.bool)
            found.append(Evidence(f"{name(each)}: {share:.1f} % of the pixels", logits[each][pixels].sum()))
        return found

    def _named(self, views: list[View], size: tuple[int, int]) -> np.ndarray:
        """The likeliest class of each pixel, (H, W) int64."""
        parts = []
        for _, probabilities in bands(views, size):
            check_finite(probabilities)
            parts.append(probabilities.argmax(dim=0).cpu())
        found: np.ndarray = torch.cat(parts).numpy()
        return found

    def features(self, forward: Forward, batch: Batch) -> Tensor:
        outputs: dict[str, Tensor] = forward(images=self.normalise(batch["images"]), features=True)
        return outputs["features"]

    def _pieces(self, views: Sequence[np.ndarray]) -> list[_Piece]:
        """The forward passes that an image takes: a function of the sizes of its views alone."""
        tile = self.tile if self.task.eval_mode == "slide" else None
        found = []
        for number, view in enumerate(views):
            boxes = tiles((view.shape[1], view.shape[2]), tile, self.stride)
            for mirrored in (False, True)[: 1 + self.task.eval_flip]:
                for first in range(0, len(boxes), self.most_tiles):
                    found.append(_Piece(number, mirrored, boxes[first : first + self.most_tiles]))
        return found

    def _seen(self, forward: Forward, views: Sequence[np.ndarray], pieces: Sequence[_Piece]) -> list[View]:
        """What the model says of an image's views."""
        found: dict[tuple[int, bool], tuple[list[Box], list[Tensor]]] = {}
        for piece in pieces:
            image = torch.from_numpy(views[piece.view])
            image = image.flip(2) if piece.mirrored else image
            seen = torch.stack([image[:, b.top : b.bottom, b.left : b.right] for b in piece.boxes])
            outputs: dict[str, Tensor] = forward(images=self.normalise(seen))
            boxes, scores = found.setdefault((piece.view, piece.mirrored), ([], []))
            boxes += piece.boxes
            scores += outputs["logits"].float().unbind()
        return [View(views[view].shape[1:], *each, mirrored) for (view, mirrored), each in found.items()]

    def _compared(self, views: list[View], truth: np.ndarray) -> tuple[Tensor, Tensor, int]:
        """An image's pixels by right and predicted class, (K, K) int64; their losses' sum, () float64; their number."""
        classes = self.task.num_classes
        labels = torch.from_numpy(truth)
        matrix, loss = torch.zeros(classes**2, dtype=torch.int64), torch.zeros((), dtype=torch.float64)
        for first, probabilities in bands(views, (labels.shape[0], labels.shape[1])):
            right = labels[first : first + probabilities.shape[1]].to(probabilities.device).long()
            counts = right != self.task.ignore_index
            right, said = right[counts], probabilities[:, counts]  # (n,), (K, n)
            chosen = said.gather(0, right.unsqueeze(0))
            # where scores are NaN, all are, and the highest would be class 0
            named = torch.where(chosen[0].isnan(), (right + 1) % classes, said.argmax(dim=0))
            matrix += torch.bincount(right * classes + named, minlength=classes**2).cpu()
            loss -= chosen.clamp(min=TINY).log().sum(dtype=torch.float64).cpu()
        return matrix.view(classes, classes), loss, int(matrix.sum())

    def _nothing(self) -> Tensor:
        """A tile without contents."""
        return torch.zeros(1, self.encoder.in_chans, *self.encoder.img_size, device=self.normalise.mean.device)

    # ----------------------------------------------------------------------------------------------------------------
    # Pictures

    def picture(self, forward: Forward, batch: Batch, names: Sequence[str] | None = None) -> np.ndarray:
        """The first images of a batch of either kind: image, right classes, predicted classes, and what colours say."""
        rows = []
        for image, truth in self._shown(batch):
            outputs: dict[str, Tensor] = forward(images=self.normalise(image.unsqueeze(0)))
            size = (image.shape[1], image.shape[2])
            view = View(size, [Box(0, 0, *size)], [outputs["logits"][0].float()], mirrored=False)
            said = torch.cat([each.argmax(dim=0) for _, each in bands([view], size)])
            rows.append((viewable(image, self.bands, self.picture_bands), truth, said.cpu().numpy()))
        count = self.task.num_classes
        known = names if names is not None and len(names) >= count else self.task.class_names
        return segment_picture(rows, count, self.task.ignore_index, known)

    def _shown(self, batch: Batch) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Images (C, H, W) as they are read, and their labels, of any size; equally many on every rank."""
        for number in range(min(PICTURE_IMAGES, len(batch["labels"]))):
            if "views" in batch:
                yield torch.from_numpy(batch["views"][number][0]), batch["labels"][number]
            else:
                yield batch["images"][number], batch["labels"][number].cpu().numpy()


def segmentation_scores(matrix: Tensor) -> dict[str, float]:
    """mIoU, mean accuracy of classes and share of right pixels, in percent, of pixels by right and predicted class.

    matrix: (K, K) whole numbers.  A class that is neither there nor predicted counts in no mean, one that is only
    predicted has an IoU of 0 and no accuracy.  nan without any pixel.  Source: mmsegmentation's IoUMetric.
    """
    iou, accuracy = class_scores(matrix)
    counts = matrix.double()
    return {
        "val/miou": float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan"),
        "val/macc": float(np.nanmean(accuracy)) if not np.isnan(accuracy).all() else float("nan"),
        "val/aacc": float(100 * counts.diagonal().sum() / counts.sum()),
    }


def class_scores(matrix: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """IoU and accuracy of each class in percent, (K,) float64, nan where there is nothing to divide by."""
    counts = matrix.cpu().numpy().astype(np.float64)
    right, true, said = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return 100 * right / (true + said - right), 100 * right / true
