"""Memory that workers' batches lie in: used again, but never while anybody has a part of what lies there."""

from __future__ import annotations

import gc
import pickle
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from swinv2_train.data.loading.loader import EvalLoader, TrainLoader
from swinv2_train.data.loading.shared_memory import BatchMemory
from swinv2_train.data.sample import Targets
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.shards.tar_writer import write_shards
from tests.support.configs import make_config
from tests.support.images import image_bytes

WORKERS = make_config(data={"num_workers": 2}).data
ALONE = replace(WORKERS, num_workers=0)
ROW = {"image": torch.zeros(3, 5, 5, dtype=torch.uint8), "label": torch.tensor(0)}


class Transform:
    """The image and something random, of fixed shapes."""

    needs = ()

    def __call__(self, image: torch.Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"image": image[:, :8, :8], "mask": torch.from_numpy(rng.random(6) < 0.5)}


class AsItIs(Transform):
    def __call__(self, image: torch.Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"image": image}


@pytest.fixture
def shards(tmp_path) -> Manifest:
    return write_shards(
        [(f"k{i}", image_bytes(i, size=(12, 10)), "png", None) for i in range(26)],
        str(tmp_path / "t"),
        samples_per_shard=7,
    )


def train_loader(shards: Manifest, config) -> TrainLoader:
    return TrainLoader(shards, config, Transform(), 5, 12, 4, 0, 1, 0)


def content(batch: dict) -> tuple:
    return (batch["keys"], batch["image"].tolist(), batch["mask"].tolist(), batch["weight"].tolist())


def place(batch: dict) -> int:
    return batch["image"].untyped_storage().data_ptr()


def test_a_slot_holds_what_was_written_whatever_the_shapes_and_dtypes():
    memory = BatchMemory(ROW, rows=3, slots=2)
    slot = memory.take()
    written = {"image": torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8), "label": torch.tensor([7, -1, 2**40])}
    for name, tensor in memory.tensors(slot).items():
        tensor.copy_(written[name])
    arrived = pickle.loads(pickle.dumps(memory.placed(slot, {"keys": ["a", "b", "c"]})))
    assert arrived.pop("keys") == ["a", "b", "c"] and arrived.keys() == written.keys()
    assert all(torch.equal(arrived[name], written[name]) for name in written)


def test_a_slot_is_free_when_the_last_view_of_its_tensors_is_gone():
    memory = BatchMemory(ROW, rows=3, slots=1)
    slot = memory.take()
    assert memory.take() is None
    tensors = memory.received(slot)
    part = tensors["image"][1, :, 2:].flatten(1).numpy()
    del tensors
    gc.collect()
    assert memory.take() is None
    del part
    gc.collect()
    assert memory.take() == slot


def test_a_batch_that_is_kept_outlives_its_memory():
    memory = BatchMemory(ROW, rows=3, slots=1)
    kept = memory.received(memory.take())
    kept["label"].fill_(5)
    del memory
    gc.collect()
    assert kept["label"].tolist() == [5, 5, 5]


def test_batches_that_are_kept_are_never_written_over(shards):
    """All are compared at the end: more than there are slots, so that the last ones come in memory of their own."""
    expected = [content(batch) for batch in islice(train_loader(shards, ALONE), 40)]
    loader = train_loader(shards, WORKERS)
    kept = list(islice(loader, 40))
    loader.close()
    assert len(set(map(place, kept))) == 40
    assert [content(batch) for batch in kept] == expected


def test_batches_that_are_let_go_lie_where_others_lay(shards):
    """In as many places as there are batches under way, not in a new one each."""
    loader = train_loader(shards, WORKERS)
    places = [place(batch) for batch in islice(loader, 40)]
    loader.close()
    assert len(set(places)) <= WORKERS.num_workers * WORKERS.prefetch_batches + 3, len(set(places))


def test_passes_that_are_broken_off_lose_no_slot(shards):
    loader = EvalLoader(shards, WORKERS, Transform(), 4, 0, 1)
    for _ in range(4):
        next(iter(loader))
    places = [place(batch) for _ in range(3) for batch in loader]
    loader.close()
    assert len(set(places)) <= WORKERS.num_workers * WORKERS.prefetch_batches + 3, len(set(places))


def test_rows_of_other_shapes_than_expected_come_all_the_same(shards):
    """A transform that hands the image on as it is: the place kept for 64 x 64 pixels does not fit."""
    loader = EvalLoader(shards, WORKERS, AsItIs(), 4, 0, 1)
    shapes = {tuple(batch["image"].shape) for batch in loader}
    loader.close()
    assert shapes == {(4, 3, 12, 10)}
