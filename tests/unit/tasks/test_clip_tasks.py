"""What the tasks make of clips: their losses, what they count, and what they draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swinv2_train.tasks import build_task
from swinv2_train.tasks.clip_picture import clip_picture, frames_in_a_row
from tests.support.configs import composed

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
