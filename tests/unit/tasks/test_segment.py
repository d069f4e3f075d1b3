"""Semantic segmentation: a loss that micro-batches do not change, and scores that are those of plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM
from swinv2_train.tasks import build_task
from swinv2_train.tasks.dense_scores import Box, View, bands, tiles
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.pixel_loss import PixelLoss
from swinv2_train.tasks.segment import class_scores, segmentation_scores
from swinv2_train.training.param_groups import build_param_groups
from swinv2_train.weights import load_weights, save_weights
from tests.support.configs import composed
from tests.support.segmenter import CLASSES, IGNORE, MODES, SEGMENT, odd_scenes, plain_scores, png, randomised, scenes

CPU = torch.device("cpu")


def task_of(*overrides):
    return randomised(build_task(composed([*SEGMENT, "run_dir=x", "data.shards=unused", *overrides]), CPU))


def rows_of(transform, pairs):
    images = [(torch.from_numpy(image).permute(2, 0, 1), {"segmentation": png(labels)}) for image, labels in pairs]
    return [transform(*each, np.random.default_rng(n)) for n, each in enumerate(images)]


def train_batch(task, count=4):
    rows = rows_of(task.train_transform, scenes(count))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"weight": torch.ones(count)}


def eval_batch(task, pairs, weight=None):
    rows = rows_of(task.eval_transform, pairs)
    found = {name: [row[name] for row in rows] for name in rows[0]}
    return found | {"weight": torch.ones(len(pairs)) if weight is None else torch.tensor(weight)}


# --------------------------------------------------------------------------------------------------------------------
# The loss


def by_loops(logits, labels, weights):
    """Each image's sum of cross-entropies, and its gradient, pixel by pixel: (B,), (B, K, h, w)."""
    batch, classes, h, w = logits.shape
    height, width = labels.shape[1:]
    sums, gradient = np.zeros(batch), np.zeros(logits.shape)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                label = labels[b, y, x]
                if label == IGNORE:
                    continue
                places = []
                at = [max((p + 0.5) * old / new - 0.5, 0) for p, old, new in ((y, h, height), (x, w, width))]
                for i, share_y in ((math.floor(at[0]), 1 - at[0] % 1), (math.floor(at[0]) + 1, at[0] % 1)):
                    for j, share_x in ((math.floor(at[1]), 1 - at[1] % 1), (math.floor(at[1]) + 1, at[1] % 1)):
                        places.append((min(i, h - 1), min(j, w - 1), share_y * share_x))
                scores = [sum(share * logits[b, k, i, j] for i, j, share in places) for k in range(classes)]
                total = sum(math.exp(score) for score in scores)
                sums[b] += weights[label] * (math.log(total) - scores[label])
                for k in range(classes):
                    slope = weights[label] * (math.exp(scores[k]) / total - (k == label))
                    for i, j, share in places:
                        gradient[b, k, i, j] += share * slope
    return sums, gradient


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0]])
@pytest.mark.parametrize("denominator", ["all", "valid"])
def test_pixel_loss_is_that_of_loops_in_float64_with_its_gradient(denominator, weights):
    """Maps of odd sizes, ignored pixels, a class that counts nothing."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 3, 2)) * 3, rng.choice([0, 1, 2, IGNORE], (2, 7, 5))
    ours = torch.from_numpy(logits).requires_grad_()
    loss = PixelLoss(denominator, IGNORE, weights)
    sums = loss.sums(ours, torch.from_numpy(labels))
    expected, gradient = by_loops(logits, labels, weights or [1.0] * 3)
    assert np.allclose(sums.detach(), expected, rtol=1e-12)
    assert np.allclose(torch.autograd.grad(sums.sum(), ours)[0], gradient, atol=1e-12)
    counted = [[1.0 if weights is None else weights[v] for v in image[image != IGNORE]] for image in labels]
    divisors = [35.0, 35.0] if denominator == "all" else [sum(each) for each in counted]
    assert loss.counts(torch.from_numpy(labels)).tolist() == divisors
    with torch.no_grad():
        assert torch.equal(loss.sums(ours, torch.from_numpy(labels)), sums)


@pytest.mark.parametrize("overrides", [(), ("task.loss_denominator=valid", "task.class_weights=[1,2,0,1,0.5]")])
def test_micro_batches_ranks_and_stand_ins_change_nothing(overrides):
    """The mean of the parts' losses, by what each counts, is that of the whole; and so is each source's."""
    task = task_of("task.dropout=0", "model.drop_path_rate=0", *overrides)
    task.module.double().train()
    batch = train_batch(task, 5)
    batch["weight"][3] = 0

    def loss_of(chosen):
        part = {name: value[chosen] for name, value in batch.items()} | {"sources": torch.zeros(len(chosen))}
        task.module.zero_grad()
        loss = task.loss(task.module, part)
        loss.backward()
        each, counts = part["image_losses"]
        assert (each * counts).sum() / counts.sum() == pytest.approx(loss.item(), rel=1e-6)
        assert float(counts.sum()) == pytest.approx(task.count(part))
        return loss.detach(), task.count(part), torch.cat([p.grad.flatten() for p in task.module.parameters()])

    whole, parts = loss_of([0, 1, 2, 3, 4]), [loss_of(chosen) for chosen in ([0, 3], [1, 2], [4])]
    assert sum(part[1] for part in parts) == pytest.approx(whole[1])
    if not overrides:
        assert whole[1] == 4
    for place in (0, 2):
        mean = sum(part[place] * part[1] for part in parts) / whole[1]
        assert torch.allclose(torch.as_tensor(mean), torch.as_tensor(whole[place]), rtol=1e-6, atol=1e-9)


def test_padding_is_the_mean_colour_and_counts_as_ignored():
    """A view that reaches beyond its image is 0 there when normalised, as published, and not a rounded grey level."""
    task = task_of("task.resize_scale=[0.5,0.5]", "data.hflip=0")
    batch = train_batch(task, 2)
    views = task._views(batch)
    for view, (rows, columns), labels in zip(views, batch["extent"].tolist(), batch["labels"], strict=True):
        assert rows < 32 or columns < 32
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[:rows, :columns] = False
        assert (view[:, outside] == 0).all() and (labels[outside] == IGNORE).all()
        assert (view[:, ~outside] != 0).float().mean() > 0.9


# --------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_a_plain_evaluator(mode):
    """Images of seven sizes, more tiles than one pass takes, an image that does not count."""
    task, pairs = task_of(*MODES[mode]), scenes()[:5]
    task.module.eval()
    with torch.no_grad():
        found = task.scores(task.module, eval_batch(task, pairs, [1.0, 1.0, 1.0, 1.0, 0.0]))
    matrix = found["confusion"].values
    assert matrix.dtype == torch.int64 and not matrix[4].any()
    expected = plain_scores(task, pairs[:4])
    assert segmentation_scores(matrix.sum(0)) == pytest.approx({k: v for k, v in expected.items() if k != "val/loss"})
    assert float(found["val/loss"].value) == pytest.approx(expected["val/loss"], rel=1e-5)
    assert int((matrix.sum((0, 1)) > 0).sum()) >= 3, "classes that are predicted"


@pytest.mark.parametrize("mode", MODES)
def test_images_of_any_shape_are_scored(mode):
    """A pixel, stripes of 3000 x 20 and 2 x 700, and one without any pixel that counts."""
    task, pairs = task_of(*MODES[mode]), odd_scenes()
    task.module.eval()
    with torch.no_grad():
        found = task.scores(task.module, eval_batch(task, pairs))
    matrix = found["confusion"].values
    assert matrix.sum((1, 2)).tolist() == [1, 60_000, 1400, 0]
    expected = plain_scores(task, pairs)
    assert segmentation_scores(matrix.sum(0)) == pytest.approx({k: v for k, v in expected.items() if k != "val/loss"})
    assert float(found["val/loss"].value) == pytest.approx(expected["val/loss"], rel=1e-5)


def test_scores_that_are_no_numbers_are_right_nowhere():
    """The highest of NaNs is the first, so that a model gone astray would be as good as one that says class 0."""
    task, pairs = task_of(), scenes()[:2]
    with torch.no_grad():
        task.module.decoder.decode_head.conv_seg.bias[2] = torch.nan
        found = task.scores(task.module.eval(), eval_batch(task, pairs))
    matrix = found["confusion"].values.sum(0)
    assert math.isnan(float(found["val/loss"].value)) and matrix.sum() == sum((labels > 0).sum() for _, labels in pairs)
    assert segmentation_scores(matrix) == {"val/miou": 0.0, "val/macc": 0.0, "val/aacc": 0.0}


def test_an_images_scores_do_not_depend_on_its_batch():
    """Not to the last bit: it goes through the model alone."""
    task, pairs = task_of("task.eval_mode=slide"), scenes()
    task.module.eval()
    with torch.no_grad():
        together = task.scores(task.module, eval_batch(task, pairs))["confusion"].values
        alone = [task.scores(task.module, eval_batch(task, [pair]))["confusion"].values[0] for pair in pairs]
    assert torch.equal(together, torch.stack(alone))


def test_tiles_cover_an_image_and_the_last_ones_lie_inside():
    assert tiles((50, 70), None, (1, 1)) == [Box(0, 0, 50, 70)]
    found = tiles((50, 70), (32, 32), (20, 20))
    assert [box.top for box in found[::3]] == [0, 18] and [box.left for box in found[:3]] == [0, 20, 38]
    assert all(box.size == (32, 32) for box in found)
    assert tiles((20, 64), (32, 32), (20, 20)) == [Box(0, 0, 20, 32), Box(0, 20, 20, 52), Box(0, 32, 20, 64)]


def test_bands_are_the_rows_of_the_whole_image():
    """Whatever their height: the scores of an image are never in memory at once."""
    torch.manual_seed(0)
    boxes = tiles((50, 70), (32, 32), (20, 20))
    view = View((50, 70), boxes, [torch.randn(3, 8, 8) for _ in boxes], mirrored=True)
    whole = next(bands([view], (81, 97)))[1]
    assert whole.shape == (3, 81, 97) and torch.allclose(whole.sum(0), torch.ones(81, 97))
    for rows in (1, 7, 80):
        found = list(bands([view], (81, 97), band_bytes=4 * 3 * 97 * rows))
        assert [first for first, _ in found] == list(range(0, 81, rows))
        assert torch.allclose(torch.cat([each for _, each in found], dim=1), whole, atol=1e-6)


def test_scores_of_classes_that_are_absent_or_only_predicted():
    """Absent everywhere: in no mean.  Only predicted: an IoU of 0 and no accuracy.  Beyond 2^24 pixels a float would
    lose some."""
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix[0, 0], matrix[0, 1], matrix[1, 1], matrix[1, 3] = 2**40 + 1, 3, 5, 2
    iou, accuracy = class_scores(matrix)
    assert iou[1] == pytest.approx(50) and iou[3] == 0 and np.isnan(iou[2]) and np.isnan(accuracy[2:]).all()
    found = segmentation_scores(matrix)
    assert found["val/miou"] == pytest.approx((iou[0] + 50 + 0) / 3)
    assert found["val/macc"] == pytest.approx((accuracy[0] + 500 / 7) / 2)
    assert all(math.isnan(value) for value in segmentation_scores(torch.zeros(2, 2, dtype=torch.int64)).values())


def test_pictures_are_drawn_of_batches_of_both_kinds():
    task = task_of("task.class_names=[wall,sky,tree,road,car]")
    task.module.eval()
    with torch.no_grad():
        evaluated = task.picture(task.module, eval_batch(task, scenes(2)))
        trained = task.picture(task.module, train_batch(task, 2))
    assert evaluated.dtype == np.uint8 and evaluated.shape == trained.shape
    assert evaluated.shape[1] == 3 * 256 + 2 * 4


# --------------------------------------------------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.ignore_index=3", r"task.ignore_index \(3\) is one of the classes 0 to 4; choose 255"),
        ("task.class_weights=[1,2]", r"task.class_weights has 2 numbers for task.num_classes \(5\)"),
        ("task.class_weights=[0,0,0,0,0]", "task.class_weights are all 0"),
        ("task.class_names=[a]", r"task.class_names has 1 names for task.num_classes \(5\)"),
        ("task.resize_short_px=97", r"task.resize_short_px \(97\) is more than task.resize_long_px \(96\)"),
        ("task.eval_scales=[]", "task.eval_scales is empty"),
        ("task.eval_stride=40", r"task.eval_stride \(40, 40\) is more than the tile \(32, 32\)"),
        (
            "data.bands=[0,1,2] data.mean=[9,9,9] data.std=[1,1,1]",
            r"task.photometric \(true\) changes the colours of photographs",
        ),
        ("task.num_classes=1", r"task.num_classes \(1\) must be at least 2"),
        ("task.head_norm=sync", r"task.head_norm \(sync\) is none of layer, group, batch, sync_batch"),
    ],
)
def test_wrong_keys_are_refused_with_key_value_and_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        task_of(*override.split())


def test_batch_statistics_are_refused_where_they_cannot_be_right():
    """Stand-ins would count in them, one image has none, and processes or micro-batches would each have others."""
    with pytest.raises(ConfigError, match=r"task.head_norm \(sync_batch\) with data.on_bad_sample \(replace\)"):
        task_of("task.head_norm=sync_batch", "data.on_bad_sample=replace")
    with pytest.raises(ConfigError, match=r"task.head_norm \(batch\) with train.micro_batch_size \(1\)"):
        task_of("task.head_norm=batch", "train.micro_batch_size=1")
    batch, synced, layer = (task_of(f"task.head_norm={norm}").task for norm in ("batch", "sync_batch", "layer"))
    with pytest.raises(ConfigError, match=r"task.head_norm \(batch\) on 2 processes.*task.head_norm=sync_batch"):
        batch.check_ranks(2, 1)
    for task in (batch, synced):
        with pytest.raises(ConfigError, match="with 3 micro-batches per step.*set train.micro_batch_size"):
            task.check_ranks(1, 3)
    synced.check_ranks(2, 1)
    layer.check_ranks(7, 9)


def test_labels_beyond_the_classes_are_damaged_samples():
    task = task_of()
    with pytest.raises(ConfigError, match=r"1 to 5 are classes"):
        rows_of(task.train_transform, [(scenes(1)[0][0], np.full((70, 90), CLASSES + 1, np.uint8))])


# --------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("kind", ["simmim", "classifier"])
def test_an_encoder_of_another_task_is_taken_with_its_norm_and_the_heads_start_fresh(kind, tmp_path):
    """SimMIM's decoder is not taken for UPerNet's; the last map's norm is the pre-trained one."""
    task = task_of()
    torch.manual_seed(1)
    encoder = build_model(composed([*SEGMENT, "run_dir=x", "data.shards=x"]).model, 3 if kind == "classifier" else 0)
    other = encoder if kind == "classifier" else SimMIM(encoder, 32)
    torch.nn.init.normal_(encoder.norm.weight)
    save_weights(other, tmp_path / "w.safetensors", "microsoft")
    heads = {name: value.clone() for name, value in task.module.decoder.state_dict().items()}
    report = load_weights(task.module, tmp_path / "w.safetensors", head="auto")
    assert set(report.missing) == {f"decoder.{name}" for name in heads}
    assert torch.equal(task.module.encoder.norm.weight, encoder.norm.weight)
    assert all(torch.equal(value, heads[name]) for name, value in task.module.decoder.state_dict().items())
    assert not [name for name in report.left_out if "decode_head" in name]


def test_layers_decay_towards_the_patches_and_the_heads_learn_at_the_full_rate():
    task = task_of()
    optim = composed([*SEGMENT, "run_dir=x", "data.shards=x", "optim.layer_decay=0.5"]).optim
    scales = {}
    for group in build_param_groups(task.module, optim):
        for parameter in group["params"]:
            scales[id(parameter)] = group["lr_scale"], group["weight_decay"]
    module = task.module
    assert {scales[id(p)][0] for p in (*module.decoder.parameters(), *module.encoder.norm.parameters())} == {1.0}
    assert scales[id(module.encoder.layers[3].blocks[0].mlp.fc1.weight)] == (0.5, optim.weight_decay)
    assert scales[id(module.encoder.patch_embed.proj.weight)][0] == 0.5**5
    head = module.decoder.decode_head
    assert scales[id(head.bottleneck.conv.weight)][1] > 0 and scales[id(head.bottleneck.bn.weight)][1] == 0
