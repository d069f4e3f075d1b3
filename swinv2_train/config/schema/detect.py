"""task=detect: boxes, and masks, of the objects of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.rules import at_least, between, each, low_high, one_of, positive
from swinv2_train.config.schema.config import Config
from swinv2_train.config.schema.pixel_task import PixelTaskConfig

COCO_SCORES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""COCO's twelve numbers: average precision and recall, in percent."""


@dataclass
class DetectConfig(PixelTaskConfig):
    head: Annotated[str, one_of("mask_rcnn", "cascade_mask_rcnn")]
    """mask_rcnn (arXiv:1703.06870), or cascade_mask_rcnn: three stages that refine boxes (arXiv:1906.09756)."""
    masks: bool
    """Also find the mask of each object; False: boxes alone."""
    num_classes: Annotated[int, at_least(1)]
    """Classes of objects; background is none of them."""
    class_names: list[str] | None
    """What the classes are called in pictures, tables and exports, a name per class; null = by their numbers."""
    max_objects: Annotated[int, at_least(1)]
    """Objects of a training crop that are learnt from; of more, the largest (COCO has at most about 93 an image)."""
    box_head: Annotated[str | None, one_of("fc", "conv")]
    """fc (two fully connected layers) or conv (four convolutions and one); null = the published one of task.head."""
    head_norm: Annotated[str, one_of("layer", "group", "none")]
    """Norm behind the convolutions of box heads: layer (over channels), group or none."""
    head_channels: Annotated[int, at_least(1)]
    """Channels of the pyramid and of all heads (256)."""
    head_width: Annotated[int, at_least(1)]
    """Width of the fully connected layers (1024)."""
    class_agnostic: bool
    """A box is refined in the same way for every class; otherwise for each class in its own."""
    box_loss: Annotated[str | None, one_of("l1", "smooth_l1", "giou")]
    """Loss of refined boxes: l1, smooth_l1 or giou (arXiv:1902.09630); null = l1 of mask_rcnn, giou of the cascade."""
    interleaved: bool
    """HTC: a mask stage sees the boxes that the box stage before it has refined (arXiv:1901.07518)."""
    mask_flow: bool
    """HTC: a mask head takes the features of the one before it."""
    semantic_classes: Annotated[int, between(0, 255)]
    """HTC: a semantic branch of so many classes of pixels, learnt from label images (COCO-stuff: 183); 0 = none."""
    semantic_weight: Annotated[float, positive()]
    """Weight of its loss (0.2)."""
    level_proposals: Annotated[int, at_least(1)]
    """Training: the best anchors of each map that are thinned out to proposals (2000)."""
    proposals: Annotated[int, at_least(1)]
    """Training: boxes of an image that the heads choose from (mask_rcnn 1000, cascades 2000)."""
    eval_proposals: Annotated[int, at_least(1)]
    """Evaluation: both of these (1000)."""
    box_samples: Annotated[int, at_least(4)]
    """Boxes of an image that each box head learns from, at most a quarter of which hold an object (512)."""
    mask_samples: Annotated[int, at_least(1)]
    """Boxes of an image that each mask head learns from (128)."""
    detections: Annotated[int, at_least(1)]
    """Objects that are found in an image, at most (100)."""
    score_threshold: Annotated[float, between(0, 1)]
    """A detection has a higher score than this (0.05; HTC 0.001)."""
    nms_iou: Annotated[float, between(0, 1)]
    """Of detections of one class that overlap by a higher IoU, the best is left (0.5)."""
    soft_nms: Annotated[str, one_of("none", "linear", "gaussian")]
    """Or their scores are lowered (arXiv:1704.04503), by 1 - IoU or exp(-IoU^2 / 0.5); none = they are removed."""
    resize: Annotated[str, one_of("opencv", "antialias")]
    """Bilinear resize of images: antialias (as Pillow) or opencv (no antialiasing)."""
    min_object_px: Annotated[float, positive()]
    """Training: an object of which less than this is left in a crop, in either direction, is left out (1)."""
    resize_scale: Annotated[list[float], low_high(math.inf)]
    """Training: an image is fitted into model.img_size, times a number drawn between these; then that size is cut."""
    eval_long_px: Annotated[int, at_least(1)]
    """Evaluation: images are resized, their shape kept, to fit into eval_long_px x eval_short_px, either way round."""
    eval_short_px: Annotated[int, at_least(1)]
    """The shorter of these two sides."""
    eval_scales: Annotated[list[float], each(positive())]
    """Evaluation: sizes whose detections are joined, as factors of eval_long_px and eval_short_px ([1.0] = one)."""
    eval_flip: bool
    """Evaluation: join those of the mirrored image too."""

    implementation: ClassVar[str] = "swinv2_train.tasks.detect:DetectTask"
    takes_fitting_heads: ClassVar[bool] = True
    scores: ClassVar[tuple[str, ...]] = tuple(f"val/{kind}_{name}" for kind in ("box", "mask") for name in COCO_SCORES)

    def identity(self) -> dict[str, Any]:
        """What shapes the heads."""
        heads = ("head", "masks", "num_classes", "class_agnostic", "mask_flow", "semantic_classes")
        shaping = (*heads, "box_head", "head_norm", "head_channels", "head_width")
        return {f"task.{key}": getattr(self, key) for key in shaping}

    def check(self, config: Config) -> None:
        """Names, sizes and switches fit each other."""
        super().check(config)
        if not self.masks and (config.train.keep_best or "").startswith("val/mask_"):
            raise ConfigError(
                f"train.keep_best ({config.train.keep_best}) is of masks, and task.masks is false; set "
                "train.keep_best=val/box_ap, or task.masks=true"
            )
        if self.eval_short_px > self.eval_long_px:
            raise ConfigError(
                f"task.eval_short_px ({self.eval_short_px}) is more than task.eval_long_px ({self.eval_long_px}); "
                "exchange them"
            )
        if not self.eval_scales:
            raise ConfigError("task.eval_scales is empty; name a scale: task.eval_scales=[1.0]")
        if self.mask_samples > self.box_samples:
            raise ConfigError(
                f"task.mask_samples ({self.mask_samples}) is more than task.box_samples ({self.box_samples}), of which "
                "they are a part; lower it to a quarter of them"
            )
        for key in ("interleaved", "mask_flow"):
            if getattr(self, key) and not (self.masks and self.head == "cascade_mask_rcnn"):
                raise ConfigError(
                    f"task.{key} (true) is between the stages of masks: set task.head=cascade_mask_rcnn and "
                    f"task.masks=true, or task.{key}=false"
                )

    def evaluated_at_once(self, config: Config) -> tuple[int, int, int]:
        """One image, the largest."""
        scale = max(self.eval_scales)
        return 1, int(self.eval_short_px * scale), int(self.eval_long_px * scale)
