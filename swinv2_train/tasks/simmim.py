"""Masked image modelling with SimMIM (arXiv:2111.09886)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError, DataConfig, SimMIMConfig, pair
from swinv2_train.data.transforms.crop import eval_crop, random_flip, random_resized_crop
from swinv2_train.data.transforms.masks import simmim_mask
from swinv2_train.models import SimMIM, multiply_adds
from swinv2_train.models.simmim import local_statistics
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.report.pictures import grid
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import Normalise
from swinv2_train.tasks.task import Forward

PICTURE_IMAGES = 8


@dataclass(frozen=True)
class SimMIMTransform:
    """A crop of the image and a random mask: {"images": uint8 (3, H, W), "mask": bool (H/p, W/p)}."""

    data: DataConfig
    img_size: tuple[int, int]
    patch_size: int
    mask_unit_px: int
    mask_ratio: float
    train: bool
    needs_label: bool = False

    def __call__(self, image: Tensor, label: int | None, rng: np.random.Generator) -> dict[str, Tensor]:
        if self.train:
            data = self.data
            image = random_resized_crop(image, self.img_size, data.crop_scale, data.crop_ratio, data.interpolation, rng)
            image = random_flip(image, data.hflip, rng)
        else:
            image = eval_crop(image, self.img_size, self.data)
        mask = simmim_mask(self.img_size, self.mask_unit_px, self.patch_size, self.mask_ratio, rng)
        return {"images": image, "mask": mask}


class SimMIMTask:
    """Predict hidden squares of pixels from the rest of the image."""

    has_picture = True
    block_types = (SwinBlock,)

    def __init__(self, config: Config, task: SimMIMConfig, device: torch.device) -> None:
        encoder = build_model(config.model, num_classes=0)
        self.multiply_adds = multiply_adds(encoder)
        stride = encoder.patch_size * 2 ** (len(encoder.depths) - 1)
        try:
            self.module = SimMIM(encoder, stride, task.norm_target)
        except ValueError as error:
            raise ConfigError(f"task: {error}") from error
        self.normalise = Normalise(config.data.mean, config.data.std, device)
        img_size = pair("model.img_size", config.model.img_size)
        self.train_transform, self.eval_transform = (
            SimMIMTransform(
                config.data, img_size, config.model.patch_size, task.mask_unit_px, task.mask_ratio, train=train
            )
            for train in (True, False)
        )

    def loss(self, forward: Forward, batch: dict[str, Any]) -> Tensor:
        return self._outputs(forward, batch)["loss"]

    def count(self, batch: dict[str, Any]) -> float:
        patches = batch["mask"].flatten(1).sum(dim=1)  # (B,)
        return float((patches * batch["weight"]).sum()) * self.module.encoder.patch_size**2

    def scores(self, forward: Forward, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"val/loss": self._outputs(forward, batch)["loss"]}

    def features(self, forward: Forward, batch: dict[str, Any]) -> Tensor:
        outputs: dict[str, Tensor] = forward(images=self.normalise(batch["images"]))
        return outputs["features"]

    def picture(self, forward: Forward, batch: dict[str, Any]) -> np.ndarray:
        few = {name: batch[name][:PICTURE_IMAGES] for name in ("images", "mask", "weight")}
        outputs = self._outputs(forward, few)
        original = few["images"].to(outputs["reconstruction"].device)
        reconstruction = outputs["reconstruction"]
        if self.module.norm_target is not None:  # the prediction is relative to each pixel's surroundings
            mean, std = local_statistics(self.normalise(few["images"]), self.module.norm_target)
            reconstruction = reconstruction * std + mean
        predicted = self.normalise.pixels(reconstruction)
        scale = self.module.encoder.patch_size
        hidden = few["mask"].repeat_interleave(scale, 1).repeat_interleave(scale, 2).unsqueeze(1).to(original.device)
        masked = torch.where(hidden, torch.full_like(original, 127), original)
        restored = torch.where(hidden, predicted, original)
        columns = [_hwc(images) for images in (original, masked, restored)]
        return grid(list(zip(*columns, strict=True)), ("original", "masked", "reconstructed"))

    def _outputs(self, forward: Forward, batch: dict[str, Any]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = forward(
            images=self.normalise(batch["images"]), mask=batch["mask"], weight=batch["weight"]
        )
        return outputs


def _hwc(images: Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).cpu().numpy())
