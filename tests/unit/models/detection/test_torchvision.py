"""The detector's parts beside torchvision's Mask R-CNN with equal weights, wherever the definitions coincide.

They do not in: anchors (torchvision rounds their sides), boxes that shrink (it limits growth alone), an object's best
candidate (it keeps the object of its own highest IoU), RoIAlign (without the half-pixel shift), the place of background
among classes (first), and what losses are divided by (all images of a batch together).
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.rpn import RPNHead as TorchvisionRPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from swinv2_train.models.detection.boxes import decode, encode
from swinv2_train.models.detection.choose import Rule, assigned
from swinv2_train.models.detection.fpn import FPN
from swinv2_train.models.detection.heads import BoxHead, MaskHead
from swinv2_train.models.detection.objects import Objects
from swinv2_train.models.detection.pool import levels_of
from swinv2_train.models.detection.rpn import STDS, RPNHead, RPNOutputs, proposals
from swinv2_train.models.detection.suppress import Suppression

C, K = 4, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def take(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Equal weights, in the order in which both name them."""
    values = list(ours.state_dict().values())
    names = list(theirs.state_dict())
    assert len(values) == len(names)
    theirs.load_state_dict(dict(zip(names, values, strict=True)))


def random_boxes(*shape: int) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * 60
    return torch.cat([corner, corner + 4 + torch.rand(*shape, 2) * 40], dim=-1)


def test_the_pyramid():
    ours, theirs = FPN([2, 3], C), FeaturePyramidNetwork([2, 3], C, LastLevelMaxPool())
    state = {}
    for kind, name in (("inner_blocks", "lateral_convs"), ("layer_blocks", "fpn_convs")):
        for i in range(2):
            for leaf in ("weight", "bias"):
                state[f"{kind}.{i}.0.{leaf}"] = ours.state_dict()[f"{name}.{i}.conv.{leaf}"]
    theirs.load_state_dict(state)
    maps = [torch.randn(2, 2, 8, 12), torch.randn(2, 3, 4, 6)]
    for a, b in zip(ours(maps), theirs(OrderedDict(enumerate(maps))).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_deltas_in_both_directions():
    """Of boxes that grow; below exp(-4.135) torchvision's shrink further."""
    coder, boxes, references = BoxCoder((10.0, 10.0, 5.0, 5.0)), random_boxes(40), random_boxes(40)
    stds = (0.1, 0.1, 0.2, 0.2)
    deltas = encode(boxes, references, stds)
    assert torch.allclose(deltas, coder.encode_single(boxes, references), atol=1e-5)
    deltas[0] = torch.tensor([1, 1, 99, 99])
    theirs = coder.decode_single(deltas, references).view(-1, 4)
    assert torch.allclose(decode(deltas, references, stds), theirs, rtol=1e-5, atol=1e-4)
    shrunk = torch.tensor([[0.0, 0, -99, -99]])
    assert not torch.allclose(decode(shrunk, references[:1], stds), coder.decode_single(shrunk, references[:1]))


@pytest.mark.parametrize("rule", [Rule(0.7, 0.3, None), Rule(0.5, 0.5, None)])
def test_matches(rule):
    objects, candidates = random_boxes(1, 5), random_boxes(300)
    candidates[:40] = objects[0].repeat(8, 1) + torch.randn(40, 4) * 3
    given = Objects(objects, torch.zeros(1, 5).long(), torch.zeros(1, 5).bool(), torch.zeros(1).long())
    from torchvision.ops import box_iou

    theirs = Matcher(rule.positive, rule.negative)(box_iou(objects[0], candidates))
    assert torch.equal(assigned(candidates, given, rule)[0], theirs) and (theirs >= 0).any()


def test_proposals():
    """The network's outputs on equal anchors, the best of every map, NMS on each, the best of all."""
    head, theirs = RPNHead(C), TorchvisionRPNHead(C, 3)
    take(theirs, head)
    for module in (head, theirs):
        for parameter in module.parameters():
            torch.manual_seed(parameter.numel())
            parameter.data.normal_(std=0.3)
    maps = [torch.randn(2, C, 12, 16), torch.randn(2, C, 6, 8)]
    generator = AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2)
    rpn = RegionProposalNetwork(
        generator, theirs, 0.7, 0.3, 256, 0.5, {"training": 50, "testing": 50}, {"training": 60, "testing": 60}, 0.7
    ).eval()
    images = torch.zeros(2, 3, 48, 64)
    with torch.no_grad():
        expected, _ = rpn(ImageList(images, [(48, 64)] * 2), OrderedDict(enumerate(maps)))
        every = generator(ImageList(images, [(48, 64)] * 2), maps)[0].split([576, 144])
        logits, deltas = zip(*(head(x) for x in maps), strict=True)
        found = proposals(RPNOutputs(list(every), list(logits), list(deltas)), torch.tensor([[48, 64]] * 2), 50, 60)
    for b in range(2):
        ours = found.boxes[b][found.usable[b]]
        assert ours.shape == expected[b].shape and torch.allclose(ours, expected[b], atol=1e-3)
        assert 20 < len(ours) < 61


def test_the_map_that_a_box_is_read_from():
    boxes = random_boxes(300) * (1 + 8 * torch.rand(300, 1))
    align = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    features = OrderedDict((str(i), torch.zeros(1, C, 256 >> i, 256 >> i)) for i in range(4))
    align(features, [boxes], [(1024, 1024)])
    assert torch.equal(levels_of(boxes, 4, 4).long(), align.map_levels([boxes]))


def test_heads_and_the_loss_of_boxes():
    """Background is torchvision's first class and our last."""
    head = BoxHead(C, K, convs=0, norm="none", width=6, class_agnostic=False)
    body, predictor = TwoMLPHead(C * 49, 6), FastRCNNPredictor(6, K + 1)
    take(body, head.shared_fcs)
    order = [K, *range(K)]
    with torch.no_grad():
        head.fc_reg.weight.normal_()
        predictor.cls_score.weight.copy_(head.fc_cls.weight[order])
        predictor.cls_score.bias.copy_(head.fc_cls.bias[order])
        predictor.bbox_pred.weight[4:] = head.fc_reg.weight
        predictor.bbox_pred.bias[4:] = head.fc_reg.bias
    x = torch.randn(9, C, 7, 7)
    logits, deltas = head(x)
    scores, regression = predictor(body(x))
    assert torch.allclose(logits[:, order], scores, atol=1e-5)
    assert torch.allclose(deltas.flatten(1), regression[:, 4:], atol=1e-5)
    classes = torch.tensor([0, 1, 2, K, K, K, 1, 0, K])
    wanted = torch.randn(9, 4)
    expected = fastrcnn_loss(scores, regression, [(classes + 1) % (K + 1)], [wanted])
    entropy = torch.nn.functional.cross_entropy(logits, classes)
    positive = classes < K
    chosen = deltas[positive, classes[positive]]
    distance = torch.nn.functional.smooth_l1_loss(chosen, wanted[positive], reduction="sum", beta=1 / 9) / 9
    assert torch.allclose(torch.stack(expected), torch.stack([entropy, distance]), rtol=1e-5)


def test_the_mask_head():
    head = MaskHead(C, K, flow=False)
    body, predictor = MaskRCNNHeads(C, (C,) * 4, 1), MaskRCNNPredictor(C, C, K)
    take(body, head.convs)
    take(predictor, torch.nn.ModuleList([head.upsample, head.conv_logits]))
    x = torch.randn(5, C, 14, 14)
    assert torch.allclose(head.logits(head.features(x, None)), predictor(body(x)), atol=1e-5)


def test_detections():
    """From logits and deltas: softmax, decoding of every class, NMS of each, the best of all."""
    boxes, logits = random_boxes(80), torch.randn(80, K + 1) * 2
    deltas = torch.randn(80, 4 * (K + 1)) * 0.5
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 30)
    (found,), (scores,), (labels,) = heads.postprocess_detections(logits, deltas, [boxes], [(96, 110)])
    stds = (0.1, 0.1, 0.2, 0.2)
    every = decode(deltas.view(80, K + 1, 4)[:, 1:], boxes.unsqueeze(1), stds)
    limits = torch.tensor([110.0, 96, 110, 96])
    every = torch.minimum(every.clamp(min=0), limits)
    ours = Suppression(30, 0.05, 0.5, "none")(every.unsqueeze(0), logits.softmax(1)[None, :, 1:])
    assert torch.equal(ours.classes[0] + 1, labels) and torch.allclose(ours.scores[0], scores, atol=1e-6)
    assert torch.allclose(ours.boxes[0], found, atol=1e-3)
    assert STDS == (1.0, 1.0, 1.0, 1.0) and np.isfinite(every.numpy()).all()
