"""Boxes, anchors, assignment, sampling, suppression and pooling, against loops in float64 over plain numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from swinv2_train.models.detection import boxes as box
from swinv2_train.models.detection.anchors import anchors
from swinv2_train.models.detection.choose import (
    IGNORED,
    NEGATIVE,
    Rule,
    assigned,
    priorities,
    sampled,
    top,
)  # fmt: skip
from swinv2_train.models.detection.mask_targets import mask_targets, unpacked
from swinv2_train.models.detection.objects import Objects
from swinv2_train.models.detection.pool import levels_of, pooled
from swinv2_train.models.detection.suppress import Suppression, kept_by_nms
from tests.support.detector_loops import (
    align_by_loops,
    assign_by_loops,
    decode_by_loops,
    encode_by_loops,
    iou_by_loops,
    suppress_by_loops,
)  # fmt: skip

STDS = (0.1, 0.1, 0.2, 0.2)


def random_boxes(rng, *shape, most=60.0):
    corner = rng.uniform(0, most, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 40, (*shape, 2))], axis=-1)


def objects_of(boxes, classes, crowd=None, masks=None):
    crowd = torch.zeros(classes.shape, dtype=torch.bool) if crowd is None else torch.as_tensor(crowd)
    draw = torch.arange(len(boxes)) + 7
    return Objects(torch.as_tensor(boxes).float(), torch.as_tensor(classes), crowd, draw, masks)


# --------------------------------------------------------------------------------------------------------------------
# Boxes


def test_encoding_is_that_of_loops_and_decoding_takes_it_back():
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 20), random_boxes(rng, 20)
    deltas = box.encode(torch.from_numpy(first), torch.from_numpy(second), STDS)
    assert np.allclose(deltas, [encode_by_loops(a, b, STDS) for a, b in zip(first, second, strict=True)], rtol=1e-12)
    assert np.allclose(box.decode(deltas, torch.from_numpy(second), STDS), first, rtol=1e-12)


def test_decoding_limits_sizes_in_both_directions_with_the_gradient_of_differences():
    """mmdetection's rule: torchvision lets a box shrink as far as it likes."""
    rng = np.random.default_rng(1)
    references, deltas = random_boxes(rng, 12), rng.normal(size=(12, 4)) * 3
    deltas[:2, 2:] = 90, -90
    ours = torch.from_numpy(deltas).requires_grad_()
    found = box.decode(ours, torch.from_numpy(references), STDS)
    expected = np.array([decode_by_loops(d, r, STDS) for d, r in zip(deltas, references, strict=True)])
    assert np.allclose(found.detach(), expected, rtol=1e-12)
    size = found[0, 2] - found[0, 0], found[0, 3] - found[0, 1]
    before = references[0, 2:] - references[0, :2]
    ratio = [float(size[0].detach() / before[0]), float(size[1].detach() / before[1])]
    assert ratio == pytest.approx([1000 / 16, 16 / 1000])
    weights = rng.normal(size=(12, 4))
    (gradient,) = torch.autograd.grad((found * torch.from_numpy(weights)).sum(), ours)
    for i in range(2, 12):
        for j in range(4):
            moved = [deltas[i].copy() for _ in range(2)]
            moved[0][j], moved[1][j] = moved[0][j] + 1e-6, moved[1][j] - 1e-6
            ends = [float(np.dot(decode_by_loops(each, references[i], STDS), weights[i])) for each in moved]
            assert float(gradient[i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-5)
    assert (gradient[:2, 2:] == 0).all()


def test_overlaps_are_those_of_loops_and_boxes_without_area_overlap_nothing():
    rng = np.random.default_rng(2)
    first, second = random_boxes(rng, 15), random_boxes(rng, 15)
    first[0, 2:] = first[0, :2]
    found = box.iou(torch.from_numpy(first).unsqueeze(1), torch.from_numpy(second))
    assert np.allclose(found, [[iou_by_loops(a, b) for b in second] for a in first], rtol=1e-12)
    assert (found[0] == 0).all() and (found > 0).any()


def test_generalised_iou_is_its_definition_and_torchvisions_with_its_gradient():
    from torchvision.ops import generalized_box_iou_loss

    rng = np.random.default_rng(3)
    first = torch.from_numpy(random_boxes(rng, 15)).requires_grad_()
    second = torch.from_numpy(random_boxes(rng, 15))
    ours, theirs = 1 - box.giou(first, second), generalized_box_iou_loss(first, second)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    gradients = [torch.autograd.grad(each.sum(), first, retain_graph=True)[0] for each in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
    assert ours.max() > 1, "boxes apart"


def test_boxes_are_cut_to_the_images_own_rows_and_columns():
    found = box.clipped(torch.tensor([[[-3.0, 5, 90, 70]], [[-3.0, 5, 90, 70]]]), torch.tensor([[40, 80], [64, 50]]))
    assert found.tolist() == [[[0, 5, 80, 40]], [[0, 5, 50, 64]]]


# --------------------------------------------------------------------------------------------------------------------
# Anchors


def test_anchors_are_those_of_loops():
    """Around corners of cells, unrounded; anchors of a place first, then columns, then rows."""
    found = anchors([(3, 2), (2, 1)], [4, 8], torch.device("cpu"))
    for (height, width), stride, each in zip([(3, 2), (2, 1)], [4, 8], found, strict=True):
        expected = []
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                    expected.append((x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2))
        assert np.allclose(each, expected, rtol=1e-6) and each.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# Assignment and sampling


@pytest.mark.parametrize("rule", [Rule(0.7, 0.3, 0.3), Rule(0.5, 0.5, 0.5), Rule(0.6, 0.6, None)])
def test_candidates_are_assigned_as_loops_assign_them(rule):
    """With ties of the best candidate, crowds, places without an object, and an image without any."""
    rng = np.random.default_rng(4)
    boxes, classes = random_boxes(rng, 3, 5).astype(np.float32), rng.integers(0, 3, (3, 5))
    classes[0, 3:], classes[2] = -1, -1
    crowd = np.zeros((3, 5), bool)
    crowd[1, 4] = True
    near = boxes[:, rng.integers(0, 5, 40)] + rng.normal(size=(3, 40, 4)) * 3
    candidates = np.concatenate([near, near[:, :5], random_boxes(rng, 3, 30)], axis=1).astype(np.float32)
    found = assigned(torch.from_numpy(candidates), objects_of(boxes, classes, crowd), rule)
    for b in range(3):
        expected = assign_by_loops(candidates[b], boxes[b], classes[b], crowd[b], rule)
        assert found[b].tolist() == expected
    assert (found[2] == NEGATIVE).all() and (found[:2] >= 0).any() and (found[1] == IGNORED).any()
    usable = torch.zeros(3, 75, dtype=torch.bool)
    usable[:, ::2] = True
    masked = assigned(torch.from_numpy(candidates), objects_of(boxes, classes, crowd), rule, usable)
    assert (masked[:, 1::2] == IGNORED).all() and torch.equal(masked[:, ::2], found[:, ::2])


def test_samples_are_positive_first_filled_up_and_never_ignored():
    found = torch.full((4, 50), IGNORED)
    found[0, :30], found[0, 30:] = NEGATIVE, 2
    found[1, 10:20], found[1, 40] = NEGATIVE, 1
    found[2] = NEGATIVE
    sample = sampled(found, torch.tensor([3, 4, 5, 6]), 0, number=16, most_positive=4)
    assert sample.at.shape == (4, 16)
    assert sample.positive.sum(1).tolist() == [4, 1, 0, 0] and sample.taken.sum(1).tolist() == [16, 11, 16, 0]
    kinds = found.gather(1, sample.at)
    assert ((kinds >= 0) == sample.positive)[sample.taken].all() and (kinds[sample.taken] != IGNORED).all()
    for b in range(4):
        chosen = sample.at[b][sample.taken[b]].tolist()
        assert len(set(chosen)) == len(chosen)
    assert sample.place[0, :4].tolist() == [2] * 4 and sample.positive[0].tolist() == [True] * 4 + [False] * 12


def hashed(value):
    """Wellons's lowbias32, on whole numbers of any length."""
    value %= 2**32
    value = (value ^ value >> 16) * 0x7FEB352D % 2**32
    value = (value ^ value >> 15) * 0x846CA68B % 2**32
    return value ^ value >> 16


def test_the_choice_is_a_function_of_the_images_own_number_alone():
    """So that no rank, batch or restart changes it; and it is even."""
    draws = torch.tensor([1, 2**31 - 1, 5, 1])
    keys = priorities(draws, 0, 1000)
    assert torch.equal(keys[0], keys[3]) and torch.equal(keys[1], priorities(draws[1:2], 0, 1000)[0])
    assert not torch.equal(keys[0], keys[2]) and not torch.equal(keys[0], priorities(draws[:1], 1, 1000)[0])
    assert (keys >= 0).all() and all(len(row.unique()) == 1000 for row in keys)
    first = priorities(torch.arange(4000), 3, 20).argmax(dim=1)
    assert np.bincount(first, minlength=20).std() < 2.5 * math.sqrt(4000 / 20)
    expected = [(hashed(hashed(hashed(12345) + 0x9E3779B9 * 3) + hashed(index)) << 24) + index for index in range(9)]
    assert priorities(torch.tensor([12345]), 2, 9)[0].tolist() == expected


def test_the_best_are_those_of_a_stable_sort():
    """Scores of bfloat16 are often equal: then the first ones, as on any device and of any batch."""
    rng = np.random.default_rng(5)
    scores = torch.from_numpy(rng.integers(-3, 4, (3, 40)) / 2).float()
    scores[0, 3], scores[1, 2], scores[1, 5], scores[2, 0] = torch.inf, -torch.inf, -0.0, 0.0
    values, at = top(scores, 25)
    order = [np.argsort(-row.numpy(), kind="stable")[:25].tolist() for row in scores]
    assert at.tolist() == order and torch.equal(values, scores.gather(1, at))
    assert top(scores, 100)[1].shape == (3, 40)


# --------------------------------------------------------------------------------------------------------------------
# Suppression


def test_nms_leaves_what_loops_leave_and_unusable_boxes_remove_nothing():
    rng = np.random.default_rng(6)
    boxes = torch.from_numpy(random_boxes(rng, 2, 40, most=20)).float()
    scores = torch.from_numpy(np.sort(rng.uniform(size=(2, 40)))[:, ::-1].copy()).float()
    usable = torch.from_numpy(rng.uniform(size=(2, 40)) < 0.8)
    kept = kept_by_nms(boxes, scores, usable, 0.6)
    for b in range(2):
        left = []
        for i in range(40):
            if usable[b, i] and all(iou_by_loops(boxes[b, i].double(), boxes[b, j].double()) <= 0.6 for j in left):
                left.append(i)
        assert kept[b].nonzero()[:, 0].tolist() == left and 3 < len(left) < int(usable[b].sum())


@pytest.mark.parametrize("soft", ["none", "linear", "gaussian"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_detections_are_those_of_each_class_by_itself_and_then_the_best(soft, agnostic):
    rng = np.random.default_rng(7)
    boxes, scores = random_boxes(rng, 2, 30, 1 if agnostic else 3, most=15), rng.uniform(size=(2, 30, 3))
    scores[1] *= 0.052  # nearly nothing is above the least score
    found = Suppression(12, 0.05, 0.5, soft)(torch.from_numpy(boxes), torch.from_numpy(scores))
    for b in range(2):
        expected = suppress_by_loops(boxes[b], scores[b], 12, 0.05, 0.5, soft)
        there = found.classes[b] >= 0
        assert there.sum() == len(expected) and (found.scores[b][~there] == 0).all()
        assert found.classes[b][there].tolist() == [kind for _, kind, _ in expected]
        assert np.allclose(found.scores[b][there], [score for score, _, _ in expected])
        assert np.allclose(found.boxes[b][there], [each for _, _, each in expected])
    assert (found.classes[0] >= 0).all() and not (found.classes[1] >= 0).all()


def test_hard_suppression_is_torchvisions():
    rng = np.random.default_rng(8)
    boxes, scores = torch.from_numpy(random_boxes(rng, 50, most=15)).float(), torch.from_numpy(rng.uniform(size=50))
    found = Suppression(50, 0.0, 0.5, "none")(boxes.view(1, 50, 1, 4), scores.float().view(1, 50, 1))
    kept = nms(boxes, scores.float(), 0.5)
    assert torch.equal(found.boxes[0, : len(kept)], boxes[kept]) and (found.classes[0, len(kept) :] == -1).all()


# --------------------------------------------------------------------------------------------------------------------
# Pooling and masks


def test_features_of_boxes_are_those_of_loops_with_their_gradient():
    """Of the map that fits the box's size, as many points as a bin has places, half-pixel centres."""
    rng = np.random.default_rng(9)
    maps = [torch.from_numpy(rng.normal(size=(2, 2, 64 // stride, 96 // stride))) for stride in (4, 8)]
    boxes = np.stack([random_boxes(rng, 4), random_boxes(rng, 4)])
    boxes[0, 0], boxes[1, 1], boxes[1, 2] = (0, 0, 96, 64), (3, 3, 3, 3), (80, 50, 96, 64)
    boxes[0, 1] = (2, 1, 90, 60)
    boxes = torch.from_numpy(boxes)
    sizes = torch.tensor([[0.0, 0, 55, 55], [0, 0, 112, 112], [0, 0, 900, 50], [0, 0, 900, 9], [3, 3, 3, 3]])
    assert levels_of(sizes, 4, 2).tolist() == [0, 1, 1, 0, 0]
    maps = [each.requires_grad_() for each in maps]
    boxes[0, 0] = torch.tensor([-60.0, -60, 96, 64])  # large enough for the second map
    found = pooled(maps, [4, 8], boxes, 3)
    weights = torch.from_numpy(rng.normal(size=found.shape))
    gradients = torch.autograd.grad((found * weights).sum(), maps)
    expected, slopes = np.zeros(found.shape), [np.zeros(each.shape) for each in maps]
    for b in range(2):
        for n in range(4):
            level = int(levels_of(boxes[b, n], 4, 2))
            places = align_by_loops(boxes[b, n].tolist(), 1 / (4, 8)[level], 3, maps[level].shape[2:])
            for (i, j, y, x), share in places.items():
                expected[b * 4 + n, :, i, j] += share * maps[level].detach().numpy()[b, :, y, x]
                slopes[level][b, :, y, x] += share * weights.numpy()[b * 4 + n, :, i, j]
    assert np.allclose(found.detach(), expected, atol=1e-12)
    assert all(np.allclose(*pair, atol=1e-12) for pair in zip(gradients, slopes, strict=True))
    assert all(each.abs().sum() > 0 for each in gradients) and (found[5] == 0).all()


def test_masks_of_boxes_are_those_of_loops():
    """Objects in two chunks, a width that eight does not divide, a box on the border."""
    rng = np.random.default_rng(10)
    pixels = rng.uniform(size=(1, 10, 20, 27)) < 0.5
    packed = torch.from_numpy(np.packbits(pixels, axis=-1))
    assert np.array_equal(unpacked(packed, 27), pixels)
    boxes = torch.tensor([[[0.0, 0, 27, 20], [3.3, 2.2, 9.1, 17.7], [20.5, 10, 27, 20], [5, 5, 5, 5]]])
    place = torch.tensor([[0, 9, 8, 3]])
    found = mask_targets(packed, 27, boxes, place, 6)
    for n in range(3):
        expected = np.zeros((6, 6))
        for (i, j, y, x), share in align_by_loops(boxes[0, n].tolist(), 1.0, 6, (20, 27)).items():
            expected[i, j] += share * pixels[0, place[0, n], y, x]
        assert np.array_equal(found[0, n], expected >= 0.5 - 1e-7) and 0 < found[0, n].sum() < 36
    assert (found[0, 3] == 0).all()
