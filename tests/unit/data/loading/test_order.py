"""The global order: exactly once per epoch, the same batches for every world size, resumable at any position."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from swinv2_train.data.loading.order import GlobalOrder, Location, rank_batch
from swinv2_train.data.sample import ShardError


def random_order(rng: random.Random) -> GlobalOrder:
    counts = [rng.choice([0, 1, rng.randint(2, 30)]) for _ in range(rng.randint(1, 12))]
    counts[rng.randrange(len(counts))] = rng.randint(1, 30)
    return GlobalOrder(counts, rng.randint(0, 10**6), rng.choice([1, 2, 7, 64]), rng.randint(1, 5))


def located(order: GlobalOrder, start: int, stop: int) -> list[Location]:
    return [order.locate(position) for position in range(start, stop)]


@pytest.mark.parametrize("trial", range(40))
def test_every_epoch_uses_every_sample_once_over_chains_of_world_sizes(trial):
    """Kills and restarts at other world sizes: nothing lost, nothing twice, the same set in every global batch."""
    rng = random.Random(trial)
    order = random_order(rng)
    every = {(shard, i) for shard, count in enumerate(order.counts) for i in range(count)}
    batch_size = rng.choice([6, 12, 24])
    epochs = 3
    reference = GlobalOrder(order.counts, order.seed, order.lanes, order.window_shards)
    position, seen = 0, Counter()
    while position < epochs * order.num_samples + batch_size:
        world = rng.choice([1, 2, 3, 6])
        order = GlobalOrder(order.counts, order.seed, order.lanes, order.window_shards)  # a fresh start
        for _ in range(rng.randint(1, 9)):
            parts = [rank_batch(order, position, batch_size, rank, world) for rank in range(world)]
            assert all(len(part) == batch_size // world for part in parts)
            together = [location for part in parts for location in part]
            assert together == rank_batch(reference, position, batch_size, 0, 1)
            assert set(together) == set(located(reference, position, position + batch_size))
            seen.update(together)
            position += batch_size
    for epoch in range(epochs):
        assert Counter({loc[1:]: n for loc, n in seen.items() if loc[0] == epoch}) == Counter(every)


def test_positions_are_a_pure_function_that_can_be_asked_in_any_order():
    order = GlobalOrder([10, 0, 25, 7], seed=3, lanes=4, window_shards=2)
    forward = located(order, 0, 200)
    scattered = random.Random(0).sample(range(200), 200)
    fresh = GlobalOrder([10, 0, 25, 7], seed=3, lanes=4, window_shards=2)
    assert {p: fresh.locate(p) for p in scattered} == dict(enumerate(forward))


def test_epochs_and_seeds_differ_in_order():
    order = GlobalOrder([50, 50], seed=0, lanes=8, window_shards=4)
    first, second = ([loc[1:] for loc in located(order, e * 100, e * 100 + 100)] for e in (0, 1))
    other = [loc[1:] for loc in located(GlobalOrder([50, 50], 1, 8, 4), 0, 100)]
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other


def test_a_rank_reads_only_its_own_lanes_when_the_world_divides_them():
    """What keeps reading local: at most lanes / world x window shards are open on a rank."""
    order = GlobalOrder([100] * 64, seed=0, lanes=16, window_shards=2)
    touched = {shard for step in range(4) for _, shard, _ in rank_batch(order, step * 64, 64, rank=0, world_size=4)}
    assert len(touched) <= 4 * (2 + 1)


def test_classes_that_lie_one_per_shard_are_mixed():
    """100 shards of one class each: a batch of 500 must hold nearly all classes (measured 99.8; one lane holds 4)."""
    order = GlobalOrder([200] * 100, seed=0, lanes=64, window_shards=4)
    classes = [len({shard for _, shard, _ in rank_batch(order, step * 500, 500, 0, 1)}) for step in range(5)]
    assert np.mean(classes) > 98


def test_no_samples_at_all_is_an_error():
    with pytest.raises(ShardError, match="data.shards holds no samples"):
        GlobalOrder([0, 0], 0, 4, 4)
