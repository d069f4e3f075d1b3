"""Object detection and instance segmentation: the box, class and mask of every object, by R-CNNs on an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError, DetectConfig, pair
from swinv2_train.data.class_names import check_class_count
from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.data.sample import OBJECTS, SEGMENTATION
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.models.detection.multiply_adds import rcnn_multiply_adds
from swinv2_train.models.detection.rcnn import RCNN, RPNSettings
from swinv2_train.models.detection.roi import CASCADE, ONE_STAGE, RoISettings
from swinv2_train.models.detection.semantic import LEVEL
from swinv2_train.models.detection.suppress import Suppression
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.tasks.answers import Ask, Columns, DetectedObjects
from swinv2_train.tasks.detect_picture import (
    detect_picture,
    draw_objects,
    enlarged,
    found_objects,
    right_objects,
    seen_of,
)
from swinv2_train.tasks.detect_views import DetectTransform
from swinv2_train.tasks.detection_scores import DETECTIONS, check_installed, detection_records
from swinv2_train.tasks.detections import Found
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import Normalise, meta_images, neutral_values, picture_bands, viewable
from swinv2_train.tasks.metrics import Metric
from swinv2_train.tasks.paste import pasted
from swinv2_train.tasks.task import Batch, Forward

TARGETS = ("boxes", "classes", "crowd", "draw")
"""What the module learns from, beside masks and labels of pixels."""
PICTURE_IMAGES = 4


def build_rcnn(config: Config, task: DetectConfig) -> RCNN:
    """The detector that the configuration describes.  Raises ConfigError for numbers that do not fit together."""
    cascade = task.head == "cascade_mask_rcnn"
    rpn = RPNSettings(
        per_level=task.level_proposals,
        number=task.proposals,
        eval_number=task.eval_proposals,
        inside_only=cascade,
        beta=1 / 9 if cascade else 0.0,
    )
    roi = RoISettings(
        stages=CASCADE if cascade else ONE_STAGE,
        num_classes=task.num_classes,
        convs=4 if (task.box_head or ("conv" if cascade else "fc")) == "conv" else 0,
        norm=task.head_norm,
        width=task.head_width,
        class_agnostic=task.class_agnostic,
        box_loss=task.box_loss or ("giou" if cascade else "l1"),
        masks=task.masks,
        box_samples=task.box_samples,
        mask_samples=task.mask_samples,
        interleaved=task.interleaved,
        mask_flow=task.mask_flow,
        semantic_classes=task.semantic_classes,
    )
    suppression = Suppression(task.detections, task.score_threshold, task.nms_iou, task.soft_nms)
    try:
        return RCNN(
            build_model(config.model, num_classes=0), rpn, roi, suppression, task.head_channels,
            task.semantic_weight,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error


class DetectTask:
    """The losses of proposals, boxes, classes and masks; average precision over all objects of all images."""

    block_types = (SwinBlock,)
    predictions = None
    evidence = "a detector's scores are of single boxes, which are cut out of several maps; it is not made for them"

    def __init__(self, config: Config, task: DetectConfig, device: torch.device) -> None:
        self.module = build_rcnn(config, task)
        self.encoder = self.module.encoder
        self.multiply_adds = rcnn_multiply_adds(self.module)
        self.task = task
        self.normalise = Normalise.of(config, device)
        self.picture_bands = picture_bands(config)
        self.bands = Bands.of(config)
        img_size = pair("model.img_size", config.model.img_size)
        fill = neutral_values(config)
        semantic = (SEGMENTATION,) if task.semantic_classes else ()
        self.train_transform, self.eval_transform = (
            DetectTransform(
                config.data,
                img_size,
                train,
                needs=needs,
                bands=self.bands,
                task=task,
                fill=fill,
                cell=self.module.strides[LEVEL],
            )  # fmt: skip
            for train, needs in ((True, (OBJECTS, *semantic)), (False, (OBJECTS,)))
        )

    @staticmethod
    def preflight(task: DetectConfig) -> None:
        """Masks and average precision need faster-coco-eval."""
        check_installed()

    @staticmethod
    def check_source(task: DetectConfig, source: Source, key: str) -> None:
        """The model has a class for every name."""
        check_class_count(source.classes, key, task.num_classes)

    def begin(self, source: Source | Stream, names: tuple[str, ...] | None) -> None:
        """The loss depends on nothing of theirs."""

    def notes(self, source: Source | Stream) -> Iterable[str]:
        """None."""
        return ()

    def meta_batch(self, size: int) -> dict[str, Tensor]:
        """Crops and objects without contents."""
        (height, width), count = self.encoder.img_size, self.task.max_objects

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, *shape, dtype=dtype, device="meta")

        batch = {
            **meta_images(size, self.encoder.img_size, self.bands),
            "boxes": empty(count, 4, dtype=torch.float32),
            "classes": empty(count, dtype=torch.int64),
            "crowd": empty(count, dtype=torch.bool),
            "extent": empty(2, dtype=torch.int64),
            "draw": empty(dtype=torch.int64),
        }
        if self.task.semantic_classes:
            cell = self.module.strides[LEVEL]
            batch["semantic"] = empty(-(-height // cell), -(-width // cell), dtype=torch.uint8)
        if self.task.masks:
            batch["masks"] = empty(count, height, -(-width // 8), dtype=torch.uint8)
        return batch

    # ----------------------------------------------------------------------------------------------------------------
    # Training

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        task = self.task
        names = (*TARGETS, *(("masks",) if task.masks else ()), *(("semantic",) if task.semantic_classes else ()))
        targets = {name: batch[name] for name in names}
        outputs: dict[str, Tensor] = forward(images=self._views(batch), extent=batch["extent"], **targets)
        losses = outputs["losses"].sum(dim=1)
        weight = batch["weight"].to(losses.device)
        if "sources" in batch:
            batch["image_losses"] = losses.detach(), weight
        return (losses * weight).sum() / weight.sum().clamp(min=1e-12)

    def count(self, batch: Batch) -> float:
        return float(batch["weight"].sum())

    def _views(self, batch: Batch) -> Tensor:
        """The normalised crops, 0 where they are padding: (B, C, H, W)."""
        images = self.normalise(batch["images"])
        extent = batch["extent"].to(images.device)
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
        within = (rows < extent[:, :1]).unsqueeze(2) & (columns < extent[:, 1:]).unsqueeze(1)
        return images.masked_fill(~within.unsqueeze(1), 0)

    # ----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def scores(self, forward: Forward, batch: Batch) -> Mapping[str, Metric]:
        """Every image takes as many forward passes as any other, and one that does not count takes them too."""
        rows: list[Found | None] = []
        for number, weight in enumerate(batch["weight"].tolist()):
            found = self.found(forward, batch["views"][number], batch["size"][number], counts=weight > 0)
            rows.append(found if weight > 0 else None)
        images = (batch["image_id"], batch["size"], batch["truth"], rows)
        return {DETECTIONS: detection_records(*images, self.task.num_classes, self.task.masks)}

    def found(self, forward: Forward, views: list[np.ndarray], size: tuple[int, int], counts: bool = True) -> Found:
        """What the model finds in an image of (height, width), seen in views (C, h, w) of several sizes.

        An image that does not count is seen as a black one, in as many passes.  Several views are joined as
        detectron2 joins them: all their boxes compete, and the masks of those that are left are averaged.
        """
        seen = [self._seen(view if counts else None) for view in views]
        if not self.several:
            outputs = forward(images=seen[0], extent=_extent(seen[0]))
            return self._of_image(outputs, outputs.get("masks"), (seen[0].shape[2], seen[0].shape[3]), size)
        flips = (False, True)[: 1 + self.task.eval_flip]
        each = [(view.flip(3) if flip else view, flip) for view in seen for flip in flips]
        boxes, scores = [], []
        for view, flip in each:
            outputs = forward(images=view, extent=_extent(view), suppress=False)
            boxes.append(_moved(outputs["boxes"], view, flip, size))
            scores.append(outputs["scores"])
        joined = self.module.suppression(torch.cat(boxes, dim=1), torch.cat(scores, dim=1))
        masks = []
        for view, flip in each if self.task.masks else ():
            own = _moved_back(joined.boxes, view, flip, size)
            outputs = forward(images=view, extent=_extent(view), boxes=own, classes=joined.classes)
            masks.append(outputs["masks"].flip(3) if flip else outputs["masks"])
        mean = torch.stack(masks).mean(dim=0) if masks else None
        return self._of_image(joined._asdict(), mean, size, size)

    @property
    def several(self) -> bool:
        """Whether an image is seen more than once."""
        return len(self.task.eval_scales) > 1 or self.task.eval_flip

    def picture(self, forward: Forward, batch: Batch, names: Sequence[str] | None = None) -> np.ndarray:
        """The first images of a batch of either kind: their right objects beside those that are found, with scores."""
        rows = []
        for number in range(min(PICTURE_IMAGES, len(batch["weight"]))):
            view, size = seen_of(batch, number)
            found = self.found(forward, [view.cpu().numpy()], size)
            image = enlarged(viewable(view, self.bands, self.picture_bands), size)
            rows.append((image, right_objects(batch, number), found_objects(found)))
        return detect_picture(rows, names or self.task.class_names)

    @staticmethod
    def answer_columns(task: DetectConfig, top_k: int) -> Columns:
        """The size of the image and the objects in it."""
        return DetectedObjects.columns()

    def answers(self, forward: Forward, batch: Batch, ask: Ask) -> list[DetectedObjects | None]:
        found: list[DetectedObjects | None] = []
        rows = zip(batch["views"], batch["size"], batch["image_id"], batch["weight"].tolist(), strict=True)
        for views, size, image_id, weight in rows:
            found.append(
                DetectedObjects.of(self.found(forward, views, size), size, image_id, ask) if weight > 0 else None
            )
        return found

    def overlay(self, batch: Batch, number: int, answer: DetectedObjects, names: Sequence[str] | None) -> np.ndarray:
        view, size = seen_of(batch, number)
        image = enlarged(viewable(view, self.bands, self.picture_bands), size)
        return draw_objects(image, found_objects(answer.found), names)

    def features(self, forward: Forward, batch: Batch) -> Tensor:
        outputs: dict[str, Tensor] = forward(images=self.normalise(batch["images"]), features=True)
        return outputs["features"]

    def _seen(self, view: np.ndarray | None) -> Tensor:
        """One normalised view, (1, C, h, w); of an image that does not count, of the least size."""
        if view is None:
            side = self.module.strides[-2]
            return torch.zeros(1, self.encoder.in_chans, side, side, device=self.normalise.mean.device)
        return self.normalise(torch.from_numpy(view).unsqueeze(0))

    def _of_image(
        self, outputs: Mapping[str, Tensor], masks: Tensor | None, seen: tuple[int, int], size: tuple[int, int]
    ) -> Found:
        """Detections of the one image of a batch, from pixels of a view to those of the image."""
        there = outputs["classes"][0] >= 0
        boxes = outputs["boxes"][0][there] * _factors(seen, size, outputs["boxes"].device)
        lengths = None
        if masks is not None:
            lengths = [encode_mask(each) for each in pasted(masks[0][there], boxes, size)]
        return Found(
            boxes.cpu().numpy(), outputs["scores"][0][there].cpu().numpy(), outputs["classes"][0][there].cpu().numpy(),
            lengths, bool(outputs["finite"][0]),
        )  # fmt: skip


def _extent(view: Tensor) -> Tensor:
    return torch.tensor([view.shape[2:]], device=view.device)


def _factors(old: tuple[int, int], new: tuple[int, int], device: torch.device) -> Tensor:
    """Of the coordinates of boxes from one image size (height, width) to another: (4,)"""
    y, x = new[0] / old[0], new[1] / old[1]
    return torch.tensor([x, y, x, y], device=device)


def _moved(boxes: Tensor, view: Tensor, flip: bool, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) of a view, maybe mirrored, to those of the image."""
    height, width = view.shape[2], view.shape[3]
    boxes = _mirrored(boxes, width) if flip else boxes
    return boxes * _factors((height, width), size, boxes.device)


def _moved_back(boxes: Tensor, view: Tensor, flip: bool, size: tuple[int, int]) -> Tensor:
    """The other way round."""
    height, width = view.shape[2], view.shape[3]
    boxes = boxes * _factors(size, (height, width), boxes.device)
    return _mirrored(boxes, width) if flip else boxes


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    """Boxes (..., 4) of an image of this width in its mirror image."""
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=-1)
