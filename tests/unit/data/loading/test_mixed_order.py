"""The order of a mixture: a pure function of the position, exact shares, every sample once per pass, on any ranks."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.mixed_order import MixedOrder, turns_of
from swinv2_train.data.loading.order import GlobalOrder, rank_batch, rank_positions, rank_shards
from swinv2_train.data.sources.mixture import whole_weights

COUNTS = [[7, 5], [11, 0, 9], [3]]


def mixed(weights=(5, 3, 2), seed=0, lanes=2) -> MixedOrder:
    return MixedOrder(COUNTS, weights, seed, lanes, 2)


def source_of(order: MixedOrder, shard: int) -> int:
    return int(np.searchsorted(order.first_shards, shard, side="right")) - 1


@pytest.mark.parametrize("weights", [(5, 3, 2), (1, 1, 1), (97, 2, 1)])
def test_every_window_has_each_source_its_weight_times_and_batches_are_close(weights):
    order = mixed(weights)
    sources = [source_of(order, order.locate(place)[1]) for place in range(4 * order.window + 16)]
    for first in range(0, 4 * order.window, order.window):
        assert Counter(sources[first : first + order.window]) == dict(enumerate(weights))
    for size in (1, 4, 7, 16):  # a batch has each source's share, less than two samples off
        for first in range(0, len(sources) - size, size):
            found = Counter(sources[first : first + size])
            assert all(abs(found[i] - size * w / order.window) < 2 for i, w in enumerate(weights))
    assert order.counted(3 * order.window + 4) == [
        Counter(sources[: 3 * order.window + 4])[i] for i in range(len(weights))
    ]


def test_shares_are_less_than_one_image_off_before_any_position_for_any_weights():
    """So a batch's are less than two off wherever it begins.  Turns sorted by their middles alone were 3.5 off."""
    rng = random.Random(0)
    for _ in range(60):
        weights = whole_weights(
            {str(i): rng.choice([1, 2, 3, 7, 0.1, 0.25, 0.7, 10]) for i in range(rng.randint(2, 9))}
        )
        window, counted = sum(weights), [0] * len(weights)
        for position, number in enumerate(turns_of(weights), 1):
            counted[number] += 1
            assert all(abs(c * window - position * w) < window for c, w in zip(counted, weights, strict=True)), weights
        assert tuple(counted) == weights


def test_each_pass_over_a_source_has_each_of_its_samples_once_in_its_own_order():
    order = mixed()
    found: dict[int, list] = {0: [], 1: [], 2: []}
    for place in range(400):
        passes, shard, index = order.locate(place)
        source = source_of(order, shard)
        found[source].append((passes, shard - order.first_shards[source], index))
    for source, counts in enumerate(COUNTS):
        alone = GlobalOrder(counts, 0, 2, 2)
        assert found[source] == [alone.locate(place) for place in range(len(found[source]))]
        size = sum(counts)
        assert len(found[source]) > size
        assert len(set(found[source][:size])) == size and {each[0] for each in found[source][:size]} == {0}


def test_any_number_of_ranks_and_any_start_read_the_same_images_of_every_step():
    order, again = mixed(), mixed()
    for start in (0, 12, 36, 120):
        one = sorted(order.locate(place) for place in range(start, start + 12))
        for ranks in (1, 2, 3, 4):
            parts = [rank_batch(again, start, 12, rank, ranks) for rank in range(ranks)]
            assert {len(part) for part in parts} == {12 // ranks}
            assert sorted(place for part in parts for place in part) == one


def test_every_rank_reads_of_every_source():
    """A rank with one source alone would wait for the others' ranks, or they for it."""
    order = MixedOrder([[50, 50], [50, 50]], (1, 1), 0, lanes=4, window_shards=1)
    for rank in (0, 1):
        positions = rank_positions(order, 0, 16, rank, 2)
        assert Counter(source_of(order, order.locate(place)[1]) for place in positions) == {0: 4, 1: 4}


def test_the_shards_that_are_said_to_come_are_those_that_are_read():
    order = MixedOrder([[8] * 6, [8] * 4], (3, 1), 0, lanes=2, window_shards=1)
    for start in (0, 16, 48):
        now, later = rank_shards(order, start, 8, 0, 1, ahead=10)
        read = [order.locate(place)[1] for place in range(start, start + 8)]
        assert set(read) <= set(now) and not set(now) & set(later)
        coming = [order.locate(place)[1] for place in range(start, start + 200)]
        assert set(later) <= set(coming)
        assert min(later, key=coming.index) == later[0]


def test_weights_become_the_smallest_whole_numbers():
    assert whole_weights({"a": 0.7, "b": 0.2, "c": 0.1}) == (7, 2, 1)
    assert whole_weights({"a": 1.0, "b": 1.0}) == (1, 1) and whole_weights({"a": 3.0}) == (1,)
    with pytest.raises(ConfigError, match=r"data.mix: the weights \(a 0.333333, b 0.666667\) are .* round them"):
        whole_weights({"a": 0.333333, "b": 0.666667})
