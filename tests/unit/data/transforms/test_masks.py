"""SimMIM's masks: the published share, whole units, any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.transforms.masks import simmim_mask


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


@pytest.mark.parametrize(
    ("size", "unit", "units", "hidden"),
    [((192, 192), 32, 36, 22), ((192, 256), 32, 48, 29), ((128, 256), 32, 32, 20), ((256, 128), 16, 128, 77)],
)
def test_every_unit_and_every_pair_of_units_is_hidden_equally_often(size, unit, units, hidden):
    """Uniform over all choices of that many units: a unit is hidden with hidden / units, two of them together with
    hidden (hidden - 1) / (units (units - 1)).  Bounds of five standard errors over 4,000 masks."""
    rng, draws = np.random.default_rng(0), 4000
    masks = torch.stack([simmim_mask(size, unit, unit, 0.6, rng) for _ in range(draws)]).flatten(1).double()
    assert masks.shape[1] == units and (masks.sum(1) == hidden).all()
    single = hidden / units
    assert (masks.mean(0) - single).abs().max() < 5 * (single * (1 - single) / draws) ** 0.5
    together = single * (hidden - 1) / (units - 1)
    pairs = (masks.T @ masks / draws)[~torch.eye(units, dtype=torch.bool)]
    assert (pairs - together).abs().max() < 5 * (together * (1 - together) / draws) ** 0.5


def test_units_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"task.mask_unit_px \(24\) must be a multiple of model.patch_size \(4\)"):
        simmim_mask((32, 32), 24, 4, 0.6, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="must be a multiple of"):
        simmim_mask((32, 32), 8, 16, 0.6, np.random.default_rng(0))
