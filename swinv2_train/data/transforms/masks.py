"""Random masks for SimMIM."""

from __future__ import annotations

import math

import numpy as np
import torch

from swinv2_train.config import ConfigError


def simmim_mask(
    img_size: tuple[int, int], mask_unit_px: int, patch_size: int, ratio: float, rng: np.random.Generator
) -> torch.Tensor:
    """Hide ceil(units x ratio) of the image's squares of mask_unit_px pixels (arXiv:2111.09886 section 3.2).

    img_size: (height, width) in pixels.  Returns bool (height / patch_size, width / patch_size), True = hidden: at
    192 px, 22 of the 36 units of 32 px for ratio 0.6.  Raises ConfigError when the sizes do not divide.
    """
    if mask_unit_px % patch_size or img_size[0] % mask_unit_px or img_size[1] % mask_unit_px:
        raise ConfigError(
            f"task.mask_unit_px ({mask_unit_px}) must be a multiple of model.patch_size ({patch_size}) and divide "
            f"model.img_size {tuple(img_size)}; choose another mask_unit_px"
        )
    rows, columns = img_size[0] // mask_unit_px, img_size[1] // mask_unit_px
    hidden = math.ceil(rows * columns * ratio - 1e-9)  # 1e-9: 100 x 0.07 is 7.000000000000001 in floating point
    units = np.zeros(rows * columns, dtype=bool)
    units[rng.permutation(rows * columns)[:hidden]] = True
    scale = mask_unit_px // patch_size
    mask = units.reshape(rows, columns).repeat(scale, axis=0).repeat(scale, axis=1)  # units -> patches
    return torch.from_numpy(mask)
