"""Images of any number of bands in a task: scaled and normalised in float32; what was not measured counts nowhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swinv2_train.config import Config, ConfigError
from swinv2_train.evaluation.scoring import evaluate_loader
from swinv2_train.tasks import build_task
from swinv2_train.tasks.inputs import Normalise
from swinv2_train.tasks.task import Task
from swinv2_train.training.loop import loss_shares
from tests.support.configs import composed
from tests.support.nodata import simmim_loss_by_hand

CPU = torch.device("cpu")
BANDS = 5
MEAN, STD = [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 0.5, 3.0, 1.5]
SMALL = (
    "model=demo", "run_dir=unused", "data.shards=unused", "model.embed_dim=16", "model.depths=[1,1]",
    "model.num_heads=[1,2]", f"model.in_chans={BANDS}", f"data.mean={MEAN}", f"data.std={STD}",
)  # fmt: skip
SIMMIM = ("task=simmim", "task.mask_unit_px=8", "data.nodata=[nan]")


def config_of(*overrides: str) -> Config:
    return composed([*SMALL, *overrides])


def task_of(*overrides: str) -> Task:
    torch.manual_seed(0)
    task = build_task(config_of(*overrides), CPU)
    with torch.no_grad():  # off the initial values, which predict nothing
        for parameter in task.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    task.module.eval()
    return task


def batch_of(count: int = 4, seed: int = 0) -> dict[str, Any]:
    """Images with a corner of no data, more of it from image to image, and another corner in band 1 alone."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, BANDS, 32, 32, generator=generator)
    for number in range(count):
        images[number, :, : 5 * number, :20] = torch.nan
        images[number, 1, 20:, 20:] = torch.nan
    mask = (torch.rand(count, 4, 4, generator=generator) < 0.6).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return {"images": images, "mask": mask, "weight": torch.ones(count)}


def by_hand(task: Task, batch: dict[str, Any]) -> float:
    images = (batch["images"] - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    return simmim_loss_by_hand(task.module, images, batch["mask"], batch["weight"])


def test_values_are_scaled_clipped_and_normalised_per_band_in_float32():
    """SatVision's and Satlas' inputs are such a line; 8 bit would leave 256 steps of what has thousands."""
    config = config_of(
        "data.scale.factor=[0.01,1,0.5,2,-1]", "data.scale.offset=[0,-3,1,0,2]", "data.scale.clip=[-1,4]"
    )
    images = torch.randn(2, BANDS, 6, 7, dtype=torch.float64).mul(50).float()
    factor, offset = ([0.01, 1, 0.5, 2, -1], [0, -3, 1, 0, 2])
    for band in range(BANDS):
        expected = (images[:, band].double() * factor[band] + offset[band]).clamp(-1, 4)
        expected = (expected - MEAN[band]) / STD[band]
        torch.testing.assert_close(Normalise.of(config, CPU)(images)[:, band].double(), expected, rtol=1e-5, atol=1e-5)
    plain = Normalise.of(config_of(), CPU)
    assert torch.equal(plain(images), (images - plain.mean) / plain.std) and plain.measured(images) is None
    torch.testing.assert_close(plain.pixels(plain(images)), images)


def test_what_was_not_measured_is_its_bands_mean_at_the_input():
    normalise = Normalise.of(config_of("data.nodata=[nan,-9999]", "data.scale.clip=[0,1]"), CPU)
    images = batch_of()["images"]
    values, measured = normalise(images), normalise.measured(images)
    assert measured is not None and torch.equal(measured, ~images.isnan())
    assert (values[~measured] == 0).all() and values.isfinite().all()


@pytest.mark.parametrize("target", ["null", "7"])
def test_loss_with_a_corner_of_no_data_is_the_loss_of_the_rest(target):
    """No such pixel is a target, and none counts in the denominator, whatever lies beneath it."""
    task, batch = task_of(*SIMMIM, f"task.norm_target={target}"), batch_of()
    batch["weight"][1] = 0
    with torch.no_grad():
        loss = float(task.loss(task.module, batch))
        if target == "null":
            assert loss == pytest.approx(by_hand(task, batch), rel=1e-5)
        else:
            assert loss == pytest.approx(_by_hand_with_windows(task, batch, 7), rel=1e-4)
        batch["images"][1] = 1e9
        assert float(task.loss(task.module, batch)) == loss


def _by_hand_with_windows(task: Task, batch: dict[str, Any], window: int) -> float:
    images = task.normalise(batch["images"]).double().numpy()
    measured = ~batch["images"].isnan().numpy()
    prediction = task.module(torch.from_numpy(images).float(), batch["mask"])["reconstruction"].double().numpy()
    hidden = batch["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    errors = []
    for b, c, y, x in np.argwhere(measured & hidden[:, None]):
        if batch["weight"][b] == 0:
            continue
        rows, columns = (slice(max(0, at - window // 2), at + window // 2 + 1) for at in (y, x))
        near = images[b, c, rows, columns][measured[b, c, rows, columns]]
        if len(near) > 1:
            target = (images[b, c, y, x] - near.mean()) / np.sqrt(near.var(ddof=1) + 1e-6)
            errors.append(abs(prediction[b, c, y, x] - target))
    return float(np.mean(errors))


@pytest.mark.parametrize("target", ["null", "7"])
def test_no_data_reaches_no_gradient(target):
    """The same gradients, and finite ones, wherever in the no data a number would stand for it."""
    task, batch = task_of(*SIMMIM, f"task.norm_target={target}"), batch_of()
    images = torch.where(batch["images"].isnan(), torch.nan, batch["images"])
    gradients = []
    for filler in (0.0, 1e4):
        filled = task.normalise(images)
        measured = task.normalise.measured(images)
        assert measured is not None
        inputs = {"images": filled, "mask": batch["mask"], "weight": batch["weight"], "measured": measured}
        hidden = batch["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
        inputs["images"] = torch.where(~measured & hidden, filler, filled)  # the encoder sees none of what is hidden
        task.module.zero_grad()
        task.module(**inputs)["loss"].backward()
        gradients.append([p.grad.clone() for p in task.module.parameters() if p.grad is not None])
    assert all(each.isfinite().all() for each in gradients[0])
    if target == "null":  # with windows the fill would have to be exact: known values alone are summed
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    else:
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["null", "7"])
def test_a_step_of_unequal_micro_batches_is_the_step_of_one(target):
    """train.loss_mean=global: micro-batches count by their measured hidden values, so how they are cut is no matter."""
    task, whole = task_of(*SIMMIM, f"task.norm_target={target}"), batch_of(6)
    whole["weight"][2] = 0
    cut = [{name: value[start:stop] for name, value in whole.items()} for start, stop in ((0, 2), (2, 4), (4, 6))]

    class Run:
        class config:  # noqa: N801
            class train:  # noqa: N801
                loss_mean = "global"

        class world:  # noqa: N801
            world_size = 1

    run: Any = Run
    run.task = task
    with torch.no_grad():
        parts = [float(task.loss(task.module, each)) for each in cut]
        joined = float(task.loss(task.module, whole))
    shares = loss_shares(run, cut)
    assert np.mean([part * share for part, share in zip(parts, shares, strict=True)]) == pytest.approx(joined, rel=1e-5)
    assert np.mean(parts) != pytest.approx(joined, rel=1e-4)


def test_val_loss_is_the_same_however_batches_are_cut():
    task, whole = task_of(*SIMMIM), batch_of(6)
    whole["weight"][3] = 0
    with torch.no_grad():
        for size in (1, 2, 6):
            cut = [{name: v[start : start + size] for name, v in whole.items()} for start in range(0, 6, size)]
            found = evaluate_loader(lambda batch: task.scores(task.module, batch), cut)
            assert found["val/loss"] == pytest.approx(by_hand(task, whole), rel=1e-5)


def test_a_batch_of_nothing_measured_counts_nothing_and_stays_finite():
    task, batch = task_of(*SIMMIM), batch_of()
    batch["images"].fill_(torch.nan)
    loss = task.loss(task.module, batch)
    loss.backward()
    assert loss.item() == 0 and task.count(batch) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.module.parameters())


def test_classification_of_images_with_no_data_is_finite():
    """Erasing fills with noise, mixup and cutmix mix, after the fill."""
    task = task_of("task=classify", "task.num_classes=3", "task.rand_augment=null", "data.nodata=[nan]")
    rng = np.random.default_rng(0)
    rows = [task.train_transform(image, {"label": 1}, rng) for image in batch_of()["images"]]
    assert rows[0]["images"].shape == (BANDS, 32, 32) and rows[0]["images"].dtype == torch.float32
    batch = {"images": torch.stack([row["images"] for row in rows]), "weight": torch.ones(4),
             "labels": torch.ones(4, dtype=torch.int64), "erasing": [row["erasing"] for row in rows],
             "mixing_seed": [row["mixing_seed"] for row in rows]}  # fmt: skip
    loss = task.loss(task.module, batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in task.module.parameters())


@pytest.mark.parametrize(("key", "value"), [("rand_augment", "rand-m9-mstd0.5-inc1"), ("color_jitter", "0.4")])
def test_photometric_augmentation_of_other_than_photographs_is_refused(key, value):
    """timm's operations are for 3 x 8 bits: they would change what other numbers mean."""
    others = {"rand_augment": "null", "color_jitter": "0", key: value}
    given = [f"task.{name}={each}" for name, each in others.items()]
    with pytest.raises(
        ConfigError, match=rf"task.{key} .*photographs of 3 x 8 bits.*set task.rand_augment=null task.c"
    ):
        config_of("task=classify", *given)
    three = ("model.in_chans=3", "data.mean=[0.5,0.5,0.5]", "data.std=[1,1,1]")
    assert not config_of("task=classify", *given, *three).reads_values  # photographs
    with pytest.raises(ConfigError, match=f"task.{key}"):
        config_of("task=classify", *given, *three, "data.bands=[2,1,0]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.mean=[1,2]",), r"data.mean \(\[1.0, 2.0\]\) must hold 5 numbers, one for each of the 5 bands"),
        (("data.std=[1,2]",), r"data.std .* must hold 5 numbers"),
        (("data.scale.factor=[1,2]",), r"data.scale.factor \(\[1, 2\]\) must be a number, or hold 5"),
        (("data.scale.offset=x",), r"data.scale.offset \(x\) must be a finite number, or a list"),
        (("data.scale.clip=[1,0]",), r"data.scale.clip .* must be \[low, high\]"),
        (("data.bands=[0,1]",), r"data.bands .* chooses 2 bands, but model.in_chans is 5; set model.in_chans=2"),
        (("data.bands=[0,1,2,2,3]",), r"data.bands .* must be different bands"),
        (("data.bands=[0,1,2,-1,3]",), r"data.bands .* must be different bands"),
        (("data.nodata=[inf]",), r"data.nodata \(inf\) must be a number or nan"),
        (("data.picture_bands=[0,1]",), r"data.picture_bands .* must be three, or one, of the model's bands 0..4"),
        (("data.picture_bands=[0,1,5]",), r"data.picture_bands .* must be three, or one"),
        (("data.image_member=input.bin",), r"data.image_member \(input.bin\) must be what follows KEY"),
        (("data.array_layout=cwh",), r"data.array_layout \(cwh\) is none of hwc, chw"),
        (
            ("model.in_chans=3", "data.bands=[2,1,0]", "data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"),
            r"data.mean .* are the default's, of pixels in 0..1, but images are read as the files' own numbers",
        ),
    ],
)
def test_what_is_given_per_band_is_given_for_all_of_them(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def picture_of(task: Task, batch: dict[str, Any], shown: Tensor) -> np.ndarray:
    def forward(**inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.zeros(()), "reconstruction": shown}

    return task.picture(forward, batch)


def test_pictures_show_three_bands_stretched_by_percentiles_and_what_is_missing_black():
    task, batch = task_of(*SIMMIM, "data.picture_bands=[4,2,0]"), batch_of()
    picture = picture_of(task, batch, torch.zeros(4, BANDS, 32, 32))
    cell = picture[16 + 300 : 16 + 396 : 3, 0:96:3]  # the last image's original; 32 px are enlarged to 96
    image = batch["images"][3].numpy()
    for channel, band in enumerate((4, 2, 0)):
        low, high = np.nanpercentile(image[band], (2, 98))
        expected = np.nan_to_num(255 * np.clip((image[band] - low) / (high - low), 0, 1))
        assert np.abs(cell[..., channel] - expected).max() < 1.01
    assert (cell[:15, :20] == 0).all()
    masked = picture[16 + 300 : 16 + 396 : 3, 100:196:3]
    hidden = batch["mask"][3].repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    assert (masked[hidden] == 127).all() and (masked[~hidden] == cell[~hidden]).all()


def test_a_perfect_reconstruction_shows_the_original():
    task, batch = task_of(*SIMMIM), batch_of()
    batch["images"] = batch["images"].nan_to_num(0.3)
    picture = picture_of(task, batch, task.normalise(batch["images"]))
    rows = picture[16:].astype(int)
    assert np.abs(rows[:96, :96] - rows[:96, 200:296]).max() <= 1


def test_pictures_show_one_band_as_grey_or_a_row_for_each():
    batch = batch_of()
    grey = picture_of(task_of(*SIMMIM, "data.picture_bands=[3]"), batch, torch.zeros(4, BANDS, 32, 32))[16:]
    assert (grey[..., 0] == grey[..., 2]).all()
    every = picture_of(task_of(*SIMMIM, "data.picture_all_bands=true"), batch, torch.zeros(4, BANDS, 32, 32))
    assert every.shape == (16 + 100 * BANDS - 4, 296, 3)
    assert not np.array_equal(every[16:112, :96], every[116:212, :96])
