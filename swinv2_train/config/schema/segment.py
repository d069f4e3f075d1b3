"""task=segment: a class of each pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.rules import ABOVE_0, BELOW_1, at_least, between, each, low_high, one_of, pair, positive, size
from swinv2_train.config.schema.config import Config, flips
from swinv2_train.config.schema.data import DataConfig
from swinv2_train.config.schema.pixel_task import PixelTaskConfig

HEAD_NORMS = ("layer", "group", "batch", "sync_batch")
"""The norms of a segmentation head."""
BATCH_NORMS = ("batch", "sync_batch")
"""Those whose statistics are of several images."""


@dataclass
class SegmentConfig(PixelTaskConfig):
    num_classes: Annotated[int, at_least(2)]
    """Classes; labels of pixels run from 0 to num_classes - 1, behind reduce_zero_label."""
    ignore_index: Annotated[int, between(0, 65535)]
    """The label of pixels that neither train nor count."""
    reduce_zero_label: bool
    """Read 0 of the label images as ignore_index, and k as class k - 1 (ADE20K as downloaded)."""
    class_names: list[str] | None
    """What the classes are called in pictures, tables and exports, a name per class; null = by their numbers."""
    head_norm: Annotated[str, one_of(*HEAD_NORMS)]
    """Norm of the heads: layer (over channels), group, batch (one process) or sync_batch (of all ranks; published)."""
    map_norms: bool
    """Norms of the encoder's maps before the heads (published); false = raw maps, as transformers' UPerNet takes."""
    head_channels: Annotated[int, at_least(1)]
    """Channels of the UPerNet head (arXiv:1807.10221; published with Swin: 512)."""
    aux_channels: Annotated[int, at_least(0)]
    """Channels of the auxiliary head on the last map but one (256); 0 = no such head."""
    aux_weight: Annotated[float, positive()]
    """Weight of the auxiliary head's loss (0.4)."""
    dropout: Annotated[float, between(0, BELOW_1)]
    """Share of channels that is dropped before the classes, in both heads."""
    loss_denominator: Annotated[str, one_of("all", "valid")]
    """A loss is divided by all pixels (published; each image counts the same), or by those that are not ignored."""
    class_weights: Annotated[list[float] | None, each(at_least(0))]
    """What a pixel of each class counts in the loss, a number per class; null = 1."""
    resize_long_px: Annotated[int, at_least(1)]
    """Images are resized, their shape kept, to fit into resize_long_px x resize_short_px, in either direction."""
    resize_short_px: Annotated[int, at_least(1)]
    """The shorter of these two sides."""
    resize_scale: Annotated[list[float], low_high(math.inf)]
    """Training: both sides are multiplied by a number drawn between these; then model.img_size is cut out."""
    resize: Annotated[str, one_of("opencv", "antialias")]
    """Bilinear resize of images: opencv (published; no antialiasing) or antialias; labels take the nearest pixel's."""
    crop_max_category_share: Annotated[float, between(ABOVE_0, 1)]
    """Training: a crop of whose labelled pixels one class has this share (0.75) is drawn again, up to 10 times."""
    photometric: bool
    """Training: random brightness, contrast, saturation and hue, as published."""
    eval_mode: Annotated[str, one_of("whole", "slide")]
    """Evaluation: the whole resized image at once, or tiles of it, whose scores are averaged where they overlap."""
    eval_crop: Annotated[Any, size()]
    """slide: side of a tile in pixels, one number or [height, width]; null = model.img_size."""
    eval_stride: Annotated[Any, size()]
    """slide: pixels from one tile to the next, one number or [height, width]; null = two thirds of the tile."""
    eval_scales: Annotated[list[float], each(positive())]
    """Evaluation: sizes that are averaged, as factors of resize_long_px and resize_short_px ([1.0] = one)."""
    eval_flip: bool
    """Evaluation: average with the mirrored image too."""

    implementation: ClassVar[str] = "swinv2_train.tasks.segment:SegmentTask"
    scores: ClassVar[tuple[str, ...]] = ("val/loss", "val/miou", "val/macc", "val/aacc")
    purpose: ClassVar[str] = "semantic segmentation"
    pipeline_tag: ClassVar[str] = "image-segmentation"
    transformers_class: ClassVar[str] = "UperNetForSemanticSegmentation"

    def augmentations(self, data: DataConfig) -> list[str]:
        low, high = self.resize_scale
        sides = f"resized into {self.resize_long_px} x {self.resize_short_px} px times {low:g} to {high:g}, then cut"
        return [sides, *flips(data), *(["colours changed at random"] if self.photometric else [])]

    def identity(self) -> dict[str, Any]:
        """What shapes the heads."""
        shaping = ("num_classes", "head_norm", "map_norms", "head_channels", "aux_channels")
        return {f"task.{key}": getattr(self, key) for key in shaping}

    def check(self, config: Config) -> None:
        """Labels, weights and tiles fit each other; batch statistics are of whole batches."""
        super().check(config)
        if self.ignore_index < self.num_classes:
            raise ConfigError(
                f"task.ignore_index ({self.ignore_index}) is one of the classes 0 to {self.num_classes - 1}; choose "
                f"{255 if self.num_classes <= 255 else 65535}"
            )
        if self.class_weights is not None and len(self.class_weights) != self.num_classes:
            raise ConfigError(
                f"task.class_weights has {len(self.class_weights)} numbers for task.num_classes ({self.num_classes}); "
                "give one per class, or null"
            )
        if self.class_weights is not None and not any(self.class_weights):
            raise ConfigError("task.class_weights are all 0, which leaves nothing to learn; give one above 0, or null")
        if self.resize_short_px > self.resize_long_px:
            raise ConfigError(
                f"task.resize_short_px ({self.resize_short_px}) is more than task.resize_long_px "
                f"({self.resize_long_px}); exchange them"
            )
        if not self.eval_scales:
            raise ConfigError("task.eval_scales is empty; name a scale: task.eval_scales=[1.0]")
        tile, stride = self.tile_and_stride(config)
        if any(step > side for step, side in zip(stride, tile, strict=True)):
            raise ConfigError(
                f"task.eval_stride {stride} is more than the tile {tile} (task.eval_crop), which leaves gaps; lower it"
            )
        if self.photometric and config.reads_values:
            raise ConfigError(
                "task.photometric (true) changes the colours of photographs of 3 x 8 bits, and images are values of "
                f"{config.model.in_chans} bands here; set task.photometric=false"
            )
        if self.head_norm in BATCH_NORMS:
            self._check_batch_norm(config)

    def evaluated_at_once(self, config: Config) -> tuple[int, int, int]:
        """Tiles of one image, or all of the largest one."""
        if self.eval_mode == "slide":
            return config.train.micro_batch_size, *self.tile_and_stride(config)[0]
        scale = max(self.eval_scales)
        return 1, int(self.resize_short_px * scale), int(self.resize_long_px * scale)

    def check_ranks(self, ranks: int, accumulation_steps: int) -> None:
        """Batch statistics are of all images of a step, the same on every rank."""
        other = "choose task.head_norm=layer or group, which look at one image at a time"
        if self.head_norm == "batch" and ranks > 1:
            raise ConfigError(
                f"task.head_norm (batch) on {ranks} processes: each would keep statistics of its own images; set "
                f"task.head_norm=sync_batch, or {other}"
            )
        if self.head_norm in BATCH_NORMS and accumulation_steps > 1:
            raise ConfigError(
                f"task.head_norm ({self.head_norm}) with {accumulation_steps} micro-batches per step: statistics would "
                "be of one micro-batch alone; set train.micro_batch_size so that a step has one, or "
                f"{other}"
            )

    def tile_and_stride(self, config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
        """The (height, width) of a tile of the sliding window, and the steps between tiles, in pixels."""
        given = config.model.img_size if self.eval_crop is None else self.eval_crop
        tile = pair("task.eval_crop", given)
        third = (max(1, tile[0] * 2 // 3), max(1, tile[1] * 2 // 3))
        return tile, third if self.eval_stride is None else pair("task.eval_stride", self.eval_stride)

    def _check_batch_norm(self, config: Config) -> None:
        """Statistics are of images that count, and enough of them."""
        other = "choose task.head_norm=layer or group, which look at one image at a time"
        size = "micro_batch_size" if self.head_norm == "batch" else "global_batch_size"
        images = getattr(config.train, size)
        if images < 2:
            raise ConfigError(
                f"task.head_norm ({self.head_norm}) with train.{size} ({images}): the pooled map of one image has no "
                f"variance; raise it, or {other}"
            )
        if config.data.on_bad_sample == "replace":
            raise ConfigError(
                f"task.head_norm ({self.head_norm}) with data.on_bad_sample (replace): an image that stands in for a "
                f"damaged one would count in the statistics; set data.on_bad_sample=error, or {other}"
            )
