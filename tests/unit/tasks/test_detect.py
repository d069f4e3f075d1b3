"""Object detection: published sizes, losses that no grouping of images changes, detections in the image's pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, count_parameters, multiply_adds
from swinv2_train.models.initial import on_meta
from swinv2_train.planning.trace import evaluation_bytes, trace_step
from swinv2_train.tasks import build_task
from swinv2_train.tasks.detect import _moved, _moved_back
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.paste import pasted
from swinv2_train.training.param_groups import build_param_groups
from swinv2_train.weights import load_weights, save_weights
from tests.support.configs import composed
from tests.support.detector import CASCADE, DETECT, HEADS, SEMANTIC, SIDE, crops, detector, part

STILL = "model.drop_path_rate=0"


# --------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    ("head", "size", "parameters", "billions"),
    [  # parameters, and multiply-adds at 800 x 1280 px of neck and heads alone; V1's published sums agree within 0.2 %
        ("mask_rcnn", "tiny", 47_853_402, 171.0),
        ("mask_rcnn", "small", 69_234_666, 171.0),
        ("cascade_mask_rcnn", "tiny", 85_688_604, 649.2),
        ("cascade_mask_rcnn", "small", 107_069_868, 649.2),
        ("cascade_mask_rcnn", "base", 145_127_594, 650.2),
    ],
)
def test_published_sizes(head, size, parameters, billions):
    overrides = (f"model={size}", "model.img_size=[800,1280]", "model.window_size=16", f"task.head={head}")
    with on_meta():
        task = build_task(composed(["task=detect", *overrides, "data=labelled", "run_dir=x", "data.shards=x"]),
                          torch.device("meta"))  # fmt: skip
    assert count_parameters(task.module) == parameters
    assert (task.multiply_adds - multiply_adds(task.encoder)) / 1e9 == pytest.approx(billions, abs=0.15)


# --------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("head", ["mask_rcnn", "htc with its semantic branch"])
def test_micro_batches_ranks_and_stand_ins_change_nothing(head):
    """The mean of the parts' losses, by what each counts, is that of the whole; and so is each source's."""
    task, batch = detector(*HEADS[head], STILL), crops([2, 0, 3, 4, 1])
    batch["weight"][3] = 0
    task.module.train()

    def loss_of(chosen):
        images = part(batch, chosen) | {"sources": torch.zeros(len(chosen))}
        task.module.zero_grad()
        loss = task.loss(task.module, images)
        loss.backward()
        each, counts = images["image_losses"]
        assert (each * counts).sum() / counts.sum() == pytest.approx(loss.item(), rel=1e-6)
        return loss.detach(), task.count(images), torch.cat([p.grad.flatten() for p in task.module.parameters()])

    whole, parts = loss_of([0, 1, 2, 3, 4]), [loss_of(chosen) for chosen in ([0, 3], [1, 2], [4])]
    assert sum(each[1] for each in parts) == whole[1] == 4
    for place in (0, 2):
        mean = sum(each[place] * each[1] for each in parts) / whole[1]
        assert torch.allclose(mean, whole[place], rtol=1e-4, atol=2e-5)  # measured worst 4e-6 of the largest


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_has_its_part_in_the_loss_of_images_that_hold_nothing(head):
    """Else a rank would skip a module that another one enters, and under ZeRO-3 both would wait for ever."""
    task, batch = detector(*HEADS[head], STILL), crops([0, 0])
    loss = task.loss(task.module.train(), batch)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    missing = [name for name, p in task.module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    masks = [p for name, p in task.module.named_parameters() if "mask_head" in name]
    assert all((p.grad == 0).all() for p in masks) and bool(masks) == ("masks" in task.meta_batch(1))


@pytest.mark.slow
def test_learning_finds_the_objects_it_learns_from():
    """The whole chain has the right sign and the right coordinates.

    Looked at every 20 steps: scores jump from step to step, and when they do depends on the processor's rounding.
    """
    from tests.support.detector_loops import iou_by_loops

    task, batch = detector(STILL, "task.head_channels=16", "task.head_width=32", "task.box_samples=32"), crops([1, 2])
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=2e-3)
    image, truth = batch["images"][0].numpy()[:, :, :SIDE], batch["boxes"][0, 0].double() * torch.tensor([1.0, 2, 1, 2])

    def is_found() -> bool:
        with torch.no_grad():
            found = task.found(task.module.eval(), [image], (2 * SIDE, SIDE))
        best = len(found.classes) > 0 and found.classes[0] == batch["classes"][0, 0] and found.scores[0] > 0.5
        return bool(best) and iou_by_loops(found.boxes[0], truth) > 0.5

    assert not is_found()
    for step in range(1, 201):
        optimizer.zero_grad()
        loss = task.loss(task.module.train(), batch)
        loss.backward()
        optimizer.step()
        if step % 20 == 0 and is_found():
            return
    raise AssertionError("not found after any of 200 steps")


def test_mask_information_flows_from_head_to_head():
    """HTC: the last stage's masks reach the first head's convolutions, and not its logits."""
    task, batch = detector(*CASCADE, STILL, "task.mask_flow=true"), crops([3, 2])
    losses = []
    task.loss(lambda **inputs: losses.append(task.module.train()(**inputs)["losses"]) or {"losses": losses[0]}, batch)
    heads = task.module.decoder.roi_head.mask_head
    assert heads[0].conv_res is None and heads[2].conv_res is not None
    gradients = torch.autograd.grad(
        losses[0][:, 10].sum(), [heads[0].convs[0].conv.weight, heads[0].conv_logits.weight], allow_unused=True
    )
    assert gradients[0].abs().sum() > 0 and (gradients[1] == 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Detections


def test_several_equal_views_find_what_one_finds():
    """Two passes for boxes and two for masks, joined; of equal boxes the best is left."""
    image = crops([3])["images"][0].numpy()
    found = []
    for scales in ("[1.0]", "[1.0,1.0]"):
        task = detector(f"task.eval_scales={scales}", "task.score_threshold=0.01")
        with torch.no_grad():
            found.append(task.found(task.module.eval(), [image] * (1 + (scales != "[1.0]")), (96, 128)))
    assert len(found[0].scores) == 5
    for ours, theirs in zip(found[0][:3], found[1][:3], strict=True):
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    assert [mask["size"] for mask in found[1].masks] == [[96, 128]] * 5


def test_a_mirrored_view_gives_the_boxes_of_the_image():
    view, boxes = torch.zeros(1, 3, 32, 64), torch.tensor([[4.0, 6, 20, 30]])
    assert _moved(boxes, view, True, (64, 64)).tolist() == [[44, 12, 60, 60]]
    for flip in (False, True):
        assert torch.equal(_moved_back(_moved(boxes, view, flip, (96, 192)), view, flip, (96, 192)), boxes)


def test_the_number_of_detections_and_of_calls_is_that_of_any_image():
    """Of one that does not count, too: on a rank that has nothing left to see."""
    calls = []
    task = detector("task.eval_flip=true", "task.eval_scales=[0.5,1.0]")
    task.module.eval()

    def forward(**inputs):
        calls.append(len(inputs["images"]))
        return task.module(**inputs)

    views = [np.zeros((3, 40, 56), np.uint8), np.zeros((3, 70, 90), np.uint8)]
    for counts in (True, False):
        with torch.no_grad():
            task.found(forward, views, (70, 90), counts)
    assert calls == [1] * 16


def test_masks_are_pasted_as_loops_paste_them():
    """At pixels' centres, half a place within the border of the mask, cut at the image."""
    rng = np.random.default_rng(0)
    mask, box, (height, width) = rng.uniform(size=(5, 5)), [-2.4, 3.3, 9.2, 12.5], (11, 14)
    (found,) = pasted(torch.from_numpy(mask)[None].float(), torch.tensor([box]), (height, width))
    expected = np.zeros((height, width), bool)
    for i in range(height):
        for j in range(width):
            y = (i + 0.5 - box[1]) / (box[3] - box[1]) * 5 - 0.5
            x = (j + 0.5 - box[0]) / (box[2] - box[0]) * 5 - 0.5
            value = 0.0
            for a in (math.floor(y), math.floor(y) + 1):
                for b in (math.floor(x), math.floor(x) + 1):
                    if 0 <= a < 5 and 0 <= b < 5:
                        value += (1 - abs(y - a)) * (1 - abs(x - b)) * mask[a, b]
            expected[i, j] = value >= 0.5
    assert np.array_equal(found, expected) and 10 < expected.sum() < 70
    empty = pasted(torch.ones(2, 5, 5), torch.tensor([[3.0, 3, 3, 9], [50, 50, 60, 60]]), (height, width))
    assert not any(each.any() for each in empty)


# --------------------------------------------------------------------------------------------------------------------
# Keys, weights, plans


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.class_names=[a]", r"task.class_names has 1 names for task.num_classes \(3\)"),
        ("task.eval_short_px=81", r"task.eval_short_px \(81\) is more than task.eval_long_px \(80\)"),
        ("task.eval_scales=[]", "task.eval_scales is empty"),
        ("task.mask_samples=17", r"task.mask_samples \(17\) is more than task.box_samples \(16\)"),
        ("task.mask_flow=true", r"task.mask_flow \(true\) is between the stages of masks"),
        ("task.semantic_classes=256", r"task.semantic_classes \(256\)"),
        ("task.head=htc", r"task.head \(htc\) is none of mask_rcnn, cascade_mask_rcnn"),
        ("model.depths=[1] model.num_heads=[1] model.pretrained_window_sizes=[0]", "task: the encoder has 1 stage"),
    ],
)
def test_wrong_keys_are_refused_with_key_value_and_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        detector(*override.split())


def test_a_pretrained_encoder_loads_and_the_heads_start_fresh(tmp_path):
    task = detector()
    pretrained = SimMIM(build_model(composed([*DETECT, "run_dir=x", "data.shards=x"]).model, 0), 32)
    save_weights(pretrained, tmp_path / "w.safetensors", "microsoft")
    report = load_weights(task.module, tmp_path / "w.safetensors", head="auto")
    assert set(report.missing) == {f"decoder.{name}" for name in task.module.decoder.state_dict()}
    assert torch.equal(task.module.encoder.norm.weight, pretrained.encoder.norm.weight)


def test_the_encoder_learns_at_its_own_share_of_the_rate():
    """optim.encoder_lr_scale, beside layer decay."""
    task = detector()
    optim = ("optim.encoder_lr_scale=0.1", "optim.layer_decay=0.5")
    groups = build_param_groups(task.module, composed([*DETECT, "run_dir=x", "data.shards=x", *optim]).optim)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert {scales[id(p)] for p in task.module.decoder.parameters()} == {1.0}
    assert scales[id(task.encoder.norm.weight)] == pytest.approx(0.1)
    assert scales[id(task.encoder.patch_embed.proj.weight)] == pytest.approx(0.1 * 0.5**5)
    assert len({group["name"] for group in groups}) == len(groups)
    with pytest.raises(ConfigError, match=r"optim.encoder_lr_scale \(0.1\) is for an encoder with heads beside it"):
        build_param_groups(task.encoder, composed([*DETECT, "run_dir=x", "data.shards=x", optim[0]]).optim)


@pytest.mark.parametrize("head", [(), SEMANTIC])
def test_a_plan_traces_training_and_evaluation_without_contents(head):
    """Every shape is known beforehand: no operation asks what a tensor holds."""
    config = composed([*DETECT, "run_dir=x", "data.shards=x", *head])
    trace = trace_step(config, 2.0)
    assert trace.num_parameters == count_parameters(detector(*head).module)
    assert trace.backward.total > 0 and evaluation_bytes(config) > 0
