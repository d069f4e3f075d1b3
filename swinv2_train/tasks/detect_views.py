"""What the detector sees of an image and of the objects in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import DetectConfig
from swinv2_train.data.sample import Targets
from swinv2_train.tasks.inputs import ImageTransform


@dataclass(frozen=True, kw_only=True)
class DetectTransform(ImageTransform):
    """An image and its objects; the class of the rows that tasks/detect.py takes."""

    task: DetectConfig
    fill: tuple[float, ...]
    """The value of each band that is 0 when normalised."""

    def __call__(self, image: Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        count, (height, width) = self.task.max_objects, self.img_size
        masks = torch.zeros(count, height, -(-width // 8), dtype=torch.uint8)
        return {
            **super().__call__(image, targets, rng),
            "boxes": torch.zeros(count, 4),
            "classes": torch.full((count,), -1),
            "crowd": torch.zeros(count, dtype=torch.bool),
            "extent": torch.tensor(self.img_size),
            "draw": torch.tensor(int(rng.integers(2**31))),
            **({"masks": masks} if self.task.masks else {}),
        }
