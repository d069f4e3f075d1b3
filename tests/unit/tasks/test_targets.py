"""Losses and scores of several classes and of numbers, against plain loops in float64; mixing; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swinv2_train.config import ClassifyConfig, ConfigError
from swinv2_train.data.sample import LABEL, LABELS, SampleError
from swinv2_train.data.sources.labelled import TableLabels
from swinv2_train.data.sources.labels import Labels
from swinv2_train.evaluation.scoring import evaluate_loader
from swinv2_train.tasks import build_task
from swinv2_train.tasks.answers import Ask
from swinv2_train.tasks.classify import ClassifyTask
from swinv2_train.tasks.target_losses import LOSSES
from swinv2_train.tasks.target_scores import (
    area_under_roc,
    average_precision,
    error_scores,
    f1_scores,
    label_tables,
    ranking_scores,
)
from tests.support.configs import composed

PLAIN = (
    "task=classify", "data=cifar10", "model=demo", "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]",
    "model.img_size=16", "model.window_size=2", "run_dir=unused", "task.num_classes=4", "task.rand_augment=null",
    "task.label_smoothing=0", "task.mixup_alpha=0", "task.cutmix_alpha=0", "task.erasing_prob=0",
)  # fmt: skip
MULTI, NUMBERS = "task.target=multilabel", "task.target=regression"


def task_of(*overrides: str) -> ClassifyTask:
    task = build_task(composed([*PLAIN, *overrides]), torch.device("cpu"))
    assert isinstance(task, ClassifyTask)
    return task


def settings(*overrides: str) -> ClassifyConfig:
    task = composed([*PLAIN, *overrides]).task
    assert isinstance(task, ClassifyConfig)
    return task


def answers(logits: Tensor) -> Any:
    return lambda images: logits


def batch_of(labels: Tensor, weight: list[float] | None = None, **more: Any) -> dict[str, Any]:
    images = torch.randint(0, 256, (len(labels), 3, 16, 16), dtype=torch.uint8)
    return {"images": images, "labels": labels, "weight": torch.tensor(weight or [1.0] * len(labels)), **more}


# --------------------------------------------------------------------------------------------------------------------
# Losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(x: float, y: float) -> float:
    return -y * math.log(sigmoid(x)) - (1 - y) * math.log(1 - sigmoid(x))


def focal(x: float, y: float) -> float:
    p = sigmoid(x)
    return -y * (1 - p) ** 1.5 * math.log(p) - (1 - y) * p**1.5 * math.log(1 - p)


def asymmetric(x: float, y: float) -> float:
    p = sigmoid(x)
    shifted = max(p - 0.1, 0.0)
    return -y * (1 - p) ** 1 * math.log(p) - (1 - y) * shifted**3 * math.log(1 - shifted)


def huber(x: float, y: float) -> float:
    error = abs(x - y)
    return error**2 / 2 if error <= 0.7 else 0.7 * (error - 0.35)


def squared(x: float, y: float) -> float:
    return (x - y) ** 2


EACH: dict[str, tuple[Callable[[float, float], float], tuple[str, ...]]] = {
    "bce": (bce, (MULTI,)),
    "focal": (focal, (MULTI, "task.loss=focal", "task.focal_gamma=1.5")),
    "asymmetric": (
        asymmetric,
        (MULTI, "task.loss=asymmetric", "task.asymmetric_gamma=[1,3]", "task.asymmetric_clip=0.1"),
    ),
    "huber": (huber, (NUMBERS, "task.huber_delta=0.7")),
    "mse": (squared, (NUMBERS, "task.loss=mse")),
}


@pytest.mark.parametrize("name", EACH)
def test_a_loss_and_its_gradient_are_those_of_a_loop(name):
    """Images of 4 outputs, some not known; the gradient by differences of the loop."""
    each, overrides = EACH[name]
    loss = LOSSES[settings(*overrides).target](settings(*overrides))
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, 4, dtype=torch.float64, generator=generator)
    targets = (torch.rand(5, 4, generator=generator) < 0.5).double()
    if NUMBERS in overrides:
        targets = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    targets[0, 1] = targets[2, 3] = torch.nan
    targets[4] = torch.nan

    def image(row: int, x: Tensor) -> float:
        known = [k for k in range(4) if not math.isnan(targets[row, k])]
        return sum(each(x[k].item(), targets[row, k].item()) for k in known) / max(1, len(known))

    given = logits.clone().requires_grad_()
    found = loss(given, targets)
    assert found.tolist() == pytest.approx([image(row, logits[row]) for row in range(5)], rel=1e-9)
    found.sum().backward()
    step, expected = 1e-6, torch.zeros(5, 4, dtype=torch.float64)
    for row in range(5):
        for k in range(4):
            moved = torch.zeros(4, dtype=torch.float64)
            moved[k] = step
            expected[row, k] = (image(row, logits[row] + moved) - image(row, logits[row] - moved)) / (2 * step)
    assert given.grad is not None
    torch.testing.assert_close(given.grad, expected, rtol=1e-5, atol=1e-7)
    assert (given.grad[targets.isnan()] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_focal_loss_of_one_class_is_that_of_a_loop(smoothing):
    loss = LOSSES["single"](settings("task.loss=focal", f"task.label_smoothing={smoothing}"))
    logits = 2 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = logits.clone().requires_grad_()
    labels = torch.tensor([2, 0, 3])
    found = loss(given, labels)
    for row, x in enumerate(logits.tolist()):
        p = [math.exp(value) / sum(map(math.exp, x)) for value in x]
        y = [smoothing / 4 + (1 - smoothing) * (k == int(labels[row])) for k in range(4)]
        expected = sum(-y[k] * (1 - p[k]) ** 2 * math.log(p[k]) for k in range(4))
        assert found[row].item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (given,))


@pytest.mark.parametrize("name", ["bce", "focal", "asymmetric"])
def test_losses_of_certain_answers_and_their_gradients_are_finite(name):
    """Where a sigmoid is 0 or 1 in float32."""
    loss = LOSSES["multilabel"](settings(*EACH[name][1]))
    logits = torch.tensor([[-200.0, 200.0, -200.0, 200.0]], requires_grad=True)
    found = loss(logits, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    found.sum().backward()
    assert logits.grad is not None
    assert found.isfinite().all() and logits.grad.isfinite().all() and logits.grad[0, 2] < 0


def test_labels_of_several_classes_are_smoothed_towards_a_half():
    """y (1 - s) + s / 2; not in val/loss."""
    logits, targets = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    task = task_of(MULTI, "task.num_classes=2", "task.label_smoothing=0.2")
    expected = (bce(1.0, 0.9) + bce(-2.0, 0.1)) / 2
    assert task.loss(answers(logits), batch_of(targets)).item() == pytest.approx(expected, rel=1e-6)
    scores = task.scores(answers(logits), batch_of(targets))
    assert scores["val/loss"].item() == pytest.approx((bce(1.0, 1) + bce(-2.0, 0)) / 2, rel=1e-6)


def test_numbers_are_learned_in_standard_deviations_and_scored_in_their_own_units():
    task = task_of(NUMBERS, "task.num_classes=2", "task.value_mean=[100,0]", "task.value_std=[10,2]")
    logits, values = torch.tensor([[1.5, -0.5]]), torch.tensor([[110.0, 1.0]], dtype=torch.float64)
    expected = (huber_1(1.5, 1.0) + huber_1(-0.5, 0.5)) / 2
    assert task.loss(answers(logits), batch_of(values)).item() == pytest.approx(expected, rel=1e-6)
    scores = evaluate_loader(lambda batch: task.scores(answers(logits), batch), [batch_of(values)])
    assert scores["val/mae"] == pytest.approx((5 + 2) / 2) and scores["val/rmse"] == pytest.approx(math.sqrt(14.5))


def huber_1(x: float, y: float) -> float:
    return (x - y) ** 2 / 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


# --------------------------------------------------------------------------------------------------------------------
# Mixing


def mixed(task: ClassifyTask, batch: dict[str, Any]) -> Tensor:
    """How much of each image is still the one of its place."""
    kept = task.mixing(torch.zeros(len(batch["labels"]), 3, 16, 16), batch["mixing_seed"][0])
    assert 0 < kept[0] < 1
    return kept


@pytest.mark.parametrize("overrides", [("task.loss=bce",), ("task.loss=asymmetric",), ("task.loss=focal",)])
@pytest.mark.parametrize("alphas", [("task.mixup_alpha=0.8",), ("task.cutmix_alpha=1",)])
def test_mixed_images_are_judged_by_mixed_classes(overrides, alphas):
    """The loss of soft targets is the mixture of the losses, for these are linear in them."""
    task = task_of(MULTI, "task.label_smoothing=0.1", *overrides, *alphas)
    targets = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]])
    logits, batch = torch.randn(4, 4), batch_of(targets, mixing_seed=[7] * 4)
    kept = mixed(task, batch).unsqueeze(1)
    expected = task.losses(logits, kept * targets + (1 - kept) * targets.flip(0)).mean()
    assert task.loss(answers(logits), batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_numbers_of_mixed_images_are_mixed():
    """Not their losses; an image that stands in counts as much as is left of others in its place."""
    task = task_of(NUMBERS, "task.mixup_alpha=0.8", "task.num_classes=1")
    values, logits = torch.tensor([[1.0], [2.0], [5.0], [-4.0]], dtype=torch.float64), torch.randn(4, 1)
    batch = batch_of(values, [1, 1, 0, 1], mixing_seed=[7] * 4)
    kept = mixed(task, batch)
    total = 0.0
    for row in range(4):
        share, weight = kept[row].item(), batch["weight"].tolist()
        y = share * values[row].item() + (1 - share) * values[3 - row].item()
        total += (share * weight[row] + (1 - share) * weight[3 - row]) * huber_1(logits[row].item(), y)
    assert task.loss(answers(logits), batch).item() == pytest.approx(total / 3, rel=1e-5)
    assert task.count(batch) == 3


def test_a_number_that_one_of_two_mixed_images_lacks_is_not_learned():
    task = task_of(NUMBERS, "task.mixup_alpha=0.8", "task.num_classes=2")
    values = torch.tensor([[1.0, math.nan], [2.0, 3.0]], dtype=torch.float64)
    logits = torch.randn(2, 2, requires_grad=True)
    task.loss(answers(logits), batch_of(values, mixing_seed=[7] * 2)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] == 0).all() and (logits.grad[:, 0] != 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Scores


def looped_precision(scores: list[float], right: list[bool]) -> float:
    """Precision at each threshold x what recall gains there."""
    total, before = 0.0, 0
    for threshold in sorted(set(scores), reverse=True):
        hits = sum(r for s, r in zip(scores, right, strict=True) if s >= threshold)
        said = sum(s >= threshold for s in scores)
        total += hits / said * (hits - before) / sum(right)
        before = hits
    return total


def looped_area(scores: list[float], right: list[bool]) -> float:
    pairs = [(a > b) + (a == b) / 2 for a, r in zip(scores, right, strict=True) if r
             for b, other in zip(scores, right, strict=True) if not other]  # fmt: skip
    return sum(pairs) / len(pairs)


def test_average_precision_and_the_area_are_those_of_loops_with_equal_scores_too():
    rng = np.random.default_rng(0)
    for count in (2, 7, 40):
        for _ in range(20):
            scores, right = rng.integers(0, max(2, count // 3), count).astype(float), rng.random(count) < 0.4
            right[:2] = True, False
            assert average_precision(scores, right) == pytest.approx(looped_precision(scores.tolist(), right.tolist()))
            assert area_under_roc(scores, right) == pytest.approx(looped_area(scores.tolist(), right.tolist()))


def test_scores_leave_out_what_is_not_known_and_classes_that_nothing_has():
    """Class 1 has no image where it applies, class 2 none where it does not: no area, and of class 1 no precision."""
    targets = torch.tensor([[1, 0, 1, -1], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, -1, 1.0]], dtype=torch.float64)
    logits = torch.tensor([[2, 1, 0, 9], [3, 0, 1, 2], [1, 2, 3, 3], [0, 5, -1, 1.0]], dtype=torch.float64)
    found = ranking_scores(torch.cat([logits, targets], dim=1))
    first = looped_precision([2, 3, 1, 0], [True, False, True, False])
    last = looped_precision([2, 3, 1], [True, False, True])
    assert found["val/map"] == pytest.approx(100 * (first + 1 + last) / 3)
    areas = looped_area([2, 3, 1, 0], [True, False, True, False]), looped_area([2, 3, 1], [True, False, True])
    assert found["val/auroc"] == pytest.approx(100 * sum(areas) / 2)
    nothing = ranking_scores(torch.cat([logits, torch.zeros_like(targets)], dim=1))
    assert math.isnan(nothing["val/map"]) and math.isnan(nothing["val/auroc"])


def test_f1_counts_what_is_said_above_the_threshold():
    task = task_of(MULTI, "task.threshold=0.25", "task.num_classes=3")
    cut = math.log(0.25 / 0.75)
    logits = cut + torch.tensor([[0.1, -0.1, 0.1], [0.1, 0.1, -0.1], [-0.1, 0.1, -0.1]])
    targets = torch.tensor([[1, 1, torch.nan], [0, 1, 0], [1, 0, 0.0]])
    found = evaluate_loader(lambda batch: task.scores(answers(logits), batch), [batch_of(targets)])
    # class 0: 1 right, 1 wrong, 1 missed; class 1: 1, 1, 1; class 2: nothing
    assert found["val/f1_macro"] == pytest.approx(100 * (0.5 + 0.5 + 0) / 3)
    assert found["val/f1_micro"] == pytest.approx(100 * 4 / 8)
    assert f1_scores(torch.zeros(4, 2, dtype=torch.int64)) == {"val/f1_micro": 0.0, "val/f1_macro": 0.0}


def test_errors_of_numbers_are_over_all_that_are_known():
    right = torch.tensor([[1, 5, 7], [3, math.nan, 7], [8, 6, 7.0]], dtype=torch.float64)
    said = torch.tensor([[2, 5, 7], [3, 100, 7], [5, 4, 8.0]], dtype=torch.float64)
    found = error_scores(torch.cat([said, right], dim=1))
    errors = [1, 0, 3, 0, 2, 0, 0, 1]
    assert found["val/mae"] == pytest.approx(sum(errors) / 8)
    assert found["val/rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / 8))
    assert found["val/r2"] == pytest.approx(((1 - 10 / 26) + (1 - 4 / 0.5) + 0.0) / 3)
    exact = error_scores(torch.cat([right, right], dim=1))
    assert exact == {"val/mae": 0.0, "val/rmse": 0.0, "val/r2": 1.0}
    assert all(map(math.isnan, error_scores(torch.full((2, 2), math.nan, dtype=torch.float64)).values()))


def test_a_number_that_is_the_same_everywhere_has_no_spread_though_its_mean_is_rounded():
    """The mean of three times 0.1 is not 0.1: R2 would be -1e30."""
    right = torch.full((3, 1), 0.1, dtype=torch.float64)
    assert float(right.numpy().mean()) != 0.1
    for said, expected in ((right, 1.0), (right + 0.05, 0.0)):
        assert error_scores(torch.cat([said, right], dim=1))["val/r2"] == expected


@pytest.mark.parametrize("target", [MULTI, NUMBERS])
def test_scores_of_a_prediction_that_is_no_number_are_none_and_infinite_ones_are_ranked(target):
    """An area of nan would rank it first, an F1 take it for a no."""
    task = task_of(target)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1.0]])
    logits[2, 1] = torch.nan
    found = evaluate_loader(lambda batch: task.scores(answers(logits), batch), [batch_of(targets)])
    assert all(map(math.isnan, found.values())), found
    logits[2, 1] = -torch.inf
    found = evaluate_loader(lambda batch: task.scores(answers(logits), batch), [batch_of(targets)])
    logits[2, 1] = -1e9
    finite = evaluate_loader(lambda batch: task.scores(answers(logits), batch), [batch_of(targets)])
    if target == MULTI:
        ranks = [name for name in found if name != "val/loss"]
        assert [found[name] for name in ranks] == [finite[name] for name in ranks]
    else:
        assert found["val/mae"] == math.inf


@pytest.mark.parametrize("target", [MULTI, NUMBERS])
def test_scores_are_the_same_bits_in_any_order_of_images_and_rows_of_weight_0_do_not_count(target):
    """As ranks see other images, in other batches."""
    task = task_of(target)
    generator = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(12, 4, generator=generator), (torch.rand(12, 4, generator=generator) < 0.5).double()
    names = ("val/map", "val/auroc", "val/f1_micro", "val/f1_macro") if target == MULTI else (
        "val/mae", "val/rmse", "val/r2")  # fmt: skip

    def scored(order: list[int], size: int, weight: list[float]) -> dict[str, float]:
        batches = [
            batch_of(targets[rows], [weight[row] for row in rows]) | {"rows": rows}
            for rows in (order[start : start + size] for start in range(0, len(order), size))
        ]
        return evaluate_loader(lambda batch: task.scores(answers(logits[batch["rows"]]), batch), batches)

    whole = scored([*range(10)], 10, [1.0] * 12)
    again = scored([*range(9, -1, -1), 10, 11], 4, [1.0] * 10 + [0.0] * 2)
    assert [whole[name] for name in names] == [again[name] for name in names]
    assert whole["val/loss"] == pytest.approx(again["val/loss"], rel=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Rows, and what is refused


def test_rows_hold_0_1_and_nan_for_classes_and_numbers_as_they_are():
    image, rng = torch.zeros(3, 16, 16, dtype=torch.uint8), np.random.default_rng(0)
    transform = task_of(MULTI).eval_transform
    row = transform(image, {"labels": np.array([2, 0, -4], np.int32)}, rng)["labels"]
    assert row[:3].tolist() == [1, 0, 1] and row[3].isnan() and row.dtype == torch.float32
    for wrong in ([4], [-5]):
        with pytest.raises(SampleError, match=r"are not within 0..3 \(task.num_classes\)"):
            transform(image, {"labels": np.array(wrong, np.int32)}, rng)
    transform = task_of(NUMBERS, "task.num_classes=2").train_transform
    row = transform(image, {"values": np.array([1e9 + 1, math.nan])}, rng)["labels"]
    assert row[0].item() == 1e9 + 1 and row[1].isnan()
    with pytest.raises(SampleError, match=r"3 values, not 2 \(task.num_classes\)"):
        transform(image, {"values": np.zeros(3)}, rng)


REFUSED = {
    ("task.loss=huber",): "task.loss (huber) is not of task.target=single, which is trained by cross_entropy, focal",
    (MULTI, "task.loss=cross_entropy"): "is trained by bce, asymmetric, focal; set one of these, or auto",
    (NUMBERS, "task.label_smoothing=0.1"): "with task.target=regression set task.label_smoothing=0",
    (NUMBERS, "task.cutmix_alpha=1"): "with task.target=regression set task.cutmix_alpha=0",
    (NUMBERS, "data.labels_columns=[a]"): "data.labels_columns names 1; set task.num_classes=1",
    (NUMBERS, "task.value_std=[1]"): "task.value_std has 1 numbers for task.num_classes (4); give one for each",
    (MULTI, "task.value_std=[1,1,1,1]"): "is of task.target=regression alone; set task.value_std=null",
    (MULTI, "task.focal_gamma=0.5"): "task.focal_gamma (0.5) must be 0, or at least 1",
    (MULTI, "probe.methods=[knn]", "data.eval_shards=x"): "set probe.methods=[]",
    (MULTI, "train.keep_best=val/top1"): "train.keep_best (val/top1) is none of val/loss, val/map",
    (
        MULTI,
        "+data.eval_splits.a.shards=x",
        "+data.eval_splits.a.labels=y",
    ): "needs task=classify with task.target=single",
    (
        MULTI,
        "data.shards='pipe:cat a.tar'",
        "train.max_steps=1",
        "optim.schedule.warmup_steps=0",
    ): "whose keys are not known beforehand",
    ("task.num_classes=1",): "leaves nothing to tell apart",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_what_a_target_has_not_is_refused_with_the_remedy(overrides):
    with pytest.raises(ConfigError) as error:
        settings(*overrides)
    assert REFUSED[overrides] in str(error.value)


def test_a_table_is_refused_for_a_task_without_labels_of_whole_images():
    with pytest.raises(ConfigError, match=r"data.labels \(x.csv\) needs task=classify; task=simmim takes no labels"):
        composed(["task=simmim", "data=cifar10", "model=demo", "task.mask_unit_px=4", "run_dir=u", "data.labels=x.csv"])


# --------------------------------------------------------------------------------------------------------------------
# Answers


def test_answers_are_the_classes_above_the_threshold_or_numbers_in_their_own_units():
    """The columns are those that tables of predictions have."""
    ask = Ask(top_k=2, name=["cat", "dog", "cow", "pig"].__getitem__)
    logits = torch.tensor([[0.0, 2.0, -1.0, 3.0], [-1.0, -2.0, -3.0, -4.0]])
    task, batch = task_of(MULTI), batch_of(torch.zeros(2, 4))
    first, second = task.answers(answers(logits), batch, ask)
    assert first.classes == (3, 1) and first.labels == ("pig", "dog") and second.classes == ()
    assert first.probabilities == pytest.approx([sigmoid(x) for x in (0, 2, -1, 3)])
    assert task.answer_columns(task.task, 2).keys() == first.row().keys()
    task = task_of(NUMBERS, "task.value_mean=[1,2,3,4]", "task.value_std=[2,1,1,1]")
    assert task.answers(answers(logits), batch, ask)[0].row() == {"values": [1, 4, 2, 7]}
    assert task.answer_columns(task.task, 2).keys() == {"values"}


def test_views_are_averaged_as_probabilities_of_each_class_or_as_numbers():
    """task.eval_flip; two views with other outputs."""
    outputs = torch.tensor([[[1.0, -30]], [[3.0, -60]]])

    def model() -> Any:
        views = iter(outputs)
        return lambda images: next(views)

    batch = batch_of(torch.zeros(1, 2))
    several = task_of(MULTI, "task.num_classes=2", "task.eval_flip=true")._logits(model(), batch)
    expected = (outputs[:, 0].double().sigmoid()).mean(dim=0)
    assert several.double().sigmoid()[0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert task_of(NUMBERS, "task.num_classes=2", "task.eval_flip=true")._logits(model(), batch).tolist() == [[2, -45]]


# --------------------------------------------------------------------------------------------------------------------
# Class weights


class Labelled:
    """Just what class weights ask of a source of images."""

    @staticmethod
    def single(labels: list[int]) -> TableLabels:
        return TableLabels(Any, "", Labels(LABEL, np.array(labels)))  # type: ignore[arg-type]

    @staticmethod
    def several(rows: list[list[int]]) -> TableLabels:
        ends, missing = np.cumsum([len(row) for row in rows]), np.zeros(len(rows), bool)
        return TableLabels(Any, "", Labels(LABELS, np.array(sum(rows, []), np.int32), ends, missing))  # type: ignore


def test_balanced_weights_are_what_is_expected_of_equal_classes():
    """n / (C n_c), of the classes that are there; of several classes without / with, of what is known."""
    task = task_of("task.class_weights=balanced")
    task.begin(Labelled.single([0, 0, 0, 2, 2, -1, 3, 3]), None)
    assert task.losses.class_weights.tolist() == pytest.approx([7 / 9, 1, 7 / 6, 7 / 6])
    logits, labels = torch.randn(3, 4), torch.tensor([0, 2, 3])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (each * torch.tensor([7 / 9, 7 / 6, 7 / 6])).mean().item()
    assert task.loss(answers(logits), batch_of(labels)).item() == pytest.approx(expected)
    assert task.scores(answers(logits), batch_of(labels))["val/loss"].item() == pytest.approx(each.mean().item())
    task = task_of(MULTI, "task.class_weights=balanced")
    task.begin(Labelled.several([[0, 1], [0, -2], [0], [0, 1], [1, -3]]), None)
    assert task.losses.class_weights.tolist() == pytest.approx([1 / 4, 1 / 3, 1, 1])
    targets = torch.tensor([[1.0, 0, 1, 0]])
    expected = bce(0.5, 1) / 4 + bce(0.5, 0) + bce(0.5, 1) + bce(0.5, 0)
    assert task.loss(answers(torch.full((1, 4), 0.5)), batch_of(targets)).item() == pytest.approx(expected / 4)


def test_mixed_images_count_by_the_weight_of_each_class():
    task = task_of("task.class_weights=balanced", "task.mixup_alpha=0.8")
    task.begin(Labelled.single([0, 0, 0, 1, 2, 3]), None)
    logits, labels = torch.randn(2, 4), torch.tensor([0, 1])
    batch = batch_of(labels, mixing_seed=[7] * 2)
    kept, log_p, weights = mixed(task, batch), logits.log_softmax(dim=1), task.losses.class_weights
    expected = -sum(
        share * weights[label] * log_p[row, label]
        for row in (0, 1)
        for share, label in ((kept[row], labels[row]), (1 - kept[row], labels[1 - row]))
    )
    assert task.loss(answers(logits), batch).item() == pytest.approx(float(expected) / 2, rel=1e-5)


def test_weights_of_a_file_are_by_number_or_by_name(tmp_path):
    path = tmp_path / "weights.json"
    task = task_of(f"task.class_weights={path}")
    source, names = Labelled.single([0]), ("a", "b", "c", "d")
    path.write_text("[1, 2, 3.5, 0]")
    task.begin(source, None)
    assert task.losses.class_weights.tolist() == [1, 2, 3.5, 0]
    path.write_text('{"b": 2, "a": 1, "d": 4, "c": 3}')
    task.begin(source, names)
    assert task.losses.class_weights.tolist() == [1, 2, 3, 4]
    for text, error in (
        ('{"b": 2}', "'a' is in one of the two alone"), ('{"e": 2}', "'e' is in one of the two alone"),
        ("[1]", "4 numbers"),
        ("[1, 2, 3, -1]", "from 0 to a million"), ("[0, 0, 0, 0]", "are all 0"), ("[", "cannot be read"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=error):
            task.begin(source, names)
    with pytest.raises(ConfigError, match="is neither none nor balanced nor a file"):
        task_of("task.class_weights=balance").begin(source, names)


def test_a_run_cannot_balance_what_has_no_single_class():
    for overrides, error in (
        ((MULTI, "data.balanced=true"), "or task.class_weights=balanced in its place"),
        ((NUMBERS, "task.class_weights=balanced"), "numbers have no classes"),
        (
            ("data.balanced=true", "data.shards=''", "+data.mix.a.shards=x"),
            "data.mix shares batches among sources itself",
        ),
    ):
        with pytest.raises(ConfigError, match=error):
            settings(*overrides)


def test_a_table_of_classes_is_what_loops_say_of_each_and_null_where_there_is_nothing_to_say():
    """Four classes of six images: one with an image that is not known, one that applies to none, and one that is
    neither there nor said.
    """
    logits = torch.tensor(
        [[2, 1, -1, -3], [1, -1, -2, -1], [-1, 3, 1, -2], [-2, 2, -1, -1], [0.5, 1, 2, -4], [3, -2, -3, -1]]
    )
    targets = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, math.nan, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    rows = torch.cat([logits, targets.nan_to_num(nan=-1)], dim=1).double()
    said, right, known = logits > 0, targets == 1, ~targets.isnan()
    counts = torch.stack([(right & said).sum(0), (known & ~right & said).sum(0), (right & ~said).sum(0)])
    counts = torch.cat([counts, torch.zeros(1, 4, dtype=torch.int64)])
    found = label_tables(counts, rows)
    assert found["class_images"] == [4, 3, 0, 0]
    first = (
        1 / 1 + 2 / 2 + 3 / 4 + 4 / 5
    ) / 4  # of the scores 3, 2, 1, 0.5, -1, -2 the first, second, fourth and fifth
    second = (1 / 1 + (1 + 1) / (2 + 1) + 3 / 5) / 3  # of 3, 1 and 1, -1, -2, without the one that is not known
    assert found["class_ap"] == [pytest.approx(100 * first), pytest.approx(100 * second), None, None]
    assert found["class_f1"] == [pytest.approx(100 * 6 / 8), pytest.approx(100 * 4 / 6), 0.0, None]
    assert np.mean(found["class_ap"][:2]) == pytest.approx(ranking_scores(rows)["val/map"])
    assert sum(each or 0.0 for each in found["class_f1"]) / 4 == pytest.approx(f1_scores(counts)["val/f1_macro"])
