"""What the tasks make of clips: their losses, what they count, and what they draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.engine import build_engine
from swinv2_train.tasks import build_task
from swinv2_train.tasks.clip_picture import clip_picture, frames_in_a_row
from swinv2_train.training.param_groups import build_param_groups
from tests.support.configs import composed
from tests.support.one_rank import ONE

CLIPS = (
    "run_dir=x", "data.shards=x", "model=demo", "model.img_size=32", "model.window_size=4", "model.depths=[1,1]",
    "model.num_heads=[1,2]", "model.embed_dim=8", "model.frames=4", "model.patch_frames=2", "model.window_frames=2",
    "model.pretrained_window_sizes=[0,0]", "engine=local", "train.micro_batch_size=2",
)  # fmt: skip
SIMMIM = ("task=simmim", "task.mask_unit_px=8", *CLIPS)


def simmim_batch(frames: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(0, 256, (2, 3, frames, 32, 32), generator=generator, dtype=torch.uint8),
        "mask": torch.rand(2, 8, 8, generator=generator) < 0.6,
        "weight": torch.ones(2),
    }


def test_simmim_counts_the_hidden_pixels_of_all_frames():
    """train.loss_mean=global weighs a micro-batch by them: half the clip's frames, half the count."""
    task = build_task(composed(SIMMIM), torch.device("cpu"))
    batch = simmim_batch()
    assert task.count(batch) == 4 * 16 * int(batch["mask"].sum())
    batch["weight"][0] = 0
    assert task.count(batch) == 4 * 16 * int(batch["mask"][1].sum())


@pytest.mark.parametrize("norm_target", ["null", "5"])
def test_a_picture_of_simmim_has_the_frames_of_a_clip_in_a_row(norm_target):
    """Three rows a clip; what is not hidden is shown as it is, in every frame, and the rest as the model says."""
    task = build_task(composed([*SIMMIM, f"task.norm_target={norm_target}"]), torch.device("cpu"))
    batch = simmim_batch()
    with torch.no_grad():
        picture = task.picture(task.module.eval(), batch)
    side, line, gap = 96, 16, 4  # of 32 px, enlarged; text above a row
    assert picture.shape == (6 * (line + side), 4 * (side + gap) - gap, 3)
    hidden = batch["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    for clip in range(2):
        rows = [picture[(3 * clip + kind) * (line + side) + line :][:side] for kind in range(3)]
        for frame in range(4):
            original, masked, restored = (row[1::3, frame * (side + gap) :][:, 1:side:3] for row in rows)
            truth = batch["images"][clip, :, frame].permute(1, 2, 0).numpy()
            assert np.array_equal(original, truth)
            assert np.array_equal(masked[~hidden[clip]], truth[~hidden[clip]]) and (masked[hidden[clip]] == 127).all()
            assert np.array_equal(restored[~hidden[clip]], truth[~hidden[clip]])
            assert (restored[hidden[clip]] != truth[hidden[clip]]).mean() > 0.9


def test_long_clips_are_shown_by_frames_from_the_first_to_the_last():
    clip = torch.arange(32, dtype=torch.uint8).view(1, 32, 1, 1).expand(3, 32, 2, 2)
    assert [int(frame[0, 0, 0]) for frame in frames_in_a_row(clip)] == [0, 4, 9, 13, 18, 22, 27, 31]
    assert len(frames_in_a_row(clip[:, :5])) == 5


def test_a_picture_says_what_a_clip_is_and_what_it_was_taken_for():
    """A row a clip; its text differs where the prediction, or what is right, does."""
    clips = torch.zeros(2, 3, 4, 96, 96, dtype=torch.uint8)
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]])
    plain, named, none = (
        clip_picture(clips, right, probabilities, names)
        for right, names in (([[1], [1]], None), ([[1], [1]], ("jumping", "Läufer", "跑")), ([[], []], None))
    )
    assert plain.shape == named.shape == none.shape == (2 * (16 + 96), 4 * 100 - 4, 3)
    assert (plain != named).any() and (plain != none).any()
    assert not np.array_equal(plain[:16], plain[112:128])


def test_loss_of_simmim_is_the_mean_error_over_hidden_pixels_of_every_frame():
    task = build_task(composed(SIMMIM), torch.device("cpu"))
    batch = simmim_batch()
    with torch.no_grad():
        outputs = task._outputs(task.module.eval(), batch)
    images = task.normalise(batch["images"]).double().numpy()
    predicted = outputs["reconstruction"].double().numpy()
    total = count = 0.0
    for b in range(2):
        for y in range(32):
            for x in range(32):
                if batch["mask"][b, y // 4, x // 4]:
                    total += float(np.abs(predicted[b, :, :, y, x] - images[b, :, :, y, x]).sum())
                    count += 3 * 4
    assert math.isclose(float(outputs["loss"]), total / count, rel_tol=1e-5)


CLASSIFY = (
    "task=classify", "task.num_classes=5", "task.cutmix_alpha=0", "task.erasing_prob=0", "task.rand_augment=null",
    *CLIPS,
)  # fmt: skip


def classifier(*overrides: str):
    """A task whose weights are all random, for fresh blocks are the identity."""
    task = build_task(composed([*CLASSIFY, *overrides]), torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    task.module.eval()
    return task


def test_scores_and_features_of_several_views_are_those_of_their_means():
    """Probabilities are averaged, not logits, in as many passes as there are views, each of a micro-batch of clips."""
    task, passes = classifier("task.eval_views=3", "task.eval_crops=2"), []
    images = torch.randint(0, 256, (3, 6, 3, 4, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batch = {"images": images, "labels": torch.tensor([0, 4, 2]), "weight": torch.tensor([1.0, 1.0, 0.0])}

    def forward(**inputs):
        passes.append(tuple(inputs["images"].shape))
        return task.module(**inputs)

    with torch.no_grad():
        scores, said = task.scores_and_predictions(forward, batch)
        assert passes == [(3, 3, 4, 32, 32)] * 6
        seen = [[task.normalise(images[b, v][None]) for v in range(6)] for b in range(3)]
        each = [[task.module(view)[0] for view in views] for views in seen]
        pooled = [[task.module.pooled_features(view)[0] for view in views] for views in seen]
        found, features = task.probabilities(forward, batch), task.features(forward, batch)
    for b in range(3):
        mean = sum(row.double().softmax(0) for row in each[b]) / 6
        assert torch.allclose(found[b].double(), mean, atol=1e-6)
        assert torch.allclose(features[b], sum(pooled[b]) / 6, atol=1e-5)
        assert int(said[b]) == int(mean.argmax())
    assert abs(float(found[0].log()[0]) - float(sum(row[0] for row in each[0]) / 6)) > 1e-3
    losses = [-math.log(float(found[b][label])) for b, label in ((0, 0), (1, 4))]
    assert float(scores["val/loss"]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert task.eval_transform.clips.views == 3 and task.eval_transform.clips.crops == 2


def test_a_picture_of_a_batch_shows_its_first_clips_seen_once():
    """Of training (one view), of evaluation (the middle view), with several right classes and with none known."""
    task = classifier("task.eval_views=3")
    one = torch.randint(0, 256, (6, 3, 4, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        trained = task.picture(task.module, {"images": one, "labels": torch.arange(6) % 5}, ("a", "b", "c", "d", "e"))
        seen = task.picture(task.module, {"images": one.unsqueeze(1).repeat(1, 3, 1, 1, 1, 1)})
        several = task.picture(task.module, {"images": one, "labels": torch.tensor([[1, -1], [2, 3]] * 3)})
    assert trained.shape == seen.shape == several.shape == (4 * (16 + 96), 4 * 100 - 4, 3)
    assert np.array_equal(trained[16:112], seen[16:112]) and (trained[:16] != seen[:16]).any()
    assert task.picture is not None and build_task(
        composed([*CLASSIFY, "model.frames=null"]), torch.device("cpu")
    ).picture is None  # fmt: skip


def test_views_are_of_clips():
    for key in ("eval_views", "eval_crops"):
        with pytest.raises(ConfigError, match=rf"task.{key} \(3\) is of clips, and model.frames is null; set task"):
            composed([*CLASSIFY, "model.frames=null", f"task.{key}=3"])


@pytest.mark.parametrize("policy", ["blocks", "attention", "every:2"])
def test_recomputation_changes_no_bit_of_a_step_on_clips(policy):
    """Loss and gradients with drop path, behind windows that are shifted in time."""
    found = []
    for what in ("none", policy):
        config = composed([*SIMMIM, "model.frames=8", "model.depths=[2,2]", "model.drop_path_rate=0.5",
                           "engine.precision=fp32", f"model.recompute={what}"])  # fmt: skip
        torch.manual_seed(0)
        task = build_task(config, torch.device("cpu"))
        engine = build_engine(
            task.module, build_param_groups(task.module, config.optim), config, ONE, 1, task.block_types
        )
        with torch.no_grad():
            for name, parameter in task.module.named_parameters():
                if "norm" in name:
                    parameter.add_(0.5)
        torch.manual_seed(1)
        loss = task.loss(engine.forward, simmim_batch(8))
        engine.backward(loss)
        found.append((loss.detach(), {name: p.grad.clone() for name, p in task.module.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())
    assert any(grad.abs().sum() > 0 for name, grad in found[0][1].items() if "cpb_mlp" in name)
