"""The scores of an evaluation: means, quotients of sums and what comes out of gathered rows, on any number of ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swinv2_train.distributed import World
from swinv2_train.evaluation.scoring import evaluate_loader, gather_rows
from swinv2_train.tasks.metrics import Metric, Records, Rows, Sums

CLASSES, IMAGES, PIXELS, BATCH = 5, 23, 40, 3


def images() -> tuple[Tensor, Tensor, Tensor]:
    """Right and predicted classes (IMAGES, PIXELS), and a confidence of each image's rows (IMAGES, 4)."""
    generator = torch.Generator().manual_seed(3)
    right = torch.randint(CLASSES, (IMAGES, PIXELS), generator=generator)
    wrong = torch.rand(IMAGES, PIXELS, generator=generator) < 0.4
    predicted = torch.where(wrong, torch.randint(CLASSES, (IMAGES, PIXELS), generator=generator), right)
    confidence = torch.rand(IMAGES, 4, generator=generator).round(decimals=1)  # many ties
    return right, predicted, confidence


def batches(rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    """A rank's share as EvalLoader deals it: neighbours, equally many batches, filled up with rows of weight 0."""
    share = -(-IMAGES // ranks)
    for first in range(rank * share, rank * share + share, BATCH):
        numbers = torch.arange(first, first + BATCH)
        counts = (numbers < min(IMAGES, (rank + 1) * share)) & (numbers % 7 != 5)  # and some damaged ones
        yield {"number": numbers.clamp(max=IMAGES - 1), "weight": counts.float()}


def miou(matrix: Tensor) -> dict[str, float]:
    assert matrix.dtype == torch.int64
    right = matrix.diag().double()
    union = matrix.sum(0) + matrix.sum(1) - right
    return {"val/miou": float((right / union).mean()), "val/pixels": float(matrix.sum())}


def average_precision(rows: Tensor) -> dict[str, float]:
    """Of equal confidence the later rows come first, so that their order shows in the result."""
    hits = rows.flip(0)[:, 1]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return {"val/ap": float((precision * hits).sum() / hits.sum().clamp(min=1)), "val/rows": float(len(rows))}


def score(batch: dict[str, Any]) -> dict[str, Metric]:
    """An image has 0 to 4 rows."""
    right, predicted, confidence = (each[batch["number"]] for each in images())
    codes = right * CLASSES + predicted
    matrix = torch.nn.functional.one_hot(codes, CLASSES**2).sum(dim=1).view(-1, CLASSES, CLASSES)
    image = torch.cat([torch.full((int(number) % 5,), row) for row, number in enumerate(batch["number"])])
    place = torch.cat([torch.arange(int(number) % 5) for number in batch["number"]])
    hit = (right[:, :4] == predicted[:, :4])[image, place]
    correct, weight = (right == predicted).double().mean(dim=1), batch["weight"]
    return {
        "val/loss": (correct * weight).sum() / weight.sum().clamp(min=1e-12),
        "areas": Sums(matrix.to(torch.int32), miou),
        "found": Rows(torch.stack([confidence[image, place], hit.float()], dim=1), image, average_precision),
        "told": Records([record(int(number)) for number in batch["number"]], digest),
    }


def record(number: int) -> bytes:
    """Of unequal lengths, 0 among them."""
    return str(number).encode() * (number % 4)


def digest(records: Sequence[bytes]) -> dict[str, float]:
    """Their number, and what tells each of them and their order."""
    return {"val/records": float(len(records)), "val/digest": float(zlib.crc32(b",".join(records)))}


def expected() -> dict[str, float]:
    """By plain loops over the images that count."""
    right, predicted, confidence = images()
    counted = [number for number in range(IMAGES) if number % 7 != 5]
    matrix = np.zeros((CLASSES, CLASSES), int)
    rows = []
    for number in counted:
        for r, p in zip(right[number].tolist(), predicted[number].tolist(), strict=True):
            matrix[r, p] += 1
        for place in range(number % 5):
            hit = float(right[number, place] == predicted[number, place])
            rows.append((float(confidence[number, place].double()), hit))
    ious = [matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]) for k in range(CLASSES)]
    found, precisions = 0, []
    for seen, (_, hit) in enumerate(sorted(rows, reverse=True), start=1):
        found += int(hit)
        precisions += [found / seen] if hit else []
    accuracy = np.mean([(right[number] == predicted[number]).float().mean() for number in counted])
    return {
        "val/loss": float(accuracy), "val/miou": float(np.mean(ious)), "val/pixels": float(len(counted) * PIXELS),
        "val/ap": float(np.mean(precisions)), "val/rows": float(len(rows)),
        **digest(sorted(record(number) for number in counted)),
    }  # fmt: skip


def test_each_kind_of_metric_is_what_plain_loops_say() -> None:
    """Images of weight 0 count in none of them."""
    assert evaluate_loader(score, batches(0, 1)) == pytest.approx(expected(), rel=1e-6)


def test_sums_rows_and_records_are_the_same_on_any_number_of_ranks_bit_for_bit(run_distributed) -> None:
    """Means are too, up to the order of their additions; every rank knows all of them."""
    alone = evaluate_loader(score, batches(0, 1))
    for ranks in (1, 2, 3):
        found = run_distributed(lambda world: evaluate_loader(score, batches(world.rank, world.world_size)), ranks)
        assert found == [found[0]] * ranks
        assert found[0].pop("val/loss") == pytest.approx(alone["val/loss"], rel=1e-12)
        assert found[0] == {name: value for name, value in alone.items() if name != "val/loss"}


def test_ranks_gather_rows_of_unequal_and_no_length(run_distributed) -> None:
    """In the order of ranks, also where nobody has any."""

    def on_rank(world: World) -> tuple[list[list[float]], int]:
        mine = torch.full((2 * world.rank % 3, 2), float(world.rank))
        return gather_rows(mine).tolist(), len(gather_rows(mine[:0]))

    assert run_distributed(on_rank, 3) == [([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], 0)] * 3
    assert gather_rows(torch.ones(2, 1)).tolist() == [[1.0], [1.0]]


def test_sums_must_be_whole_numbers() -> None:
    """Sums of floats depend on their order, and so on the number of ranks."""
    with pytest.raises(AssertionError, match="area is torch.float32; whole numbers add up exactly"):
        evaluate_loader(lambda batch: {"area": Sums(torch.ones(3, 2), miou)}, batches(0, 1))
