"""Crops of values: Pillow's filter in float32, unrounded; no pixel is made of what was not measured."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_train.data.transforms.crop import centre_crop, random_dihedral, random_resized_crop, resize

SIZES = [((50, 70), (32, 32)), ((20, 33), (48, 40)), ((200, 31), (17, 31)), ((64, 64), (64, 20))]


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_float_bands_are_resized_as_pillow_resizes_its_mode_f(old, new, interpolation):
    """The same filter as for photographs, in float32: rounding to 8 bit would be off by half a step of 256."""
    image = torch.randn(5, *old) * 1000
    resized = resize(image, new, interpolation)
    for band in range(5):
        by_pillow = Image.fromarray(image[band].numpy()).resize(new[::-1], Image.Resampling[interpolation.upper()])
        np.testing.assert_allclose(resized[band].numpy(), np.asarray(by_pillow), atol=0.02)  # worst: 0.0067
    assert resized.dtype == torch.float32


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photographs_are_the_same_within_rounding(old, new, interpolation):
    image = torch.randint(60, 190, (3, *old), dtype=torch.uint8)  # no overshoot to be clipped
    as_float = resize(image.float(), new, interpolation).clamp(0, 255)
    assert (as_float - resize(image, new, interpolation).float()).abs().max() <= 2
    assert resize(image, new, interpolation).dtype == torch.uint8


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float16, np.float32])
def test_every_element_type_is_cropped_and_turned_as_float32_is(dtype):
    """The wire is float32, which holds each of them exactly; channels last in memory, as decoders give them."""
    values = np.random.default_rng(0).integers(0, 30_000, (24, 40, 6)).astype(dtype)
    raw, whole = (torch.from_numpy(each).permute(2, 0, 1) for each in (values, values.astype(np.float32)))
    for crop in (
        lambda image: random_resized_crop(image, (16, 16), (0.3, 1), (0.5, 2), "bicubic", np.random.default_rng(1)),
        lambda image: centre_crop(image, (16, 20), 0.8, "bilinear"),
        lambda image: resize(random_dihedral(image, np.random.default_rng(3)), (24, 40), "bilinear"),
        lambda image: resize(image, (24, 40), "bilinear"),
    ):
        assert torch.equal(crop(raw), crop(whole)) and crop(raw).dtype == torch.float32


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_no_value_is_made_of_what_was_not_measured(old, new, interpolation):
    """Whatever stands where nothing was measured, the values that are left are the same; a band has its own gaps."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, *old, generator=generator)
    missing = torch.zeros(3, *old, dtype=torch.bool)
    missing[0, : old[0] // 3, : old[1] // 4] = True
    missing[1] = torch.rand(*old, generator=generator) < 0.01
    resized = resize(image.masked_fill(missing, torch.nan), new, interpolation)
    left = ~resized.isnan()
    assert left[2].all() and left[0].any() and not left[0].all()
    for filler in (0.0, 1e3, -1e3):
        other = resize(image.masked_fill(missing, filler), new, interpolation)
        torch.testing.assert_close(resized[left], other[left], rtol=1e-5, atol=1e-5)
    reach = 2 + 2 * max(1.0, old[0] / new[0], old[1] / new[1]) * (2 if interpolation == "bicubic" else 1)
    far = torch.zeros(new, dtype=torch.bool)
    row, column = old[0] // 3 + reach, old[1] // 4 + reach
    far[int(row * new[0] / old[0]) + 1 :, :] = True
    far[:, int(column * new[1] / old[1]) + 1 :] = True
    assert left[0][far].all()  # and no more is lost than the filter's window


def test_the_eight_turns_are_drawn_equally_often_and_fit_any_shape():
    image = torch.arange(6).view(1, 2, 3)
    rng = np.random.default_rng(0)
    seen = Counter(tuple(random_dihedral(image, rng).flatten().tolist()) for _ in range(4000))
    assert len(seen) == 8 and min(seen.values()) > 400
    assert {tuple(random_dihedral(image, rng).shape) for _ in range(50)} == {(1, 2, 3), (1, 3, 2)}
