"""Crops and flips of uint8 images, resized by torch's own antialiased kernel (up to twice Pillow's speed)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from swinv2_train.config import DataConfig


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """image: uint8 (3, H, W) -> uint8 (3, *size), antialiased; untouched when it already has the size.

    interpolation: bilinear or bicubic.  Within 2 grey levels of Pillow's resize (6 on tiny crops).
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size, mode=interpolation, align_corners=False, antialias=True)[0]


def random_resized_crop(
    image: torch.Tensor,
    size: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
    interpolation: str,
    rng: np.random.Generator,
) -> torch.Tensor:
    """A random box of the image, resized to `size` (h, w) pixels: uint8 (3, H, W) -> (3, h, w).

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


def eval_crop(image: torch.Tensor, size: tuple[int, int], data: DataConfig) -> torch.Tensor:
    """What evaluations and probes see of an image: uint8 (3, H, W) -> (3, *size), by data.eval_crop and the like."""
    return centre_crop(image, size, data.eval_crop_pct, data.interpolation, data.eval_crop == "squash")


def centre_crop(
    image: torch.Tensor, size: tuple[int, int], crop_pct: float, interpolation: str, squash: bool = False
) -> torch.Tensor:
    """The evaluation's crop: uint8 (3, H, W) -> (3, *size).

    The image is resized, its shape kept, until it just covers size / crop_pct, then the centre is cut out.  squash:
    it is resized to size / crop_pct whatever its shape, so that with crop_pct 1 nothing of it is lost (the official
    384 px configurations: TEST.CROP False).  With crop_pct 1 an image of the right size is returned untouched.
    Fractions of pixels are dropped, as torchvision and timm do it: 256 / 0.875 is 292.
    """
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
        return centre_crop(image, size, crop_pct, interpolation)
    return _centre(resize(image, resized, interpolation), size)


def _centre(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(3, H, W) -> (3, *size)"""
    top, left = round((image.shape[-2] - size[0]) / 2), round((image.shape[-1] - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]]
