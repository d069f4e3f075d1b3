"""Masked image modelling with SimMIM (arXiv:2111.09886)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError, SimMIMConfig, pair
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.sample import Targets
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.data.transforms.masks import simmim_mask
from swinv2_train.models import SimMIM, multiply_adds
from swinv2_train.models.simmim import frames_of, local_statistics, target_weights
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.report.pictures import captioned, grid, stretch_limits, stretched
from swinv2_train.tasks.answers import Answer, Ask
from swinv2_train.tasks.clip_picture import PICTURE_CLIPS, frames_in_a_row
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import ImageTransform, Normalise, meta_images, picture_bands
from swinv2_train.tasks.metrics import Mean, Metric
from swinv2_train.tasks.task import Batch, Forward

PICTURE_IMAGES = 8
COLUMNS = ("original", "masked", "reconstructed")
UNEVEN = (
    "train.loss_mean is local: where images have more or less no data, values of a micro-batch with much of it count "
    "more, and losses depend on the number of ranks; train.loss_mean=global counts each measured value alike"
)


@dataclass(frozen=True, kw_only=True)
class SimMIMTransform(ImageTransform):
    """A crop of the image and a random mask: {"images": (C, H, W), "mask": bool (H/p, W/p)}."""

    patch_size: int
    task: SimMIMConfig

    def __call__(self, image: Tensor | Clip, targets: Targets, rng: np.random.Generator) -> dict[str, Tensor]:
        row = super().__call__(image, targets, rng)
        mask = simmim_mask(self.img_size, self.task.mask_unit_px, self.patch_size, self.task.mask_ratio, rng)
        return {**row, "mask": mask}


class SimMIMTask:
    """Predict hidden squares of pixels from the rest of the image."""

    block_types = (SwinBlock,)
    predictions = None
    evidence = "task=simmim names no class; fine-tune it first (task=classify task.init_from=RUN_DIR)"

    def __init__(self, config: Config, task: SimMIMConfig, device: torch.device) -> None:
        self.encoder = build_model(config.model, num_classes=0)
        self.multiply_adds = multiply_adds(self.encoder)
        stride = self.encoder.patch_size * 2 ** (len(self.encoder.depths) - 1)
        try:
            self.module = SimMIM(self.encoder, stride, task.norm_target)
        except ValueError as error:
            raise ConfigError(f"task: {error}") from error
        self.normalise = Normalise.of(config, device)
        self.bands = Bands.of(config)
        self.local_mean = config.train.loss_mean == "local"
        self.picture_bands = picture_bands(config)
        self.picture_all_bands = config.data.picture_all_bands
        img_size = pair("model.img_size", config.model.img_size)
        self.train_transform, self.eval_transform = (
            SimMIMTransform(
                config.data,
                img_size,
                train,
                bands=self.bands,
                clips=ClipViews.of(config),
                patch_size=config.model.patch_size,
                task=task,
            )
            for train in (True, False)
        )

    @staticmethod
    def preflight(task: SimMIMConfig) -> None:
        """Nothing more than torch is needed."""

    @staticmethod
    def check_source(task: SimMIMConfig, source: Source, key: str) -> None:
        """Images are all that is needed."""

    def begin(self, source: Source | Stream, names: tuple[str, ...] | None) -> None:
        """The loss depends on nothing of theirs."""

    def notes(self, source: Source | Stream) -> tuple[str, ...]:
        """Where the loss depends on how a step is cut."""
        return (UNEVEN,) if self.normalise.nodata and self.local_mean else ()

    def meta_batch(self, size: int) -> dict[str, Tensor]:
        """Images and masks without contents."""
        height, width = (side // self.encoder.patch_size for side in self.encoder.img_size)
        mask = torch.empty(size, height, width, dtype=torch.bool, device="meta")
        return {**meta_images(size, self.encoder.input_size, self.bands), "mask": mask}

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        outputs = self._outputs(forward, batch)
        if "sources" in batch:
            batch["image_losses"] = outputs["image_losses"], outputs["image_counts"]
        return outputs["loss"]

    def count(self, batch: Batch) -> float:
        if self.normalise.nodata:
            return float(self._measured_targets(batch))
        patches = batch["mask"].flatten(1).sum(dim=1)  # (B,)
        frames = self.encoder.frames or 1
        return float((patches * batch["weight"]).sum()) * self.module.encoder.patch_size**2 * frames

    def scores(self, forward: Forward, batch: Batch) -> dict[str, Metric]:
        loss = self._outputs(forward, batch)["loss"]
        return {"val/loss": Mean(loss, self._measured_targets(batch)) if self.normalise.nodata else loss}

    @staticmethod
    def answer_columns(task: SimMIMConfig, top_k: int) -> None:
        """It answers nothing."""
        return

    def answers(self, forward: Forward, batch: Batch, ask: Ask) -> list[Answer | None]:
        raise ConfigError(
            "task=simmim names nothing in images; fine-tune it first (task.init_from), or ask for features"
        )

    def overlay(self, batch: Batch, number: int, answer: Any, names: Sequence[str] | None) -> None:
        return

    def features(self, forward: Forward, batch: Batch) -> Tensor:
        outputs: dict[str, Tensor] = forward(images=self.normalise(batch["images"]))
        return outputs["features"]

    def picture(self, forward: Forward, batch: Batch, names: Sequence[str] | None = None) -> np.ndarray:
        clips = batch["images"].ndim == 5
        number = PICTURE_CLIPS if clips else PICTURE_IMAGES
        few = {name: batch[name][:number] for name in ("images", "mask", "weight")}
        reconstruction, images = self._outputs(forward, few)["reconstruction"], self.normalise(few["images"])
        measured = self.normalise.measured(few["images"])
        if measured is not None:
            measured = measured.to(reconstruction.device)
        if self.module.norm_target is not None:  # the prediction is relative to each pixel's surroundings
            mean, std = local_statistics(frames_of(images), self.module.norm_target, measured)
            if clips:
                mean, std = (each.view(len(images), -1, *each.shape[1:]).movedim(1, 2) for each in (mean, std))
            reconstruction = reconstruction * std + mean
        predicted = self.normalise.pixels(reconstruction)
        scale = self.module.encoder.patch_size
        hidden = few["mask"].repeat_interleave(scale, 1).repeat_interleave(scale, 2).unsqueeze(1).to(predicted.device)
        hidden = hidden.unsqueeze(1) if clips else hidden
        if self.bands is not None:
            values = self.normalise.pixels(images)
            if measured is not None:
                values = values.masked_fill(~measured, torch.nan)
            return self._picture_of_bands(*(each.cpu().numpy() for each in (values, predicted, hidden[:, 0])))
        original = few["images"].to(predicted.device)
        masked = torch.where(hidden, torch.full_like(original, 127), original)
        restored = torch.where(hidden, predicted, original)
        if clips:
            parts = zip(original, masked, restored, strict=True)
            return captioned(
                [
                    (f"clip {place + 1}: {name}", frames_in_a_row(clip))
                    for place, clips_of_one in enumerate(parts)
                    for name, clip in zip(COLUMNS, clips_of_one, strict=True)
                ]
            )
        columns = [_hwc(images) for images in (original, masked, restored)]
        return grid(list(zip(*columns, strict=True)), COLUMNS)

    def _picture_of_bands(self, values: np.ndarray, predicted: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """values, predicted: (B, C, H, W); hidden: bool (B, H, W)."""
        restored = np.where(hidden[:, None], predicted, values)
        shown = [(number, self.picture_bands) for number in range(len(values))]
        if self.picture_all_bands:
            shown = [(0, (band,)) for band in range(values.shape[1])]
        rows = []
        for number, bands in shown:
            limits = stretch_limits(values[number], bands)
            original = stretched(values[number], bands, limits)
            masked = np.where(hidden[number][..., None], np.uint8(127), original)
            rows.append((original, masked, stretched(restored[number], bands, limits)))
        return grid(rows, COLUMNS)

    def _outputs(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        inputs = {"images": self.normalise(batch["images"]), "mask": batch["mask"], "weight": batch["weight"]}
        measured = self.normalise.measured(batch["images"])
        if measured is not None:
            inputs["measured"] = measured.to(inputs["images"].device)
        if "sources" in batch:
            inputs["by_image"] = True
        outputs: dict[str, Tensor] = forward(**inputs)
        return outputs

    def _measured_targets(self, batch: Batch) -> Tensor:
        """What the loss of a batch with no data is the mean over: hidden values that were measured, () float64."""
        measured, window = self.normalise.measured(batch["images"]), self.module.norm_target
        mask, weight = (batch[name].to(batch["images"].device) for name in ("mask", "weight"))
        weights = target_weights(mask, self.encoder.patch_size, weight, measured, window)
        return weights.sum(dtype=torch.float64)


def _hwc(images: Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).cpu().numpy())
