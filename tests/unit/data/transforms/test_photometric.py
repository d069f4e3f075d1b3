"""Changes of colour: the arithmetic of 8 bits that OpenCV has, step by step, and random numbers of one order."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from swinv2_train.data.transforms.photometric import hsv_of, photometric_distortion, rgb_of


def every_colour(step: int = 5) -> np.ndarray:
    """uint8 (3, N, N) of colours throughout the cube, all greys and the corners among them."""
    axis = np.unique(np.r_[np.arange(0, 256, step), 255]).astype(np.uint8)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")).reshape(3, -1)
    return grid.reshape(3, len(axis), -1)


def test_hue_and_saturation_are_those_of_the_formula_within_rounding():
    """colorsys knows the formula in floating point; 8 bits round it to half a step."""
    pixels = every_colour(51)
    hsv = hsv_of(pixels).reshape(3, -1).T
    for (red, green, blue), found in zip(pixels.reshape(3, -1).T / 255, hsv, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        off = abs(int(found[0]) - 180 * hue)
        assert min(off, 180 - off) <= 0.51 and abs(int(found[1]) - 255 * saturation) <= 0.51
        assert found[2] == round(255 * value)


def test_the_way_back_is_the_formulas_too():
    hue, saturation = np.meshgrid(np.arange(180), np.arange(0, 256, 15), indexing="ij")
    for value in (0, 1, 100, 255):
        hsv = np.stack([hue, saturation, np.full_like(hue, value)]).astype(np.uint8)
        rgb = rgb_of(hsv).reshape(3, -1).T
        for (h, s, v), found in zip(hsv.reshape(3, -1).T.tolist(), rgb, strict=True):
            wanted = 255 * np.array(colorsys.hsv_to_rgb(h / 180, s / 255, v / 255))
            assert np.abs(found - wanted).max() <= 0.501


def test_both_ways_are_opencvs_bit_for_bit():
    """Of the way back OpenCV has two: one pixel at a time it rounds, several at a time it truncates, a level apart."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless, the oracle, is not installed")
    pixels = every_colour(3)
    hsv = cv2.cvtColor(np.ascontiguousarray(pixels.transpose(1, 2, 0)), cv2.COLOR_RGB2HSV)
    assert np.array_equal(hsv_of(pixels), hsv.transpose(2, 0, 1))
    ours = rgb_of(hsv.transpose(2, 0, 1))
    assert np.abs(ours.astype(int) - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).transpose(2, 0, 1)).max() <= 1
    for row, column in np.random.default_rng(0).integers(0, hsv.shape[:2], (1000, 2)):
        single = cv2.cvtColor(np.ascontiguousarray(hsv[row : row + 1, column : column + 1]), cv2.COLOR_HSV2RGB)
        assert np.array_equal(ours[:, row, column], single[0, 0])


class Draws:
    """A generator whose draws are given: five coins, three amounts, the hue."""

    def __init__(self, coins: str, amounts: tuple[float, float, float] = (0.5, 0.5, 0.5), hue: int = 0) -> None:
        self._queue = [np.array([0.0 if coin == "1" else 0.9 for coin in coins]), np.array(amounts)]
        self._hue = hue

    def random(self, size: int) -> np.ndarray:
        return self._queue.pop(0)

    def integers(self, low: int, high: int) -> int:
        assert (low, high) == (-18, 18) and low <= self._hue < high
        return self._hue


PIXELS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (3, 4, 5), np.uint8))


def cut(values: np.ndarray) -> np.ndarray:
    return np.trunc(np.clip(values, 0, 255)).astype(np.uint8)


def test_brightness_and_contrast_are_cut_off_and_truncated_in_the_order_drawn():
    values = PIXELS.numpy().astype(np.float32)
    amounts = (0.9, 0.7, 0.5)  # + 25.6, x 1.2
    brighter = cut(values + np.float32(25.6))
    assert np.array_equal(photometric_distortion(PIXELS, Draws("10000", amounts)), brighter)
    assert np.array_equal(photometric_distortion(PIXELS, Draws("00100", amounts)), cut(values * np.float32(1.2)))
    first = photometric_distortion(PIXELS, Draws("11110", amounts[:2] + (0.0,)))
    halved = hsv_of(cut(brighter * np.float32(1.2)))
    halved[1] = cut(halved[1] * np.float32(0.5))
    assert np.array_equal(first, rgb_of(halved))
    last = photometric_distortion(PIXELS, Draws("10110", amounts[:2] + (0.0,)))
    halved = hsv_of(brighter)
    halved[1] = cut(halved[1] * np.float32(0.5))
    assert np.array_equal(last, cut(rgb_of(halved) * np.float32(1.2))) and not torch.equal(first, last)


@pytest.mark.parametrize("hue", [-18, -1, 0, 17])
def test_hue_goes_around(hue):
    hsv = hsv_of(PIXELS.numpy())
    hsv[0] = (hsv[0].astype(int) + hue) % 180
    assert np.array_equal(photometric_distortion(PIXELS, Draws("00001", hue=hue)), rgb_of(hsv))


def test_the_same_numbers_are_drawn_whatever_is_changed():
    """What is drawn afterwards must not depend on the coins."""
    after = set()
    for seed in range(20):
        rng, count = np.random.default_rng(seed), np.random.default_rng(seed)
        before = PIXELS.clone()
        photometric_distortion(PIXELS, rng)
        assert torch.equal(before, PIXELS)  # the image of the caller is left alone
        count.random(8), count.integers(-18, 18)
        after.add(rng.random() == count.random())
    assert after == {True}


def test_nothing_changes_where_no_coin_falls_and_grey_stays_grey():
    assert torch.equal(photometric_distortion(PIXELS, Draws("01000")), PIXELS)
    grey = torch.full((3, 2, 2), 77, dtype=torch.uint8)
    assert torch.equal(photometric_distortion(grey, Draws("00011", hue=7)), grey)
