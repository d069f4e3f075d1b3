"""Rows of images as one picture."""

from __future__ import annotations

import numpy as np
import pytest

from swinv2_train.evaluation.confusion import Confusion, confusion_map
from swinv2_train.report.pictures import grid


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


# --------------------------------------------------------------------------------------------------------------------
# Confusion matrices


def confusion(num_classes: int, *pairs: tuple[int, int, int]) -> Confusion:
    """From (right, predicted, images)."""
    true, predicted, count = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    return Confusion(num_classes, true, predicted, count)


def corner(picture: np.ndarray, cell: int, row: int, column: int) -> list[int]:
    """The colour of a cell near its corner, where no number stands."""
    return picture[44 + cell * row + 2, 44 + cell * column + 2].tolist()


def test_rows_of_a_confusion_matrix_are_right_classes_and_each_is_shaded_by_its_own_images() -> None:
    """3 of 4 is as dark as 75 of 100; white is never, grey a class without images."""
    picture = confusion_map(confusion(3, (0, 0, 1), (0, 1, 3), (1, 0, 25), (1, 1, 75)))
    cells = [[corner(picture, 44, row, column) for column in range(3)] for row in range(3)]
    assert cells[0][0] == cells[1][0] and cells[0][1] == cells[1][1]  # 25 % and 75 %
    assert sum(cells[0][1]) < sum(cells[0][0]) < 3 * 255
    assert cells[0][2] == cells[1][2] == [255, 255, 255]
    assert all(cell == [200, 200, 200] for cell in cells[2])


def test_a_few_classes_have_their_numbers_and_many_have_none() -> None:
    """A cell with a number holds more than one colour."""
    few = confusion_map(confusion(25, (0, 0, 1)))[44:88, 44:88]
    many = confusion_map(confusion(26, (0, 0, 1)))[45:80, 45:80]
    assert len(np.unique(few.reshape(-1, 3), axis=0)) > 1
    assert len(np.unique(many.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("classes", [1, 2, 10, 25, 26, 100, 1000, 1001, 21841])
def test_confusion_matrix_of_any_size_is_a_picture_that_fits_a_screen(classes: int) -> None:
    """Beyond 1000 classes rows are ranges of classes; the diagonal stays the diagonal."""
    labels = np.arange(classes)
    picture = confusion_map(Confusion(classes, labels, labels, np.ones(classes, np.int64)))
    bins = min(classes, 1000)
    cell = 44 if classes <= 25 else 1000 // bins
    assert picture.dtype == np.uint8 and picture.shape[0] == bins * cell + 3 * 44 <= 1232
    area = picture[44 : 44 + bins * cell : cell, 44 : 44 + bins * cell : cell]
    if classes > 25:
        assert (area[np.arange(bins), np.arange(bins)] == (16, 56, 128)).all()
        assert (area.sum(axis=2) < 3 * 255).sum() == bins


def test_ranges_of_classes_add_up_their_images() -> None:
    """2000 classes in 1000 rows: classes 0 and 1 share the first, half of whose images went to the last."""
    picture = confusion_map(confusion(2000, (0, 0, 3), (1, 1, 1), (1, 1999, 4)))
    assert picture[44, 44].tolist() == picture[44, 44 + 999].tolist() != [255, 255, 255]
    assert picture[44, 45].tolist() == [255, 255, 255] and picture[45, 44].tolist() == [200, 200, 200]


def test_confusion_matrix_of_nothing_is_grey() -> None:
    assert corner(confusion_map(confusion(2)), 44, 0, 0) == [200, 200, 200]
