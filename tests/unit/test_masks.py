"""SimMIM's masks: the published share, whole units, any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.masks import simmim_mask


def test_192_px_in_units_of_32_at_ratio_06_hides_22_of_36():
    """arXiv:2111.09886's setting; the official code takes the ceiling of 21.6."""
    mask = simmim_mask((192, 192), 32, 4, 0.6, np.random.default_rng(0))
    assert mask.shape == (48, 48) and mask.dtype == torch.bool
    units = mask.view(6, 8, 6, 8)
    assert torch.equal(units.all(dim=3).all(dim=1), units.any(dim=3).any(dim=1))  # units are hidden as a whole
    assert units[:, 0, :, 0].sum() == 22


def test_non_square_images_and_units_of_one_patch():
    mask = simmim_mask((64, 96), 8, 8, 0.5, np.random.default_rng(0))
    assert mask.shape == (8, 12) and mask.sum() == 48


@pytest.mark.parametrize(("ratio", "hidden"), [(0.07, 7), (0.0, 0), (1.0, 100), (0.601, 61)])
def test_the_count_is_the_exact_ceiling(ratio, hidden):
    assert simmim_mask((40, 40), 4, 4, ratio, np.random.default_rng(0)).sum() == hidden


def test_masks_follow_the_generator_and_cover_every_unit_evenly():
    first = simmim_mask((32, 32), 8, 4, 0.6, np.random.default_rng(5))
    assert torch.equal(first, simmim_mask((32, 32), 8, 4, 0.6, np.random.default_rng(5)))
    rng = np.random.default_rng(0)
    share = torch.stack([simmim_mask((32, 32), 8, 4, 0.6, rng) for _ in range(2000)]).float().mean(0)
    assert (share - 10 / 16).abs().max() < 0.05  # 4.6 standard errors


def test_units_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"task.mask_unit_px \(24\) must be a multiple of model.patch_size \(4\)"):
        simmim_mask((32, 32), 24, 4, 0.6, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="must be a multiple of"):
        simmim_mask((32, 32), 8, 16, 0.6, np.random.default_rng(0))
