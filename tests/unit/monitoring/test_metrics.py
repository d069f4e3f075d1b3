"""Means over ranks, speed, memory and MFU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swinv2_train.distributed import World
from swinv2_train.evaluation.confusion import Confusion, ConfusionCounter
from swinv2_train.monitoring import metrics
from swinv2_train.monitoring.metrics import (
    Means,
    Throughput,
    device_peak_flops,
    each_rank,
    mfu,
    peak_flops,
    peak_memory_gib,
    ranks_where,
)
from tests.support.clock import Clock
from tests.support.configs import composed

ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def test_a_mean_weighs_each_batch_by_its_images() -> None:
    means = Means()
    means.add({"val/loss": torch.tensor(1.0), "val/top1": torch.tensor(100.0)}, weight=3)
    means.add({"val/loss": torch.tensor(5.0), "val/top1": torch.tensor(0.0)}, weight=torch.tensor(1.0))
    assert means.read() == {"val/loss": 2.0, "val/top1": 75.0}


def test_reading_starts_anew() -> None:
    means = Means()
    means.add({"train/loss": torch.tensor(8.0)})
    assert means.read() == {"train/loss": 8.0}
    assert means.read() == {}
    means.add({"train/loss": torch.tensor(2.0)})
    assert means.read() == {"train/loss": 2.0}


def test_a_batch_of_weight_zero_does_not_count_even_when_its_mean_is_nan() -> None:
    """The last evaluation batches of a rank may hold stand-ins only; a mean over nothing is nan."""
    means = Means()
    means.add({"val/loss": torch.tensor(float("nan"))}, weight=0.0)
    assert math.isnan(means.read()["val/loss"])
    means.add({"val/loss": torch.tensor(float("nan"))}, weight=0.0)
    means.add({"val/loss": torch.tensor(4.0)}, weight=2.0)
    assert means.read() == {"val/loss": 4.0}


def test_a_nan_loss_that_counts_is_not_hidden() -> None:
    means = Means()
    means.add({"train/loss": torch.tensor(float("nan"))})
    means.add({"train/loss": torch.tensor(1.0)})
    assert math.isnan(means.read()["train/loss"])


def test_many_small_terms_do_not_drown() -> None:
    """In float32 the sum of 2**25 and ones would stand still."""
    means = Means()
    means.add({"x": torch.tensor(float(2**25))})
    for _ in range(64):
        means.add({"x": torch.tensor(1.0)})
    assert means.read()["x"] == (2**25 + 64) / 65


def test_adding_keeps_no_graph() -> None:
    means = Means()
    weight = torch.ones((), requires_grad=True)
    means.add({"train/loss": weight * 2})
    assert not any(total.requires_grad for total in means._sums.values())


def test_numbers_of_all_ranks_join(run_distributed) -> None:
    """Real gloo ranks: weighted mean, largest, and which ranks; ranks may have seen different numbers of images."""

    def on_rank(world: World) -> tuple[dict[str, float], dict[str, list[float]], list[int]]:
        means = Means()
        means.add({"b": torch.tensor(10.0 * world.rank), "a": torch.tensor(1.0)}, weight=1 + 2 * world.rank)
        values = each_rank({"mem": 1.0 + world.rank, "wait": -float(world.rank)}, world)
        return means.read(), values, ranks_where(world.rank == 1, world)

    for means, values, ranks in run_distributed(on_rank, 2):
        assert means == {"a": 1.0, "b": 7.5}
        assert values == {"mem": [1.0, 2.0], "wait": [0.0, -1.0]}
        assert ranks == [1]


def test_confusion_counts_pairs_of_rows_that_count() -> None:
    """Per class by plain loops; the padding of a last batch is no image, a class without images has no accuracy."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, (3, 16), generator=generator) for _ in range(5)]  # right (never 4), predicted, weight
    counter = ConfusionCounter(5)
    expected = np.zeros((5, 5), int)
    for right, predicted, weight in rows:
        counter.add(right, predicted, (weight > 0).float())
        for r, p, w in zip(right.tolist(), predicted.tolist(), weight.tolist(), strict=True):
            expected[r, p] += w > 0
    confusion = counter.read()
    dense = np.zeros((5, 5), int)
    dense[confusion.true, confusion.predicted] = confusion.count
    assert (dense == expected).all() and (confusion.count > 0).all()
    assert confusion.images().tolist() == expected.sum(axis=1).tolist()
    assert confusion.accuracy()[:4] == pytest.approx([100 * expected[k, k] / expected[k].sum() for k in range(4)])
    assert math.isnan(confusion.accuracy()[4])


def test_confusion_of_many_classes_is_sparse() -> None:
    """21,841 classes squared are 3.8 GB as int64; the largest code must not overflow either."""
    counter = ConfusionCounter(21841)
    counter.add(torch.tensor([21840, 0, 21840]), torch.tensor([21840, 21840, 21840]), torch.ones(3))
    confusion = counter.read()
    pairs = zip(confusion.true.tolist(), confusion.predicted.tolist(), confusion.count.tolist(), strict=True)
    assert list(pairs) == [(0, 21840, 1), (21840, 21840, 2)]


def test_confusion_joins_ranks_of_unequal_and_no_images(run_distributed) -> None:
    """Rank 1 has seen padding alone; the same counts on every rank."""

    def on_rank(world: World) -> Confusion:
        counter = ConfusionCounter(10)
        if world.rank == 1:
            counter.add(torch.tensor([7]), torch.tensor([7]), torch.zeros(1))
        for number in range(world.rank + 1 if world.rank != 1 else 0):
            counter.add(torch.tensor([number, 9]), torch.tensor([9 - number, 9]), torch.ones(2))
        return counter.read()

    for confusion in run_distributed(on_rank, 3):
        pairs = zip(confusion.true.tolist(), confusion.predicted.tolist(), confusion.count.tolist(), strict=True)
        assert list(pairs) == [(0, 9, 2), (1, 8, 1), (2, 7, 1), (9, 9, 4)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_the_first_step_and_pauses_are_not_part_of_the_speed(clock: Clock) -> None:
    """The first step pays for start-up; checkpoints and evaluation have numbers of their own."""
    speed = Throughput(images_per_step=100)
    clock.sleep(0.3)
    speed.step_done()
    assert speed.read() == {}
    for _ in range(2):
        clock.sleep(0.02)
        with speed.waiting_for_data():
            clock.sleep(0.03)
        with speed.paused():
            clock.sleep(0.3)
        speed.step_done()
    values = speed.read()
    assert values["perf/step_sec"] == pytest.approx(0.05) and values["data/wait_sec"] == pytest.approx(0.03)
    assert values["perf/images_per_sec"] == pytest.approx(100 / values["perf/step_sec"])
    assert speed.read() == {}


def test_a_wait_in_the_first_step_is_not_charged_to_the_second(clock: Clock) -> None:
    speed = Throughput(images_per_step=1)
    with speed.waiting_for_data():
        clock.sleep(0.2)
    speed.step_done()
    clock.sleep(0.1)
    speed.step_done()
    assert speed.read()["data/wait_sec"] == 0


def test_peak_memory_rises_with_an_allocation_and_stays() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(64 * 1024**2)  # 0.25 GiB
    during = peak_memory_gib(torch.device("cpu"))
    del block
    assert 0.01 < before <= during
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(during, abs=0.01)  # the kernel counts in batches
    assert during >= 0.25


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "tf32", 156.0),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_peak_of_known_devices(name: str, precision: str, tflops: float) -> None:
    assert peak_flops(name, precision) == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [("Intel(R) Xeon(R)", "bf16"), ("NVIDIA H200", "fp8"), ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16")],
)
def test_an_unknown_device_or_precision_has_no_peak_rather_than_a_wrong_one(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


@pytest.mark.parametrize("file", ["a100_40gb", "a100_80gb", "h100", "h200", "rtx4090"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_mfu_and_the_planner_know_one_peak_of_a_card(file: str, precision: str) -> None:
    """Two numbers for a card would give an MFU that no plan can reach, or the reverse."""
    hardware = composed(["run_dir=unused", "data.shards=unused", f"hardware={file}"]).hardware
    assert peak_flops(hardware.name, precision) == getattr(hardware, f"tflops_{precision}") * 1e12


def test_mfu_is_useful_arithmetic_over_the_peak_of_all_devices() -> None:
    """ViT-like numbers: 1 TFLOP an image, 312 images/s on 2 devices of 312 TFLOP/s are one half."""
    assert mfu(1e12, 312.0, 312e12, 2) == 0.5
    assert mfu(1e12, 312.0, None, 2) is None
    assert mfu(None, 312.0, 312e12, 2) is None
    assert mfu(1e12, None, 312e12, 2) is None
    assert device_peak_flops(torch.device("cpu"), "bf16") is None


def test_ranks_where_alone() -> None:
    assert ranks_where(True, ALONE) == [0]
    assert ranks_where(False, ALONE) == []
