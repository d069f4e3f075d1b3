"""Rows of images as one picture."""

from __future__ import annotations

import numpy as np
import pytest

from swinv2_train.pictures import grid


def image(value: int, height: int = 96, width: int = 96) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_rows_and_columns_are_where_they_belong() -> None:
    picture = grid([[image(10), image(20), image(30)], [image(40), image(50), image(60)]])
    assert picture.shape == (96 * 2 + 4, 96 * 3 + 8, 3)
    assert [picture[y, x, 0] for y in (50, 150) for x in (50, 150, 250)] == [10, 20, 30, 40, 50, 60]
    assert (picture[:, 96:100] == 255).all() and (picture[96:100] == 255).all()


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    """A 32 px image of CIFAR-10 is a stamp on a screen; interpolation would hide what the model drew."""
    small = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = grid([[small]])
    assert picture.shape == (96, 96, 3)
    assert np.array_equal(picture[1::3, 1::3], small)


def test_labels_take_their_own_line_and_leave_the_images_alone() -> None:
    plain = grid([[image(10), image(20)]])
    labelled = grid([[image(10), image(20)]], ["original", "masked"])
    assert np.array_equal(labelled[16:], plain)
    assert (labelled[:16, :96] != 255).any() and (labelled[:16, 100:] != 255).any()


@pytest.mark.parametrize(
    ("rows", "labels", "match"),
    [
        ([], (), "at least one"),
        ([[image(1)], [image(1), image(2)]], (), "every row needs 1"),
        ([[image(1), image(1, height=50)]], (), "every row needs 2"),
        ([[image(1).astype(np.float32)]], (), "uint8"),
        ([[image(1)[..., 0]]], (), "expected"),
        ([[image(1)]], ("a", "b"), "2 labels for 1"),
    ],
)
def test_what_forms_no_grid_is_refused(rows, labels, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        grid(rows, labels)
