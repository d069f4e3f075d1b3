"""Features of images as vectors: of the whole image, of each stage, of each tile of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError, pair
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.sample import SampleError, Targets
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.data.transforms.crop import eval_crop
from swinv2_train.tasks.inputs import ImageTransform
from swinv2_train.tasks.task import Forward, Task

KINDS = ("pooled", "stages", "tiles")


@dataclass(frozen=True, kw_only=True)
class Vectors(ImageTransform):
    """From an image to what the encoder sees of it, {"images": (C, H, W) or (tiles, C, H, W)}, and on to vectors.

    kind: pooled, the mean of the normed last map; stages, the mean of each stage's map; tiles, pooled of each part of
    a grid (rows, columns) of the whole image, row by row, each resized to the model's size.  Picklable.
    """

    kind: str
    grid: tuple[int, int] = (1, 1)

    @classmethod
    def build(cls, kind: str, config: Config, grid: tuple[int, int] = (1, 1)) -> Self:
        """As the configuration says images are cut.  Raises ConfigError for another kind, or no tiles."""
        if kind not in KINDS:
            raise ConfigError(f"features ({kind}) must be one of {', '.join(KINDS)}")
        if min(grid) < 1:
            raise ConfigError(f"tiles ([{grid[0]},{grid[1]}]) must be at least one row and one column")
        if kind == "tiles" and config.model.frames is not None:
            raise ConfigError(
                "features (tiles) are of images, and model.frames asks for clips; choose pooled or stages"
            )
        size = pair("model.img_size", config.model.img_size)
        return cls(
            data=config.data, img_size=size, train=False, bands=Bands.of(config), clips=ClipViews.of(config),
            kind=kind, grid=grid,
        )  # fmt: skip

    def __call__(self, image: Tensor | Clip, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        if self.kind != "tiles":
            return super().__call__(image, targets, rng)
        assert isinstance(image, Tensor), "build() refuses tiles of clips"
        rows, columns = (
            [side * place // count for place in range(count + 1)]
            for side, count in zip(image.shape[-2:], self.grid, strict=True)
        )
        if 0 in np.diff(rows) or 0 in np.diff(columns):
            raise SampleError(f"{image.shape[-2]} x {image.shape[-1]} pixels are fewer than tiles")
        whole = dataclasses.replace(self.data, eval_crop="squash", eval_crop_pct=1.0)
        cut = [
            eval_crop(image[..., top:bottom, left:right], self.img_size, whole)
            for top, bottom in zip(rows, rows[1:], strict=False)
            for left, right in zip(columns, columns[1:], strict=False)
        ]
        return {"images": torch.stack(cut)}

    def shapes(self, task: Task) -> dict[str, tuple[int, ...]]:
        """What there is of one image, by name."""
        width = task.encoder.num_features
        if self.kind == "stages":
            stages = len(task.encoder.depths)
            return {f"stage{number + 1}": (width >> (stages - 1 - number),) for number in range(stages)}
        return {self.kind: (width,) if self.kind == "pooled" else (self.grid[0] * self.grid[1], width)}

    def of(self, task: Task, forward: Forward, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The vectors of a batch, (B, ...) each, by the names of shapes."""
        if self.kind == "pooled":
            return {"pooled": task.features(forward, batch)}
        if self.kind == "tiles":
            seen = batch["images"].unbind(1)
            return {"tiles": torch.stack([task.features(forward, {**batch, "images": each}) for each in seen], dim=1)}
        maps = task.encoder.forward_features(task.normalise(batch["images"]))
        return {f"stage{number + 1}": each.float().flatten(2).mean(dim=2) for number, each in enumerate(maps)}
