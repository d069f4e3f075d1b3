"""What is drawn of a query: its reach, itself, and what it never looks at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swinv2_train.inspection.attention import Attention, BlockPlace
from swinv2_train.inspection.heat import (
    IMAGE_PX,
    activation_picture,
    attention_picture,
    colours_of,
    heads_picture,
    query_picture,
    view_of,
)
from swinv2_train.models.windows import window_grid

PX = 4


def attention(size: tuple[int, int], window: tuple[int, int], rows: slice, columns: slice) -> Attention:
    """Three heads that look at the first token of the reach alone; the query is its last."""
    reach = torch.zeros(size, dtype=torch.bool)
    reach[rows, columns] = True
    weights = torch.zeros(3, *size)
    weights[:, rows.start, columns.start] = 1.0
    query = rows.stop - 1, columns.stop - 1
    return Attention(BlockPlace(0, 0), window_grid(size, window, True), query, weights, reach)


def test_reach_query_and_the_rest_can_be_told_apart():
    looked = attention((8, 8), (4, 4), slice(2, 6), slice(4, 8))
    image = np.full((32, 32, 3), (200, 100, 40), np.uint8)
    picture = np.asarray(attention_picture(image, looked, looked.weights[0].numpy(), PX, 8 * 16))
    assert picture.shape == (128, 128, 3)
    dim, cold, hot = picture[8, 8], picture[4 * 16 + 8, 6 * 16 + 8], picture[2 * 16 + 8, 4 * 16 + 8]
    assert len(set(dim.tolist())) == 1 and dim[0] < 40  # grey
    assert cold.tolist() == pytest.approx(0.75 * image[0, 0] + 0.25 * colours_of(np.array(0.0)), abs=1)
    assert hot.tolist() == pytest.approx(0.15 * image[0, 0] + 0.85 * colours_of(np.array(1.0)), abs=1)
    assert picture[2 * 16, 5 * 16].tolist() == [255, 255, 255] and picture[6 * 16 - 1, 5 * 16].tolist() == [255] * 3
    assert picture[5 * 16, 7 * 16 + 8].tolist() == [0, 229, 255]


def test_a_small_window_is_shown_with_as_much_around_it():
    at_the_end = attention((20, 30), (4, 6), slice(16, 20), slice(0, 6))
    assert view_of(at_the_end) == (12, 0, 8, 12)
    assert view_of(attention((20, 30), (4, 6), slice(6, 10), slice(12, 18))) == (4, 9, 8, 12)
    assert view_of(attention((3, 5), (4, 6), slice(0, 3), slice(0, 5))) == (0, 0, 3, 5)
    beyond = attention_picture(np.full((77, 119, 3), 255, np.uint8), at_the_end, at_the_end.weights[0].numpy(), PX, 96)
    assert beyond.size == (96, 64)  # a map may reach beyond its image


def test_a_sheet_has_a_row_for_a_query_and_a_column_for_a_head():
    looked = attention((8, 8), (4, 4), slice(0, 4), slice(0, 4))
    assert heads_picture(np.zeros((32, 32, 3), np.uint8), [looked, looked], PX).size == (3 * 75, 2 * 75)


def test_activations_lie_where_their_places_are():
    """On an image of 20 x 40 px whose map of 3 x 5 tokens of 8 px reaches beyond it."""
    places = np.zeros((3, 5), np.float32)
    places[0, 4] = 2.0
    picture = np.asarray(activation_picture(np.full((20, 40, 3), 90, np.uint8), places, 8)).astype(int)
    assert picture.shape == (IMAGE_PX // 2, IMAGE_PX, 3)
    hottest = np.unravel_index(picture.sum(axis=2).argmax(), picture.shape[:2])
    assert hottest[0] < 45 and hottest[1] > 180
    assert np.ptp(picture[:, :100].reshape(-1, 3), axis=0).max() == 0
    nothing = np.asarray(activation_picture(np.full((20, 40, 3), 90, np.uint8), np.zeros((3, 5), np.float32), 8))
    assert np.ptp(nothing.reshape(-1, 3), axis=0).max() == 0


def test_queries_are_marked_within_the_image():
    picture = np.asarray(query_picture(np.zeros((10, 10, 3), np.uint8), [(0.0, 0.0), (1.0, 1.0)]))
    assert picture[:20, :20].max() == 255 and picture[-20:, -20:].max() == 255 and picture[60:70, 60:70].max() == 0
