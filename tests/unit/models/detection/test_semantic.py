"""HTC's semantic branch, part by part against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swinv2_train.models import count_parameters
from swinv2_train.models.detection.roi import Pyramid
from swinv2_train.models.detection.semantic import IGNORED, SemanticHead, semantic_loss
from tests.support.detector import HTC, SEMANTIC, crops, detector
from tests.support.detector_loops import align_by_loops, entropy_by_loops

CHANNELS, KINDS = 3, 4
SIZES = [(14, 10), (7, 5), (4, 3), (2, 2)]
"""Of a pyramid whose sides are odd."""


def resized_by_loops(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, h, w) -> (C, *size): bilinear, the corners' values in the corners."""
    found = np.zeros((len(values), *size))
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = (
                place * (old - 1) / (new - 1)
                for place, old, new in zip((i, j), values.shape[1:], size, strict=True)
            )  # fmt: skip
            low, left = min(int(y), values.shape[1] - 2), min(int(x), values.shape[2] - 2)
            for row, share in ((low, 1 - (y - low)), (low + 1, y - low)):
                found[:, i, j] += share * (1 - (x - left)) * values[:, row, left]
                found[:, i, j] += share * (x - left) * values[:, row, left + 1]
    return found


def conv_by_loops(values: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(C, h, w) by (C', C, k, k), 0 around it."""
    reach = weight.shape[2] // 2
    padded = np.pad(values, ((0, 0), (reach, reach), (reach, reach)))
    found = np.zeros((len(weight), *values.shape[1:]))
    for i in range(values.shape[1]):
        for j in range(values.shape[2]):
            part = padded[:, i : i + weight.shape[2], j : j + weight.shape[3]]
            found[:, i, j] = (weight * part).sum(axis=(1, 2, 3)) + bias
    return found


def head_by_loops(state: dict[str, np.ndarray], maps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    def conv(values: np.ndarray, name: str) -> np.ndarray:
        return conv_by_loops(values, state[f"{name}.weight"], state[f"{name}.bias"])

    size = maps[1].shape[1:]
    x = np.zeros(maps[1].shape)
    for i, each in enumerate(maps):
        x += np.maximum(conv(each if i == 1 else resized_by_loops(each, size), f"lateral_convs.{i}.conv"), 0)
    for i in range(4):
        x = np.maximum(conv(x, f"convs.{i}.conv"), 0)
    return conv(x, "conv_logits"), np.maximum(conv(x, "conv_embedding.conv"), 0)


def test_the_branch_is_that_of_loops_with_its_gradients() -> None:
    """Gradients along directions in all weights and maps at once, by differences of the loops."""
    torch.manual_seed(0)
    head = SemanticHead(CHANNELS, len(SIZES), KINDS)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    rng = np.random.default_rng(0)
    maps = [torch.from_numpy(rng.normal(size=(2, CHANNELS, *size))).float().requires_grad_() for size in SIZES]
    names = [name for name, _ in head.named_parameters()]
    leaves = [*head.parameters(), *maps]
    outputs = head(maps)
    weights = [rng.normal(size=each.shape) for each in outputs]
    plain = [each.detach().double().numpy() for each in leaves]

    def by_loops(values: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
        state = dict(zip(names, values, strict=False))
        images = [head_by_loops(state, [each[b] for each in values[len(names) :]]) for b in range(2)]
        found = [np.stack(each) for each in zip(*images, strict=True)]
        return found, sum(float((weight * each).sum()) for weight, each in zip(weights, found, strict=True))

    for ours, theirs in zip(outputs, by_loops(plain)[0], strict=True):
        assert ours.shape[2:] == SIZES[1] and np.allclose(ours.detach(), theirs, rtol=1e-4, atol=1e-5)
    total = sum((torch.from_numpy(weight) * each).sum() for weight, each in zip(weights, outputs, strict=True))
    gradients = torch.autograd.grad(total, leaves)
    for _ in range(3):
        direction = [rng.normal(size=each.shape) for each in plain]
        ends = [
            by_loops([each + step * part for each, part in zip(plain, direction, strict=True)])[1]
            for step in (1e-6, -1e-6)
        ]
        slope = sum(float((g.double().numpy() * part).sum()) for g, part in zip(gradients, direction, strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3)


def test_its_loss_is_an_images_own_mean_over_labelled_places_with_its_gradient() -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(3, KINDS, 5, 6))).float().requires_grad_()
    labels = rng.integers(0, KINDS, (3, 4, 6)).astype(np.uint8)  # a row less: padding
    labels[rng.random(labels.shape) < 0.3] = IGNORED
    labels[1] = IGNORED
    losses = semantic_loss(logits, torch.from_numpy(labels))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    for b in range(3):
        places = [(i, j) for i in range(4) for j in range(6) if labels[b, i, j] != IGNORED]
        expected, slope = 0.0, np.zeros((KINDS, 5, 6))
        for i, j in places:
            loss, part = entropy_by_loops(logits[b, :, i, j].tolist(), labels[b, i, j])
            expected += loss / len(places)
            slope[:, i, j] = np.array(part) / len(places)
        assert losses[b].item() == pytest.approx(expected, rel=1e-5) and (losses[b] == 0) == (b == 1)
        assert np.allclose(gradient[b], slope, atol=1e-6)


@pytest.mark.parametrize("side", [7, 14])
def test_boxes_and_masks_take_the_branch_s_features_beside_the_maps(side: int) -> None:
    """RoIAlign at 14 x 14 of the stride-8 map whatever the box's size, averaged to 7 x 7 for boxes."""
    rng = np.random.default_rng(2)
    maps = [torch.from_numpy(rng.normal(size=(2, CHANNELS, *size))).float() for size in SIZES[:3]]
    branch = torch.from_numpy(rng.normal(size=(2, CHANNELS, *SIZES[1]))).float().requires_grad_()
    boxes = torch.tensor([[[3.0, 5, 30, 50], [0, 0, 0, 0]], [[-2.0, 7, 39, 11], [8, 8, 9, 40]]])
    extent = torch.tensor([[56, 40]] * 2)
    without = Pyramid(maps, [4, 8, 16], extent, 40).features(boxes, side)
    found = Pyramid(maps, [4, 8, 16], extent, 40, branch).features(boxes, side) - without
    weight = torch.from_numpy(rng.normal(size=found.shape)).float()
    (gradient,) = torch.autograd.grad((found * weight).sum(), branch)
    expected, slope, share = np.zeros(found.shape), np.zeros(branch.shape), 14 // side
    for row in range(4):
        if row == 1:
            continue  # a place without a box
        values = branch.detach().numpy()[row // 2]
        for (i, j, y, x), part in align_by_loops(boxes[row // 2, row % 2].tolist(), 1 / 8, 14, SIZES[1]).items():
            part /= share**2
            expected[row, :, i // share, j // share] += part * values[:, y, x]
            slope[row // 2, :, y, x] += part * weight[row, :, i // share, j // share].numpy()
    assert np.allclose(found.detach(), expected, atol=2e-5) and (found[1] == 0).all()
    assert np.allclose(gradient, slope, atol=2e-5)


def test_published_size() -> None:
    """Five maps of 256 channels and COCO-stuff's 183 classes."""
    with torch.device("meta"):
        assert count_parameters(SemanticHead(256, 5, 183)) == 5 * 65_792 + 4 * 590_080 + 65_792 + 47_031


def losses_of(task, batch) -> torch.Tensor:
    """(B, n), in training."""
    found = []

    def forward(**inputs):
        found.append(task.module.train()(**inputs)["losses"])
        return {"losses": found[0]}

    task.loss(forward, batch)
    return found[0]


def test_it_is_one_more_loss_and_the_heads_learn_through_it() -> None:
    """The boxes' and masks' losses reach its convolutions but not its classes; its own reaches no head."""
    batch, still = crops([2, 3]), "model.drop_path_rate=0"
    task = detector(*SEMANTIC, still)
    losses = losses_of(task, batch)
    assert losses.shape[1] == 2 + 3 * 3 + 1
    head = task.module.decoder.roi_head
    layers = [head.semantic_head.convs[0].conv, head.semantic_head.conv_embedding.conv, head.semantic_head.conv_logits,
              head.bbox_head[0].fc_cls]  # fmt: skip

    def reached(place: int) -> list[bool]:
        found = torch.autograd.grad(losses[:, place].sum(), [each.weight for each in layers], retain_graph=True)
        return [bool(each.abs().sum() > 0) for each in found]

    assert reached(-1) == [True, False, True, False]
    assert reached(2) == [True, True, False, True]  # a box's class
    assert reached(4) == [True, True, False, False]  # a mask
    heavier = losses_of(detector(*SEMANTIC, "task.semantic_weight=0.6", still), batch)
    assert torch.equal(heavier[:, :-1], losses[:, :-1]) and torch.allclose(heavier[:, -1], 3 * losses[:, -1])
    more = task.multiply_adds - detector(*HTC).multiply_adds
    assert more == (8 * 8) * (5 * 8 * 8 + 4 * 9 * 8 * 8 + 8 * 8 + 5 * 8)  # places of the stride-8 map
