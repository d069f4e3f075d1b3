"""The balanced order: equal shares of classes, every image in turn, the same batches for every world size."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.balanced_order import BalancedOrder
from swinv2_train.data.loading.loader import TrainLoader, order_of
from swinv2_train.data.loading.order import rank_batch, rank_shards
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.label_counts import class_counts, sample_classes
from tests.support.configs import composed
from tests.support.images import image_bytes


def random_case(trial: int) -> tuple[BalancedOrder, np.ndarray]:
    rng = random.Random(trial)
    counts = [rng.choice([0, 1, rng.randint(2, 30)]) for _ in range(rng.randint(1, 12))]
    counts[rng.randrange(len(counts))] = rng.randint(5, 30)
    classes = rng.randint(1, 5)
    labels = np.array([rng.choices(range(-1, classes), [0.3, *(9**-each for each in range(classes))])[0]
                       for _ in range(sum(counts))])  # fmt: skip
    labels[0] = 0
    return BalancedOrder(counts, labels, rng.randint(0, 999), rng.choice([1, 2, 7, 64]), rng.randint(1, 5)), labels


@pytest.mark.parametrize("trial", range(25))
def test_classes_have_equal_shares_and_images_of_a_class_take_turns(trial):
    """Over some epochs: no class has one more than another, no image of a class two more, and no crop comes twice."""
    order, labels = random_case(trial)
    first = np.concatenate([[0], np.cumsum(order.counts)])
    total = order.num_samples
    every: list[tuple[int, int, int]] = []
    for epoch in range(4):
        found = [order.locate(position) for position in range(epoch * total, (epoch + 1) * total)]
        every += found
        classes = Counter(labels[first[shard] + index] for _, shard, index in found)
        assert classes.keys() == set(labels[labels >= 0].tolist())
        assert max(classes.values()) - min(classes.values()) <= 1
        images = Counter((shard, index) for _, shard, index in every)
        for each in classes:
            uses = [images[shard, index] for shard, count in enumerate(order.counts) for index in range(count)
                    if labels[first[shard] + index] == each]  # fmt: skip
            assert max(uses) - min(uses) <= 1
    assert len(set(every)) == len(every)
    assert {passes for passes, *place in every if tuple(place) == every[0][1:]} == set(range(images[every[0][1:]]))


@pytest.mark.parametrize("trial", [pytest.param(n, marks=pytest.mark.slow) if n in (1, 2, 5) else n for n in range(10)])
def test_every_world_size_has_the_same_batches_from_any_position(trial):
    """Kills and restarts at other world sizes and positions, across epochs; what is to be at hand is what is read."""
    order, labels = random_case(trial)
    rng = random.Random(trial)
    sizes = (order.seed, order.lanes, order.window_shards)
    reference = [order.locate(position) for position in range(4 * order.num_samples + 24)]
    for _ in range(12):
        position, world = rng.randrange(len(reference) - 24), rng.choice([1, 2, 3, 6])
        fresh = BalancedOrder(order.counts, labels, *sizes)
        parts = [rank_batch(fresh, position, 12, rank, world) for rank in range(world)]
        assert Counter(each for part in parts for each in part) == Counter(reference[position : position + 12])
        for rank, part in enumerate(parts):
            now, _ = rank_shards(fresh, position, 12, rank, world, 4)
            assert {shard for _, shard, _ in part} <= set(now)


def test_an_order_without_any_class_is_refused():
    with pytest.raises(ShardError, match="no image of data.shards has a class; set data.balanced=false"):
        BalancedOrder([3], np.full(3, -1), 0, 1, 1)


LABELS = [0, 0, 0, 2, 0, 0, None, 2, 0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("balanced")
    rows = ((f"k{number}", image_bytes(number), "png", label) for number, label in enumerate(LABELS))
    write_shards(rows, str(folder / "s"), 4)
    return f"{folder}/s-*.tar"


def test_shards_tell_the_classes_of_their_images_without_being_read(shards):
    source = open_source(shards)
    assert sample_classes(source, "key").tolist() == [-1 if label is None else label for label in LABELS]
    assert sample_classes(source.relabelled([1, 1, 0], ("b", "a")), "key").tolist() == [1, 1, 1, 0, 1, 1, -1, 0, 1]
    applies, known = class_counts(source, 4, "key")
    assert applies.tolist() == [6, 0, 2, 0] and known.tolist() == [8] * 4


def test_the_loader_reads_this_order_and_a_resume_with_the_other_is_refused(shards):
    config = composed(["task=classify", "data=cifar10", "model=demo", "run_dir=u", "data.balanced=true"])
    source = open_source(shards)
    assert isinstance(order_of(source, 0, config.data), BalancedOrder)
    loaders = {}
    for balanced in (True, False):
        data = composed(["data=cifar10", "model=demo", "task=classify", "run_dir=u", f"data.balanced={balanced}"]).data
        loaders[balanced] = TrainLoader(source, data, _Transform(), 0, 2, 2, 0, 1, 0)
    state = loaders[True].state_dict(4, 0)
    loaders[True].check_state(state)
    with pytest.raises(ConfigError, match=r"data.balanced \(false\) differs from the checkpoint's"):
        loaders[False].check_state(state)
    keys = [key for _, batch in zip(range(18), loaders[True], strict=False) for key in batch["keys"]]
    rare = sum(key in ("k3", "k7") for key in keys)
    assert rare == 18 and "k6" not in keys
    for loader in loaders.values():
        loader.close()


class _Transform:
    needs = ()

    def __call__(self, image, targets, rng):
        return {"images": image[:, :4, :4]}
