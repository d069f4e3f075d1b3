"""Brightness, contrast, saturation and hue of a photograph, changed at random in the arithmetic of 8 bits.

Source: PhotoMetricDistortion of mmsegmentation, of SSD (arXiv:1512.02325): every step is cut to 0..255 and truncated,
and colours go by OpenCV's hue of 180 steps.  Random numbers are drawn whether they are used or not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BRIGHTNESS = 32.0
"""Added: between minus and plus this."""
CONTRAST = SATURATION = (0.5, 1.5)
"""Factors."""
HUE = 18
"""Of 180 steps: from minus this to one less than plus this."""
_SHIFT = 12
"""Bits behind the point in OpenCV's tables."""


def photometric_distortion(image: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, H, W), RGB.  Each change is made with probability 1/2; contrast comes first of all
    that follow brightness, or last, as likely.
    """
    assert image.dtype == torch.uint8 and len(image) == 3, (image.dtype, image.shape)
    chosen = rng.random(5) < 0.5  # brightness, contrast first, contrast, saturation, hue
    brightness, contrast, saturation = rng.random(3)
    hue = int(rng.integers(-HUE, HUE))
    pixels = image.numpy()
    if chosen[0]:
        pixels = _changed(pixels, 1.0, BRIGHTNESS * (2 * brightness - 1))
    factor = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * contrast
    if chosen[2] and chosen[1]:
        pixels = _changed(pixels, factor, 0.0)
    if chosen[3] or chosen[4]:
        pixels = _changed_colours(
            pixels,
            SATURATION[0] + (SATURATION[1] - SATURATION[0]) * saturation if chosen[3] else None,
            hue if chosen[4] else None,
        )
    if chosen[2] and not chosen[1]:
        pixels = _changed(pixels, factor, 0.0)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _changed(values: np.ndarray, factor: float, added: float) -> np.ndarray:
    """uint8 -> uint8"""
    changed = values.astype(np.float32) * np.float32(factor) + np.float32(added)
    return changed.clip(0, 255).astype(np.uint8)


def _changed_colours(pixels: np.ndarray, factor: float | None, hue: int | None) -> np.ndarray:
    """Saturation by a factor, then hue by steps; between them pixels are RGB of 8 bits again."""
    if factor is not None:
        hsv = hsv_of(pixels)
        hsv[1] = _changed(hsv[1], factor, 0.0)
        pixels = rgb_of(hsv)
    if hue is not None:
        hsv = hsv_of(pixels)
        hsv[0] = (hsv[0].astype(np.int16) + hue) % 180
        pixels = rgb_of(hsv)
    return pixels


def _table(numerator: int, parts: int) -> np.ndarray:
    """int32 (256,): numerator / (parts * value) with _SHIFT bits behind the point; 0 for 0."""
    values = np.arange(1, 256)
    return np.concatenate([[0], np.rint((numerator << _SHIFT) / (1.0 * parts * values))]).astype(np.int32)


def hsv_of(pixels: np.ndarray) -> np.ndarray:
    """uint8 (3, H, W) RGB -> uint8 (3, H, W), hue 0..179, saturation and value 0..255, as OpenCV's COLOR_RGB2HSV."""
    red, green, blue = pixels.astype(np.int32)
    value = pixels.max(0).astype(np.int32)
    spread = value - pixels.min(0)
    half = 1 << (_SHIFT - 1)
    saturation = (spread * _table(255, 1)[value] + half) >> _SHIFT
    hue = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    hue = (hue * _table(180, 6)[spread] + half) >> _SHIFT
    hue += 180 * (hue < 0)
    return np.stack([hue, saturation, value]).astype(np.uint8)


def rgb_of(hsv: np.ndarray) -> np.ndarray:
    """uint8 (3, H, W) of hsv_of -> uint8 (3, H, W) RGB, rounded, as OpenCV's COLOR_HSV2RGB of a single pixel."""
    hue = hsv[0].astype(np.float32) * np.float32(6 / 180)
    saturation, value = hsv[1:].astype(np.float32) * np.float32(1 / 255)
    sector = np.floor(hue).astype(np.int64)
    rest = hue - sector.astype(np.float32)
    one = np.float32(1)
    shades = np.stack(
        [
            value,
            value * (one - saturation),
            value * (one - saturation * rest),
            value * (one - saturation * (one - rest)),
        ]
    )
    order = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])[sector % 6]  # (H, W, 3)
    rgb = np.take_along_axis(shades, order.transpose(2, 0, 1), axis=0)
    return np.rint(rgb * np.float32(255)).clip(0, 255).astype(np.uint8)
