"""Views of an image with the labels of its pixels: against plain loops, for odd shapes, values and bands."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from swinv2_train.data.transforms.crop import random_dihedral
from swinv2_train.data.transforms.segment import (
    SegmentTrainView,
    draw_crop,
    eval_image,
    fit_inside,
    resize_image,
    resize_labels,
)

VIEW = SegmentTrainView(
    size=(32, 48), long_px=160, short_px=40, scale=(0.5, 2.0), resize="opencv", max_share=0.75, flip=0.5,
    dihedral=False, photometric=False, ignore_index=255, fill=(123.675, 116.28, 103.53),
)  # fmt: skip


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pair(height: int, width: int, classes: int = 5, bands: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.from_numpy(rng(1).integers(0, 256, (bands, height, width), np.uint8))
    return image, torch.from_numpy(rng(2).integers(0, classes, (height, width), np.uint8))


# --------------------------------------------------------------------------------------------------------------------
# Sizes and resizing


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((512, 683), (512, 683)), ((683, 512), (683, 512)), ((300, 400), (512, 683)), ((1000, 100), (2048, 205)),
     ((1, 5000), (1, 2048)), ((1, 1), (512, 512)), ((256, 1024), (512, 2048))],
)  # fmt: skip
def test_an_image_is_fitted_into_both_sides_in_either_direction(size, fitted):
    assert fit_inside(size, 2048, 512) == fitted


def opencv_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """INTER_LINEAR by its definition: two neighbours a side, around the centre, the border repeated; (H, W)."""
    found = np.empty(size)
    for row in range(size[0]):
        y = (row + 0.5) * image.shape[0] / size[0] - 0.5
        for column in range(size[1]):
            x = (column + 0.5) * image.shape[1] / size[1] - 0.5
            total = 0.0
            for r, wy in ((int(np.floor(y)), 1 - y % 1), (int(np.floor(y)) + 1, y % 1)):
                for c, wx in ((int(np.floor(x)), 1 - x % 1), (int(np.floor(x)) + 1, x % 1)):
                    total += wy * wx * image[np.clip(r, 0, image.shape[0] - 1), np.clip(c, 0, image.shape[1] - 1)]
            found[row, column] = total
    return found


@pytest.mark.parametrize(("old", "new"), [((7, 9), (3, 4)), ((5, 6), (11, 13)), ((1, 8), (1, 3)), ((9, 1), (4, 1))])
def test_resizing_as_opencv_takes_two_neighbours_whatever_the_size(old, new):
    image, labels = pair(*old)
    wanted = np.stack([opencv_bilinear(band, new) for band in image.numpy().astype(float)])
    assert np.abs(resize_image(image.float(), new, "opencv").numpy() - wanted).max() < 1e-4
    assert np.abs(resize_image(image, new, "opencv").numpy() - wanted).max() <= 0.5 + 1e-4  # rounded once
    rows, columns = (np.floor(np.arange(n) * o / n + 1e-9).astype(int) for n, o in zip(new, old, strict=True))
    assert np.array_equal(resize_labels(labels, new, "opencv"), labels.numpy()[rows][:, columns])


def test_resizing_is_opencvs_within_a_grey_level():
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless, the oracle, is not installed")
    image, labels = pair(61, 83)
    for size in ((20, 31), (100, 90), (61, 200)):
        theirs = cv2.resize(image.permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
        off = resize_image(image, size, "opencv").permute(1, 2, 0).numpy().astype(int) - theirs
        assert np.abs(off).max() <= 1
        nearest = cv2.resize(labels.numpy(), size[::-1], interpolation=cv2.INTER_NEAREST)
        assert np.array_equal(resize_labels(labels, size, "opencv"), nearest)


def test_the_antialiased_way_sees_every_pixel_and_labels_lie_under_their_centres():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, 3, 3] = 200
    assert resize_image(image, (1, 1), "antialias").item() > 0 == resize_image(image, (2, 2), "opencv")[0, 0, 0].item()
    labels = torch.arange(9, dtype=torch.uint8).view(1, 9)
    assert resize_labels(labels, (1, 3), "antialias").tolist() == [[1, 4, 7]]
    assert resize_labels(labels, (1, 3), "opencv").tolist() == [[0, 3, 6]]


@pytest.mark.parametrize("how", ["opencv", "antialias"])
def test_no_data_spreads_to_what_it_reaches_and_no_further(how):
    values = torch.rand(4, 12, 12)
    values[1, :, 6:] = torch.nan
    resized = resize_image(values, (6, 6), how)
    assert not resized[[0, 2, 3]].isnan().any() and not resized[1, :, :2].isnan().any()
    assert resized[1, :, 3:].isnan().all() and resized.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# The crop


def test_a_crop_is_drawn_again_until_two_classes_share_it():
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 48:] = 1
    for seed in range(50):
        top, left = draw_crop(labels, (16, 16), 0.75, 255, rng(seed))
        draws = rng(seed).integers([49, 49], size=(11, 2))
        shares = [(labels[t : t + 16, c : c + 16] == 0).float().mean().item() for t, c in draws.tolist()]
        good = [number for number, share in enumerate(shares[:10]) if max(share, 1 - share) < 0.75]
        assert [top, left] == draws[good[0] if good else 10].tolist()


def test_ignored_pixels_are_no_class_and_share_in_nothing():
    """Two thirds ignored, the rest 2 to 1: the largest class has 2/3 of what is labelled, which is enough of a mix."""
    labels = torch.full((1, 9), 255, dtype=torch.uint8)
    labels[0, :3] = torch.tensor([0, 0, 1])
    for dtype in (torch.uint8, torch.int32):
        wide = labels.to(dtype).repeat(1, 2)
        first = rng(5).integers([1, 10], size=(11, 2))[0].tolist()
        good = draw_crop(wide, (1, 9), 0.75, 255, rng(5))
        assert list(good) == first  # any nine neighbours hold the same
        assert list(draw_crop(wide, (1, 9), 0.6, 255, rng(5))) == rng(5).integers([1, 10], size=(11, 2))[10].tolist()


def test_a_crop_of_nothing_labelled_is_the_last_draw():
    labels = torch.full((20, 20), 255, dtype=torch.uint8)
    assert list(draw_crop(labels, (4, 4), 0.75, 255, rng(1))) == rng(1).integers([17, 17], size=(11, 2))[10].tolist()


def test_as_many_numbers_are_drawn_whatever_the_crop():
    mixed, plain = pair(64, 64)[1], torch.zeros(64, 64, dtype=torch.uint8)
    after = []
    for labels in (mixed, plain):
        numbers = rng(3)
        draw_crop(labels, (16, 16), 0.75, 255, numbers)
        after.append(numbers.random())
    assert after[0] == after[1]


# --------------------------------------------------------------------------------------------------------------------
# The whole view


def reference(view: SegmentTrainView, image: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[Any, Any]:
    """The view by plain steps: resize all, crop, mirror, pad."""
    numbers = rng(seed)
    drawn = view.scale[0] + (view.scale[1] - view.scale[0]) * numbers.random()
    size = fit_inside(labels.shape, int(view.long_px * drawn), int(view.short_px * drawn))
    big, big_labels = resize_image(image, size, view.resize), resize_labels(labels, size, view.resize)
    top, left = draw_crop(big_labels, view.size, view.max_share, view.ignore_index, numbers)
    flipped = numbers.random() < view.flip
    pixels = np.empty((len(image), *view.size), big.numpy().dtype)
    found = np.full(view.size, view.ignore_index)
    for row in range(view.size[0]):
        for column in range(view.size[1]):
            r, c = top + row, left + column
            if flipped:
                c = left + min(view.size[1], size[1]) - 1 - column
            inside = row < size[0] and column < size[1]
            for band in range(len(image)):
                fill = view.fill[band]
                pixels[band, row, column] = (
                    big[band, r, c] if inside else round(fill) if big.dtype == torch.uint8 else fill
                )
            if inside:
                found[row, column] = big_labels[r, c]
    return pixels, found


@pytest.mark.parametrize("size", [(50, 70), (20, 20), (1, 90), (90, 1), (200, 30), (1, 1)])
@pytest.mark.parametrize("bands", [3, 5])
def test_a_view_is_what_plain_steps_make_of_it(size, bands):
    view = replace(VIEW, size=(24, 24), fill=tuple(range(1, bands + 1)))
    for seed in range(3):
        image, labels = pair(*size, bands=bands)
        if bands == 5:
            image = image.float()
        got_image, got_labels, inside = view(image, labels, rng(seed))
        pixels, wanted = reference(view, image, labels, seed)
        assert np.array_equal(got_image, pixels) and np.array_equal(got_labels, wanted)
        assert got_image.dtype == image.dtype and got_labels.dtype == torch.uint8
        assert tuple(got_image.shape[1:]) == tuple(got_labels.shape) == view.size
        height, width = inside.tolist()
        assert (got_labels[:height, :width] < 5).all() and (got_labels == 255).sum() == 24 * 24 - height * width


def test_a_view_is_a_function_of_its_own_numbers_alone():
    image, labels = pair(50, 70)
    kept = image.clone(), labels.clone()
    view = replace(VIEW, photometric=True, dihedral=True)
    first = view(image, labels, rng(4))
    again = pickle.loads(pickle.dumps(view))(image, labels, rng(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], view(image, labels, rng(5))[0])
    assert torch.equal(image, kept[0]) and torch.equal(labels, kept[1])


def test_colours_change_the_image_alone():
    image, labels = pair(50, 70)
    plain, coloured = VIEW(image, labels, rng(0)), replace(VIEW, photometric=True)(image, labels, rng(0))
    assert torch.equal(plain[1], coloured[1]) and not torch.equal(plain[0], coloured[0])


def test_an_image_and_its_labels_turn_together():
    """Labels that are the image's own first band stay so in all eight directions."""
    image = torch.from_numpy(rng().integers(0, 200, (1, 33, 33), np.uint8)).repeat(3, 1, 1)
    view = replace(VIEW, size=(33, 33), long_px=33, short_px=33, scale=(1.0, 1.0), dihedral=True, flip=0.0)
    seen = set()
    for seed in range(40):
        turned, labels, _ = view(image, image[0], rng(seed))
        assert torch.equal(turned[0], labels)
        assert torch.equal(turned, random_dihedral(image, rng(seed)))
        seen.add(labels.numpy().tobytes())
    assert len(seen) == 8


def test_sixteen_bit_labels_are_padded_with_what_is_ignored():
    image, labels = pair(4, 4)
    view = replace(VIEW, ignore_index=65535, scale=(0.1, 0.1))
    _, got, inside = view(image, labels.int() + 300, rng(0))
    assert got.dtype == torch.int32 and got[0, 0] >= 300 and got[-1, -1] == 65535 and inside.tolist() == [4, 4]


def test_evaluation_fits_the_whole_image_in():
    image, _ = pair(30, 90)
    assert eval_image(image, 160, 40, "opencv").shape == (3, 40, 120)
    assert torch.equal(eval_image(image, 90, 30, "antialias"), image)
