"""Crops and flips, resized by torch's own antialiased kernels (of uint8 up to twice Pillow's speed)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from swinv2_train.config import DataConfig


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """image: (C, H, W) -> (C, *size), antialiased.  uint8 stays uint8; any other type becomes float32, unrounded.

    interpolation: bilinear or bicubic.  Within 2 grey levels of Pillow's resize of uint8 (6 on tiny crops), the filter
    is the same one.  A value of which any of the filter's pixels is NaN (no data) is NaN.  An image that has the size
    already keeps its values.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image if image.dtype == torch.uint8 else image.float()
    if image.dtype == torch.uint8:
        return F.interpolate(image[None], size, mode=interpolation, align_corners=False, antialias=True)[0]
    values = image.float().contiguous()
    missing = values.isnan()
    if not missing.any():
        return F.interpolate(values[None], size, mode=interpolation, align_corners=False, antialias=True)[0]
    resized = F.interpolate(
        values.masked_fill(missing, 0)[None], size, mode=interpolation, align_corners=False, antialias=True
    )[0]
    return resized.masked_fill_(_reached(missing, size, interpolation), torch.nan)


def _reached(missing: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """bool (C, H, W) -> (C, *size): where the filter's window holds any that is True.

    The bilinear filter is nowhere negative, so it shows what it reaches; the bicubic one reaches as far again.
    """
    marks = missing[None].float()
    if interpolation == "bicubic":
        rows, columns = (math.ceil(max(1.0, old / new)) for old, new in zip(missing.shape[-2:], size, strict=True))
        marks = F.max_pool2d(marks, (2 * rows + 1, 2 * columns + 1), stride=1, padding=(rows, columns))
    return F.interpolate(marks, size, mode="bilinear", align_corners=False, antialias=True)[0] > 0


def random_resized_crop(
    image: torch.Tensor,
    size: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
    interpolation: str,
    rng: np.random.Generator,
) -> torch.Tensor:
    """A random box of the image, resized to `size` (h, w) pixels: (C, H, W) -> (C, h, w).

    scale: the box's share of the area, ratio: its width over height (log-uniform), both [low, high].  torchvision's
    RandomResizedCrop rule: ten tries, then the largest centred box whose ratio is allowed.
    """
    top, left, height, width = random_box(image.shape[-2], image.shape[-1], scale, ratio, rng)
    return resize(image[:, top : top + height, left : left + width], size, interpolation)


def random_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of random_resized_crop's box in an image of height x width."""
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        box_area = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        box_width, box_height = round(math.sqrt(box_area * aspect)), round(math.sqrt(box_area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    box_width, box_height = max(box_width, 1), max(box_height, 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_flip(image: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Mirror left and right with the given probability; always draws one number, so that later draws do not move."""
    return image.flip(-1) if rng.random() < probability else image


def random_dihedral(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One of the eight ways to turn a square onto itself, each as likely: (C, H, W) -> (C, H, W) or (C, W, H)."""
    return turned(image, int(rng.integers(8)))


def turned(image: torch.Tensor, number: int) -> torch.Tensor:
    """One of the eight ways to turn a square onto itself, 0 being none: (C, H, W) -> (C, H, W) or (C, W, H)."""
    rotated = image.rot90(number % 4, (1, 2)) if number % 4 else image  # rot90 copies even what it does not turn
    return rotated.flip(1) if number >= 4 else rotated


def eval_crop(image: torch.Tensor, size: tuple[int, int], data: DataConfig) -> torch.Tensor:
    """What evaluations and probes see of an image: (C, H, W) -> (C, *size), by data.eval_crop and the like."""
    return centre_crop(image, size, data.eval_crop_pct, data.interpolation, data.eval_crop == "squash")


def eval_crops(image: torch.Tensor, size: tuple[int, int], data: DataConfig, count: int) -> list[torch.Tensor]:
    """count crops, (C, *size) each, evenly along what is longer than size in the image as eval_crop resizes it: the
    left end, the middle and the right end of three, or the upper end first; one is eval_crop's.
    """
    if count == 1:
        return [eval_crop(image, size, data)]
    image = _covering(image, size, data.eval_crop_pct, data.interpolation, data.eval_crop == "squash")
    spare = (image.shape[-2] - size[0], image.shape[-1] - size[1])
    top, left = round(spare[0] / 2), round(spare[1] / 2)
    crops = []
    for number in range(count):
        if spare[1] >= spare[0]:
            left = round(spare[1] * number / (count - 1))
        else:
            top = round(spare[0] * number / (count - 1))
        crops.append(image[:, top : top + size[0], left : left + size[1]])
    return crops


def centre_crop(
    image: torch.Tensor, size: tuple[int, int], crop_pct: float, interpolation: str, squash: bool = False
) -> torch.Tensor:
    """The evaluation's crop: (C, H, W) -> (C, *size).

    The image is resized, its shape kept, until it just covers size / crop_pct, then the centre is cut out.  squash:
    it is resized to size / crop_pct whatever its shape, so that with crop_pct 1 nothing of it is lost (the official
    384 px configurations: TEST.CROP False).  With crop_pct 1 an image of the right size is returned untouched.
    Fractions of pixels are dropped, as torchvision and timm do it: 256 / 0.875 is 292.
    """
    return _centre(_covering(image, size, crop_pct, interpolation, squash), size)


def _covering(
    image: torch.Tensor, size: tuple[int, int], crop_pct: float, interpolation: str, squash: bool
) -> torch.Tensor:
    """The image, resized as centre_crop does it; of a strip, its middle."""
    height, width = image.shape[-2:]
    covered = (math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct))
    if squash:
        resized = covered
    elif covered[0] * width >= covered[1] * height:
        resized = (covered[0], covered[0] * width // height)
    else:
        resized = (covered[1] * height // width, covered[1])
    if max(resized) > 16 * max(covered):  # a strip: nearly all of what would be resized, gigabytes, would be cut off
        scale = max(covered[0] / height, covered[1] / width)
        kept = [min(n, math.ceil(s / scale) + 8) for n, s in zip((height, width), covered, strict=True)]
        image = _centre(image, (kept[0], kept[1]))
        return _covering(image, size, crop_pct, interpolation, squash=False)
    return resize(image, resized, interpolation)


def _centre(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W) -> (C, *size)"""
    top, left = round((image.shape[-2] - size[0]) / 2), round((image.shape[-1] - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]]
