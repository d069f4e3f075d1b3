"""The losses of proposals, boxes and masks of every image, and their gradients, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swinv2_train.models.detection.anchors import anchors
from swinv2_train.models.detection.choose import priorities
from swinv2_train.models.detection.objects import Objects
from swinv2_train.models.detection.roi import CASCADE, ONE_STAGE, Pyramid, RoIHead, RoISettings
from swinv2_train.models.detection.rpn import RULE, Proposals, RPNOutputs, inside, proposals, rpn_losses
from tests.support.detector import CLASSES, PLACES, SIDE, crops
from tests.support.detector_loops import decode_by_loops, iou_by_loops, rpn_by_loops, stages_by_loops

COUNTS = [2, 0, 4]
SIZES, STRIDES = [(16, 16), (8, 8)], [4, 8]
RTOL, ATOL = 2e-5, 2e-6  # of float32; a part that is left out gives 1e-2


def objects_of(batch) -> Objects:
    return Objects(batch["boxes"], batch["classes"], batch["crowd"], batch["draw"], batch.get("masks"))


def image_of(batch, b):
    pixels = np.unpackbits(batch["masks"][b].numpy(), axis=-1)[..., :SIDE]
    return {name: batch[name][b].numpy() for name in ("boxes", "classes", "crowd")} | {"pixels": pixels}


@pytest.fixture(scope="module")
def batch():
    found = crops(COUNTS)
    found["masks"][2, 1] = 0  # an object whose mask is not known
    return found


def said(rng, batch_size=3):
    """What a network says of the anchors of two maps, gradients wanted."""
    places = anchors(SIZES, STRIDES, torch.device("cpu"))
    logits = [torch.from_numpy(rng.normal(size=(batch_size, len(each)))).float().requires_grad_() for each in places]
    deltas = [
        torch.from_numpy(rng.normal(size=(batch_size, len(each), 4)) * 0.3).float().requires_grad_() for each in places
    ]
    return RPNOutputs(places, logits, deltas)


@pytest.mark.parametrize(("inside_only", "beta"), [(False, 0.0), (True, 1 / 9)])
def test_losses_of_proposals_are_those_of_loops_with_their_gradients(batch, inside_only, beta):
    outputs = said(np.random.default_rng(0))
    losses = rpn_losses(outputs, objects_of(batch), batch["extent"], inside_only, beta)
    places = torch.cat(outputs.anchors)
    within = inside(places, batch["extent"])
    parts = [*outputs.logits, *outputs.deltas]
    for kind in range(2):
        gradients = torch.autograd.grad(losses[:, kind].sum(), parts, retain_graph=True, allow_unused=True)
        used = gradients[:2] if kind == 0 else gradients[2:]
        for b in range(3):
            usable = within[b].tolist() if inside_only else [True] * len(places)
            expected, slopes = rpn_by_loops(
                places.numpy(), torch.cat(outputs.logits, 1)[b].detach().numpy(),
                torch.cat(outputs.deltas, 1)[b].detach().numpy(), image_of(batch, b),
                priorities(batch["draw"][b : b + 1], 0, len(places))[0], RULE, beta, usable,
            )  # fmt: skip
            assert losses[b, kind].item() == pytest.approx(expected[kind], rel=RTOL)
            assert np.allclose(torch.cat([each[b] for each in used]), slopes[kind], rtol=1e-4, atol=ATOL)
    assert losses[1, 1] == 0 and losses[2, 1] > 0
    assert 0 < int(within.sum()) < within.numel()


def test_proposals_are_the_best_of_every_map_behind_nms_and_padding_is_none():
    """Cut to the image's own columns, and those without area left out."""
    outputs = said(np.random.default_rng(1), batch_size=2)
    with torch.no_grad():
        outputs.deltas[0][0, :9, 0] = -400  # far to the left, where nothing of them is in the image
        outputs.logits[0][0, :9] = 9
    extent = torch.tensor([[64, 56], [48, 64]])
    found = proposals(outputs, extent, per_level=30, count=45)
    for b in range(2):
        left = []
        for level, (places, logits, deltas) in enumerate(zip(*outputs, strict=True)):
            best = np.argsort(-logits[b].detach().numpy(), kind="stable")[:30].tolist()
            kept = []
            for n in best:
                box = decode_by_loops(deltas[b, n].tolist(), places[n].tolist(), (1, 1, 1, 1))
                limits = (float(extent[b, 1]), float(extent[b, 0])) * 2
                box = [min(max(v, 0.0), m) for v, m in zip(box, limits, strict=True)]
                if box[2] > box[0] and box[3] > box[1] and all(iou_by_loops(box, other) <= 0.7 for _, other in kept):
                    kept.append((logits[b, n].item(), box))
            left += kept
            assert level == 0 or len(kept) < 30
        left = sorted(left, key=lambda each: -each[0])[:45]
        assert int(found.usable[b].sum()) == len(left)
        assert np.allclose(found.boxes[b][found.usable[b]], [box for _, box in left], rtol=1e-4, atol=1e-4)
        assert (found.boxes[b][~found.usable[b]] == 0).all() and found.boxes.shape == (2, 45, 4)
    assert not found.usable.all()


CASES = {
    "mask_rcnn": (ONE_STAGE, "l1", False, False),
    "cascade": (CASCADE, "giou", False, False),
    "htc": (CASCADE, "smooth_l1", True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_of_boxes_and_masks_of_all_stages_are_those_of_loops_with_their_gradients(case, batch, monkeypatch):
    """What the heads say is random here: what is learnt from it, and what the next stage sees, is what is compared."""
    stages, box_loss, agnostic, interleaved = CASES[case]
    settings = RoISettings(stages, CLASSES, 0, "none", 4, agnostic, box_loss, True, 24, 4, interleaved, False)
    rng, head = np.random.default_rng(3), RoIHead(2, settings, len(SIZES) + 1)
    heads, masks = [], []
    for i in range(len(stages)):
        logits = torch.from_numpy(rng.normal(size=(3 * 24, CLASSES + 1))).float().requires_grad_()
        deltas = (
            torch.from_numpy(rng.normal(size=(3 * 24, 1 if agnostic else CLASSES, 4)) * 0.3).float().requires_grad_()
        )
        pixels = torch.from_numpy(rng.normal(size=(3 * 4, CLASSES, 28, 28))).float().requires_grad_()
        heads.append((logits, deltas))
        masks.append(pixels)
        monkeypatch.setattr(head.bbox_head[i], "forward", lambda _, each=(logits, deltas): each)
        monkeypatch.setattr(head.mask_head[i], "logits", lambda _, each=pixels: each)
    boxes = batch["boxes"].repeat(1, 5, 1) + torch.from_numpy(rng.normal(size=(3, 5 * PLACES, 4)) * 4).float()
    boxes = torch.cat([boxes, torch.from_numpy(rng.uniform(0, 20, (3, 30, 4)) + [0, 0, 20, 20]).float()], dim=1)
    usable = torch.from_numpy(rng.uniform(size=(3, len(boxes[0]))) < 0.9) & ((boxes[..., 2:] - boxes[..., :2]) > 1).all(
        2
    )
    maps = [torch.zeros(3, 2, *size) for size in SIZES]
    pyramid = Pyramid(maps, STRIDES, batch["extent"], SIDE)
    losses = head.losses(pyramid, Proposals(boxes, usable), objects_of(batch))
    assert losses.shape == (3, 3 * len(stages))
    leaves = [each for i in range(len(stages)) for each in (*heads[i], masks[i])]
    gradients = torch.autograd.grad(losses.sum(), leaves)
    positives = 0
    for b in range(3):
        rows, few = slice(24 * b, 24 * (b + 1)), slice(4 * b, 4 * (b + 1))
        expected, slopes = stages_by_loops(
            settings, image_of(batch, b), boxes[b].numpy(), usable[b].tolist(),
            [(logits[rows].detach().numpy(), deltas[rows].detach().numpy()) for logits, deltas in heads],
            [each[few].detach().numpy() for each in masks],
            lambda stream, count, b=b: priorities(batch["draw"][b : b + 1], stream, count)[0],
            batch["extent"][b].tolist(),
        )  # fmt: skip
        assert losses[b].tolist() == pytest.approx(expected, rel=RTOL, abs=ATOL)
        for i, stage in enumerate(slopes):
            of_image = [gradients[3 * i][rows], gradients[3 * i + 1][rows], gradients[3 * i + 2][few]]
            for ours, theirs in zip(of_image, stage, strict=True):
                assert np.allclose(ours, theirs, rtol=1e-3, atol=5e-6), (b, i)
            positives += int((np.abs(stage[1]).sum((1, 2)) > 0).sum())
    assert positives > 5 * len(stages) and (losses[1, 1::3] == 0).all() and (losses[1, 2::3] == 0).all()
