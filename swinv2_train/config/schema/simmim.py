"""task=simmim: masked image modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.rules import ABOVE_0, between, pair
from swinv2_train.config.schema.config import Config, TaskConfig
from swinv2_train.config.schema.data import DataConfig


@dataclass
class SimMIMConfig(TaskConfig):
    mask_unit_px: int
    """Side of a masked square in pixels (arXiv:2111.09886 section 3.2: 32)."""
    mask_ratio: Annotated[float, between(ABOVE_0, 1)]
    """Share of the squares that is hidden (0.6)."""
    norm_target: int | None
    """Side in pixels of the sliding window that normalises the target; null = plain pixels (official SwinV2: 47)."""

    implementation: ClassVar[str] = "swinv2_train.tasks.simmim:SimMIMTask"
    scores: ClassVar[tuple[str, ...]] = ("val/loss",)
    purpose: ClassVar[str] = "masked image modelling (SimMIM)"
    transformers_class: ClassVar[str] = "Swinv2ForMaskedImageModeling"

    def augmentations(self, data: DataConfig) -> list[str]:
        hidden = f"{self.mask_ratio:g} of the squares of {self.mask_unit_px} px hidden"
        return [*super().augmentations(data), hidden]

    def check(self, config: Config) -> None:
        """A mask is made of whole patches and fills the image."""
        patch_size, img_size = config.model.patch_size, pair("model.img_size", config.model.img_size)
        unit = self.mask_unit_px
        if unit < 1 or unit % patch_size or any(side % unit for side in img_size):
            raise ConfigError(
                f"task.mask_unit_px ({unit}) must be a multiple of model.patch_size ({patch_size}) and divide "
                f"model.img_size {img_size}"
            )
