"""From pixels to what a model takes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import Config, DataConfig, per_band
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.sample import Targets
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.data.transforms.crop import eval_crop, random_dihedral, random_flip, random_resized_crop


@dataclass(frozen=True)
class ImageTransform:
    """A crop of the image, random for training: {"images": (C, H, W)}.  A task's own adds its targets.

    Photographs are uint8 (3, H, W), values float32, NaN where nothing was measured.  Of clips it is uint8 (3, T, H, W),
    or as `clips` says.  An evaluation may replace data (another crop), needs (() where a file has the targets) and
    clips (more views).
    """

    data: DataConfig
    img_size: tuple[int, int]
    train: bool
    needs: tuple[str, ...] = ()
    """Names of the targets without which a sample is damaged (data/sample.py)."""
    bands: Bands | None = None
    """How files are read as values; None = as photographs."""
    clips: ClipViews | None = None
    """Which frames are seen of clips; None = images."""

    def __call__(self, image: Tensor | Clip, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        data = self.data
        if self.clips is not None:
            assert isinstance(image, Clip), "the loader opens clips where they are wanted"
            if self.train:
                return {"images": self.clips.train(image, self.img_size, data, rng)}
            return {"images": self.clips.evaluate(image, self.img_size, data)}
        assert isinstance(image, Tensor), "the loader decodes images"
        if not self.train:
            return {"images": eval_crop(image, self.img_size, data)}
        if data.dihedral:
            image = random_dihedral(image, rng)
        image = random_resized_crop(image, self.img_size, data.crop_scale, data.crop_ratio, data.interpolation, rng)
        return {"images": random_flip(image, data.hflip, rng)}


def meta_images(size: int, input_size: tuple[int, ...], bands: Bands | None = None) -> dict[str, Tensor]:
    """What every batch holds of `size` images, or clips, without contents, on the meta device."""
    count, dtype = (3, torch.uint8) if bands is None else (bands.count, torch.float32)
    return {
        "images": torch.empty(size, count, *input_size, dtype=dtype, device="meta"),
        "weight": torch.empty(size, device="meta"),
    }


class Normalise:
    """Pixels (B, C, H, W) on any device to normalised float32 pixels on this one, and back for pictures.

    mean, std: per band, of photographs' pixels in 0..1, or of values after values_of's scale.
    """

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        self.mean = 255 * _column(mean, device)
        self.std = 255 * _column(std, device)
        self.factor: Tensor | None = None
        """Of values: see data.scale."""
        self.offset: Tensor | None = None
        self.clip: list[float] | None = None
        self.nodata = False

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Normalise:
        """What the configuration says of photographs, or of values."""
        data, count = config.data, config.model.in_chans
        found = cls(data.mean, data.std, device)
        if config.model.frames is not None:
            found.mean, found.std = found.mean.unsqueeze(-1), found.std.unsqueeze(-1)  # (C, 1, 1, 1)
        if config.reads_values:
            found.mean, found.std = _column(data.mean, device), _column(data.std, device)
            found.factor = _column(per_band(data.scale.factor, count, 1.0), device)
            found.offset = _column(per_band(data.scale.offset, count, 0.0), device)
            found.clip, found.nodata = data.scale.clip, data.nodata is not None
        return found

    def __call__(self, images: Tensor) -> Tensor:
        """What was not measured becomes 0, its band's mean."""
        values = images.to(self.mean.device, non_blocking=True).float()
        if self.factor is None or self.offset is None:
            return (values - self.mean) / self.std
        values = values * self.factor + self.offset
        if self.clip is not None:
            values = values.clamp(*self.clip)  # NaN stays NaN
        values = (values - self.mean) / self.std
        return values.masked_fill(values.isnan(), 0) if self.nodata else values

    def measured(self, images: Tensor) -> Tensor | None:
        """bool (B, C, H, W), False where nothing was measured, on images' device; None where data.nodata is null."""
        return ~images.isnan() if self.nodata else None

    def pixels(self, normalised: Tensor) -> Tensor:
        """Normalised float32 (B, C, H, W) back: photographs to uint8, values to scaled values in float32."""
        values = normalised * self.std + self.mean
        return values.round().clamp(0, 255).to(torch.uint8) if self.factor is None else values


def neutral_values(config: Config) -> tuple[float, ...]:
    """The value of each band, as it is read, that is 0 when it is normalised."""
    data, count = config.data, config.model.in_chans
    if not config.reads_values:
        return tuple(255 * mean for mean in data.mean)
    factors, offsets = per_band(data.scale.factor, count, 1.0), per_band(data.scale.offset, count, 0.0)
    return tuple((mean - offset) / factor for mean, factor, offset in zip(data.mean, factors, offsets, strict=True))


def picture_bands(config: Config) -> Sequence[int]:
    """The bands that pictures show: red, green and blue, or one as grey."""
    return config.data.picture_bands or (range(3) if config.model.in_chans >= 3 else (0,))


def viewable(values: Tensor, bands: Bands | None, shown: Sequence[int]) -> np.ndarray:
    """An image as it is read, (C, H, W), as uint8 (H, W, 3): photographs as they are, values stretched."""
    from swinv2_train.report.pictures import stretch_limits, stretched

    pixels: np.ndarray = values.cpu().numpy()
    if bands is None:
        return pixels.transpose(1, 2, 0)
    return stretched(pixels, shown, stretch_limits(pixels, shown))


def _column(values: list[float], device: torch.device) -> Tensor:
    """(C, 1, 1)"""
    return torch.tensor(values, device=device).view(-1, 1, 1)
