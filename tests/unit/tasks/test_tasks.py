"""What each task makes of a batch: inputs, losses, scores, pictures; and what its model is built from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError, pair
from swinv2_train.data.sample import SampleError
from swinv2_train.data.transforms.crop import resize
from swinv2_train.models import SimMIM
from swinv2_train.models.simmim import norm_target
from swinv2_train.tasks import build_task
from swinv2_train.tasks.classify import ClassifyTask
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import Normalise
from swinv2_train.tasks.simmim import SimMIMTask
from swinv2_train.tasks.task import Task
from tests.support.configs import composed

CPU = torch.device("cpu")
SMALL = ("run_dir=unused", "model.embed_dim=16", "model.depths=[1,1]", "model.num_heads=[1,2]")
MEAN, STD = [0.1, 0.4, 0.7], [0.2, 0.3, 0.5]


def config_of(experiment: str, *overrides: str) -> Config:
    return composed(
        [f"experiment={experiment}", *SMALL, f"data.mean={MEAN}", f"data.std={STD}", *overrides],
    )


def classify(*overrides: str) -> Task:
    return build_task(config_of("cifar10_finetune", *overrides), CPU)


def simmim(*overrides: str) -> Task:
    return build_task(config_of("cifar10_simmim", *overrides), CPU)


def random_images(count: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def labelled(labels: list[int], weight: list[float] | None = None) -> dict[str, Any]:
    weights = torch.tensor(weight or [1.0] * len(labels))
    return {"images": random_images(len(labels)), "labels": torch.tensor(labels), "weight": weights}


def answers(logits: Tensor) -> Any:
    """A model that says this whatever it is shown."""
    return lambda images: logits


# --------------------------------------------------------------------------------------------------------------------
# Classification


def test_training_loss_is_smoothed_and_the_reported_one_is_not():
    """task.label_smoothing spreads its mass over all classes in training; val/loss compares over runs without it."""
    task = classify("task.label_smoothing=0.3")
    logits = torch.randn(4, 10)
    log_p = logits.log_softmax(dim=1)
    hit = -log_p[torch.arange(4), torch.tensor([3, 0, 9, 5])]
    batch = labelled([3, 0, 9, 5])
    assert task.loss(answers(logits), batch).item() == pytest.approx((0.7 * hit - 0.3 * log_p.mean(1)).mean().item())
    assert task.scores(answers(logits), batch)["val/loss"].item() == pytest.approx(hit.mean().item())


def test_top5_counts_labels_among_the_five_highest_logits_and_top1_the_highest_alone():
    """Labels at ranks 1, 2, 5 and 6 of 10 classes: one of four first, three of four within five; percent."""
    logits = torch.arange(10.0, 0.0, -1.0).repeat(4, 1)  # class k has rank k + 1
    scores = classify().scores(answers(logits), labelled([0, 1, 4, 5]))
    assert scores["val/top1"].item() == 25.0 and scores["val/top5"].item() == 75.0


def test_an_image_of_which_a_logit_is_no_number_is_no_hit():
    """topk ranks nan first, so a broken model would score the share of the first classes."""
    logits = torch.tensor([[torch.nan] * 10, [torch.nan, *[0.0] * 8, 5.0], [0.0] * 9 + [5.0]])
    scores, predicted = classify().scores_and_predictions(answers(logits), labelled([0, 9, 9]))
    assert (predicted == torch.tensor([0, 9, 9])).tolist() == [False, False, True]
    assert scores["val/top1"].item() == scores["val/top5"].item() == pytest.approx(100 / 3)
    assert torch.isnan(scores["val/loss"])


def test_top5_with_fewer_classes_than_five_is_whether_the_label_is_among_all():
    scores = classify("task.num_classes=3").scores(answers(torch.randn(2, 3)), labelled([2, 0]))
    assert scores["val/top5"].item() == 100.0


def test_rows_of_weight_0_count_in_no_loss_and_no_score():
    """Stand-ins of damaged samples and of a padded last batch carry weight 0."""
    task = classify("task.label_smoothing=0.1")
    logits = torch.randn(4, 10)
    whole, part = labelled([1, 2, 3, 4], [1.0, 0.0, 1.0, 0.0]), labelled([1, 3])
    kept = answers(logits[[0, 2]])
    assert task.loss(answers(logits), whole).item() == pytest.approx(task.loss(kept, part).item())
    expected = task.scores(kept, part)
    for name, value in task.scores(answers(logits), whole).items():
        assert value.item() == pytest.approx(expected[name].item()), name
    right = torch.eye(10)[[1, 0, 0, 4]]  # right in a row that counts and in one that does not
    assert task.scores(answers(right), whole)["val/top1"].item() == 50.0
    nothing = labelled([1, 2], [0.0, 0.0])
    assert task.loss(answers(logits[:2]), nothing).item() == 0.0


def test_an_image_may_have_several_right_classes():
    """ReaL: right when the prediction is one of them, the loss of their joint probability; a fill of -1 is no class."""
    task, logits = classify(), torch.randn(3, 10)
    best = logits.argsort(dim=1, descending=True)
    labels = torch.stack([best[0, [7, 0, 6]], best[1, [1, 9, 9]], best[2, [8, 7, 6]]])
    labels[1, 1:] = -1
    scores, predicted = task.scores_and_predictions(answers(logits), labelled([0, 0, 0]) | {"labels": labels})
    assert torch.equal(predicted, best[:, 0])
    assert scores["val/top1"].item() == pytest.approx(100 / 3) and scores["val/top5"].item() == pytest.approx(200 / 3)
    p = logits.softmax(dim=1)
    chances = [p[0, best[0, [7, 0, 6]]].sum(), p[1, best[1, 1]], p[2, best[2, [8, 7, 6]]].sum()]
    assert scores["val/loss"].item() == pytest.approx(-torch.stack(chances).log().mean().item(), rel=1e-5)
    single = task.scores_and_predictions(answers(logits), labelled([0, 0, 0]) | {"labels": labels[:, :1]})[0]
    assert single == task.scores(answers(logits), labelled(labels[:, 0].tolist()))


def test_images_without_a_needed_label_are_cropped_alike():
    """Where a file names the right classes, the shards' own labels, right or wrong, are of no interest."""
    transform = classify().eval_transform
    blind = dataclasses.replace(transform, needs=())
    image, rng = random_images(1)[0], np.random.default_rng(0)
    for label in (None, 99, 3):
        row = blind(image, {"label": label}, rng)
        assert row.keys() == {"images"} and torch.equal(row["images"], transform(image, {"label": 3}, rng)["images"])


def test_loss_of_bf16_logits_is_computed_in_float32():
    """The engine's logits may be bfloat16, whose cross-entropy has three digits."""
    logits = torch.randn(4, 10).bfloat16()
    loss = classify().loss(answers(logits), labelled([3, 0, 9, 5]))
    assert loss.dtype == torch.float32
    assert loss.item() == classify().loss(answers(logits.float()), labelled([3, 0, 9, 5])).item()


@pytest.mark.parametrize("label", [None, -1, 10])
@pytest.mark.parametrize("which", ["train_transform", "eval_transform"])
def test_label_without_a_class_is_an_error_of_the_sample(label, which):
    """cross_entropy would end on an index out of bounds, on a GPU without naming anything."""
    transform = getattr(classify(), which)
    assert transform.needs == ("label",)
    with pytest.raises(SampleError, match=rf"label {label} is not within 0..9 \(task.num_classes\)"):
        transform(random_images(1)[0], {"label": label}, np.random.default_rng(0))
    assert transform(random_images(1)[0], {"label": 9}, np.random.default_rng(0))["labels"].item() == 9


# --------------------------------------------------------------------------------------------------------------------
# Both tasks


@pytest.mark.parametrize("build", [classify, simmim])
def test_model_sees_images_normalised_by_mean_and_std_of_each_channel(build):
    """data.mean and data.std are of pixels in 0..1, as everybody prints them."""
    task = build()
    seen = []

    def forward(images: Tensor, **others: Tensor) -> Any:
        seen.append(images)
        return torch.zeros(2, 10) if build is classify else {"loss": torch.zeros(())}

    batch = labelled([0, 1]) | {"mask": torch.ones(2, 8, 8, dtype=torch.bool)}
    task.loss(forward, batch)
    task.scores(forward, batch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for images in seen:
        assert images.dtype == torch.float32
        assert torch.allclose(images, (batch["images"].float() / 255 - mean) / std, atol=1e-5)
    assert len(seen) == 2


def test_normalised_pixels_come_back_exactly_and_are_clamped():
    """Pictures show the predicted pixels; a prediction beyond black or white must not wrap around."""
    normalise = Normalise(MEAN, STD, CPU)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(normalise.pixels(normalise(every)), every)
    assert normalise.pixels(torch.full((1, 3, 2, 2), 99.0)).min() == 255
    assert normalise.pixels(torch.full((1, 3, 2, 2), -99.0)).max() == 0


@pytest.mark.parametrize("build", [classify, simmim])
def test_training_crops_and_flips_as_configured_and_evaluation_does_neither(build):
    """data.hflip and data.crop_scale are the training's; evaluation is the same at every call."""
    image = random_images(1)[0]
    rng = np.random.default_rng(0)
    whole = ("data.crop_scale=[1,1]", "data.crop_ratio=[1,1]", "data.eval_crop_pct=1")
    always, never = build(*whole, "data.hflip=1"), build(*whole, "data.hflip=0")
    assert torch.equal(always.train_transform(image, {"label": 3}, rng)["images"], image.flip(-1))
    assert torch.equal(never.train_transform(image, {"label": 3}, rng)["images"], image)
    cropping = build("data.crop_scale=[0.2,0.3]", "data.hflip=1", "data.eval_crop_pct=1")
    assert not torch.equal(cropping.train_transform(image, {"label": 3}, rng)["images"], image.flip(-1))
    assert torch.equal(cropping.eval_transform(image, {"label": 3}, rng)["images"], image)
    large = random_images(1, (64, 64))[0]
    central = build("data.eval_crop_pct=0.5").eval_transform(large, {"label": 3}, rng)["images"]
    assert torch.equal(central, large[:, 16:48, 16:48])


@pytest.mark.parametrize("build", [classify, simmim])
def test_squashed_evaluation_loses_nothing_of_the_image(build):
    """data.eval_crop=squash with eval_crop_pct=1: the official 384 px configurations, TEST.CROP False."""
    wide, rng = random_images(1, (32, 64))[0], np.random.default_rng(0)
    whole = build("data.eval_crop=squash", "data.eval_crop_pct=1").eval_transform(wide, {"label": 3}, rng)["images"]
    assert torch.equal(whole, resize(wide, (32, 32), "bicubic"))
    half = build("data.eval_crop=squash", "data.eval_crop_pct=0.5").eval_transform(wide, {"label": 3}, rng)["images"]
    assert torch.equal(half, resize(wide, (64, 64), "bicubic")[:, 16:48, 16:48])
    centre = build("data.eval_crop_pct=1").eval_transform(wide, {"label": 3}, rng)["images"]
    assert torch.equal(centre, wide[:, :, 16:48])


@pytest.mark.parametrize("build", [classify, simmim])
def test_count_is_what_the_loss_is_the_mean_over(build):
    """Two micro-batches joined: their losses, weighted by their counts, are the loss of both together."""
    task = build("model.drop_path_rate=0", "task.label_smoothing=0.1") if build is classify else build()
    task.module.eval()
    mask = torch.rand(6, 8, 8) < torch.tensor([0.1, 0.5, 0.9, 0.3, 0.3, 0.2]).view(6, 1, 1)
    batch = labelled([1, 2, 3, 4, 5, 6], [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]) | {"mask": mask}
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    none = {**parts[0], "weight": torch.zeros(2)}
    with torch.no_grad():
        counts = [task.count(part) for part in parts]
        losses = [float(task.loss(task.module, part)) for part in parts]
        joined = float(task.loss(task.module, batch))
        assert task.count(none) == 0 and float(task.loss(task.module, none)) == 0
    assert counts == ([1, 3] if build is classify else [16 * int(mask[0].sum()), 16 * int(mask[2:5].sum())])
    assert np.average(losses, weights=counts) == pytest.approx(joined, rel=1e-5)
    assert np.mean(losses) != pytest.approx(joined, rel=1e-3)


def test_task_section_decides_what_is_trained():
    """SimMIM has an encoder without a head, the classifier one logit per class."""
    masked, labelled_task = simmim(), classify("task.num_classes=7")
    assert isinstance(masked, SimMIMTask) and isinstance(masked.module, SimMIM) and masked.picture is not None
    assert not [name for name, _ in masked.module.named_parameters() if "head" in name]
    assert isinstance(labelled_task, ClassifyTask) and labelled_task.picture is None
    assert labelled_task.module(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert labelled_task.multiply_adds > masked.multiply_adds > 0


# --------------------------------------------------------------------------------------------------------------------
# SimMIM


def test_masks_have_the_configured_unit_and_share_and_follow_the_generator():
    """4 of 16 squares of 8 px, 2 x 2 patches each; labels are of no interest."""
    task = simmim("task.mask_unit_px=8", "task.mask_ratio=0.25")
    for transform in (task.train_transform, task.eval_transform):
        assert transform.needs == ()
        first, again, other = (
            transform(random_images(1)[0], {}, np.random.default_rng(seed))["mask"] for seed in (1, 1, 2)
        )
        assert first.shape == (8, 8) and first.sum() == 16
        squares = first.view(4, 2, 4, 2).float().mean(dim=(1, 3))
        assert set(squares.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_simmim_loss_and_score_are_of_hidden_pixels_and_images_that_count():
    """The batch's mask and weights reach the model."""
    task = simmim("model.drop_path_rate=0")
    task.module.eval()
    batch = {"images": random_images(2), "mask": torch.rand(2, 8, 8) < 0.5, "weight": torch.tensor([1.0, 0.0])}
    alone = {name: value[:1] for name, value in batch.items()}
    images = task.normalise(batch["images"])
    with torch.no_grad():
        prediction = task.module(images, batch["mask"])["reconstruction"][0]
        hidden = batch["mask"][0].repeat_interleave(4, 0).repeat_interleave(4, 1)
        by_hand = (prediction - images[0]).abs()[:, hidden].mean().item()
        for given in (batch, alone):
            assert task.loss(task.module, given).item() == pytest.approx(by_hand, rel=1e-4)
            scores = task.scores(task.module, given)
            assert scores.keys() == {"val/loss"} and scores["val/loss"].item() == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize(("value", "window"), [("null", None), ("5", 5)])
def test_norm_target_reaches_the_model(value, window):
    """Off would train on plain pixels without a word."""
    module = simmim(f"task.norm_target={value}").module
    assert module.norm_target == window
    images, mask = torch.randn(1, 3, 32, 32), torch.ones(1, 8, 8, dtype=torch.bool)
    outputs = module.eval()(images, mask)
    target = images if window is None else norm_target(images, window)
    assert outputs["loss"].item() == pytest.approx((outputs["reconstruction"] - target).abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("target", ["null", "7"])
def test_picture_shows_original_masked_and_reconstructed_from_left_to_right(target):
    """Hidden squares grey in the middle and predicted on the right; what was visible is the original's everywhere.

    With a normalised target the prediction is brought back to pixels: a perfect one shows the original.
    """
    task = simmim(f"task.norm_target={target}")
    images = random_images(2)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, :4, 2:] = True
    shown = random_images(4)[2:]  # what a model of plain pixels predicts

    def forward(**inputs: Tensor) -> dict[str, Tensor]:
        plain, relative = task.normalise(shown), norm_target(inputs["images"], 7)
        return {"loss": torch.zeros(()), "reconstruction": plain if target == "null" else relative}

    picture = task.picture(forward, {"images": images, "mask": mask, "weight": torch.ones(2), "keys": ["a", "b"]})
    assert picture.dtype == np.uint8
    predicted = shown if target == "null" else images
    hidden = mask[0].repeat_interleave(4, 0).repeat_interleave(4, 1)
    for row in range(2):
        top = 16 + 100 * row  # 16 px of labels; 32 px images are enlarged to 96, with gaps of 4
        cells = [picture[top : top + 96 : 3, 100 * c : 100 * c + 96 : 3] for c in range(3)]
        original, masked, restored = (torch.from_numpy(cell.copy()).permute(2, 0, 1).int() for cell in cells)
        assert torch.equal(original, images[row].int())
        assert (masked[:, hidden] == 127).all() and torch.equal(masked[:, ~hidden], images[row].int()[:, ~hidden])
        assert (restored[:, hidden] - predicted[row].int()[:, hidden]).abs().max() <= 1
        assert torch.equal(restored[:, ~hidden], images[row].int()[:, ~hidden])


def test_picture_holds_eight_images_of_a_larger_batch():
    """A batch of 128 would be a picture of 12,800 px."""
    task = simmim()
    batch = {"images": random_images(20), "mask": torch.ones(20, 8, 8, dtype=torch.bool), "weight": torch.ones(20)}
    with torch.no_grad():
        picture = task.picture(task.module.eval(), batch)
    assert picture.shape == (16 + 8 * 100 - 4, 3 * 100 - 4, 3)


# --------------------------------------------------------------------------------------------------------------------
# Models


def test_every_key_of_the_model_section_reaches_the_model():
    """A key that is dropped on the way trains another model than the one that was asked for."""
    model = build_model(
        config_of(
            "cifar10_finetune", "model.img_size=[32,64]", "model.patch_size=2", "model.window_size=[4,8]",
            "model.depths=[2,3]", "model.pretrained_window_sizes=[6,3]", "model.mlp_ratio=2",
            "model.drop_path_rate=0.4", "model.extra_norm_period=2",
        ).model,
        num_classes=5,
    )  # fmt: skip
    assert (model.img_size, model.patch_size, model.window_size) == ((32, 64), 2, (4, 8))
    assert (model.embed_dim, model.depths, model.num_heads) == (16, (2, 3), (1, 2))
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [block.drop_path_rate for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [block.attn.pretrained_window_size for block in blocks] == [(6, 6)] * 2 + [(3, 3)] * 3
    assert [block.norm3 is not None for block in blocks] == [False, True, False, True, False]
    assert blocks[0].mlp.fc1.out_features == 32 and model.head.out_features == 5


def test_null_takes_the_sizes_own_value():
    """embed_dim, depths, num_heads and extra_norm_period: null = what the size is named for."""
    own = ("model.embed_dim=null", "model.depths=null", "model.num_heads=null", "model.extra_norm_period=null")
    tiny = build_model(config_of("cifar10_finetune", *own).model, num_classes=0)
    assert (tiny.embed_dim, tiny.depths, tiny.num_heads) == (96, (2, 4), (3, 6))
    huge = config_of("cifar10_finetune", "model=huge", *own, "model.img_size=192", "model.window_size=12").model
    with torch.device("meta"):
        model = build_model(huge, num_classes=0)
    assert model.depths == (2, 2, 18, 2) and model.layers[2].blocks[5].norm3 is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.clamp_to_shorter_side=true", "model.window_size=[4,2]"),
            r"model: window_size \(4, 2\) must be square",
        ),
        (("model.img_size=34",), "model: img_size height 34 is not a multiple of patch_size 4"),
        (("model.depths=[1,1,1]",), "model: depths .* must have one entry per stage"),
        (("model.pretrained_window_sizes=[0]",), "model: depths .* must have one entry per stage"),
        (("model.num_heads=[3,2]",), r"model: num_heads\[0\] \(3\) does not divide"),
        (("model.name=gigantic",), "model: no SwinV2 size 'gigantic'"),
    ],
)
def test_sizes_that_do_not_fit_are_the_users_error_and_name_the_section(overrides, message):
    """Exit code 2 and one line, not a traceback."""
    config = config_of("cifar10_finetune", *overrides)
    with pytest.raises(ConfigError, match=message):
        build_task(config, CPU)


@pytest.mark.parametrize("window", [4, 1])
def test_norm_target_that_is_no_window_is_the_users_error(window):
    with pytest.raises(ConfigError, match=rf"task: norm_target \({window}\) must be an odd number"):
        simmim(f"task.norm_target={window}")


@pytest.mark.parametrize("value", [True, [1, 2, 3], 0, 2.0, "8"])
def test_a_size_is_a_whole_number_or_a_pair(value):
    with pytest.raises(ConfigError, match=r"key \(.*\) must be a positive whole number or a pair \[height, width\]"):
        pair("key", value)
    assert pair("key", 3) == (3, 3) and pair("key", [3, 4]) == (3, 4)
