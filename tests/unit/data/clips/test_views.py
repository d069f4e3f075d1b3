"""Which frames of a clip are seen, and what is cut out of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from swinv2_train.data.clips.clip import HeldClip
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.transforms.crop import eval_crop, random_box, random_flip, random_resized_crop
from swinv2_train.tasks.inputs import ImageTransform
from tests.support.clips import frames_file, number_of
from tests.support.configs import make_config

DATA = make_config(data={"interpolation": "bilinear", "eval_crop_pct": 1.0, "hflip": 0.5}).data


def counted(count: int, height: int = 12, width: int = 20) -> HeldClip:
    """Frames whose pixels are all their number, 0 to count - 1."""
    return HeldClip(torch.arange(count, dtype=torch.uint8).view(1, -1, 1, 1).expand(3, count, height, width))


def shown(clips: torch.Tensor) -> list[int]:
    """The numbers of the frames of one clip, (3, T, h, w)."""
    return clips[0, :, 0, 0].tolist()


def test_a_training_clip_begins_anywhere_and_goes_on_by_the_stride():
    views, starts = ClipViews(frames=4, stride=3), set()
    for seed in range(200):
        numbers = shown(views.train(counted(20), (8, 8), DATA, np.random.default_rng(seed)))
        assert numbers == [numbers[0] + step for step in (0, 3, 6, 9)]
        starts.add(numbers[0])
    assert starts == set(range(11))  # frame 19 is the last that there is


def test_a_file_shorter_than_the_clip_begins_again():
    views = ClipViews(frames=6, stride=2)
    numbers = shown(views.train(counted(5), (8, 8), DATA, np.random.default_rng(0)))
    assert numbers == shown(views.evaluate(counted(5), (8, 8), DATA)) == [0, 2, 4, 1, 3, 0]
    assert shown(views.evaluate(counted(1), (8, 8), DATA)) == [0] * 6


def test_an_evaluation_sees_the_middle_or_clips_evenly_from_the_first_to_the_last():
    """32 frames at a stride of 2 of 300: starts 0 to 300 - 63, as published for tests."""
    assert ClipViews(32, 2).starts(300) == [118]
    assert ClipViews(32, 2, views=4).starts(300) == [0, 79, 158, 237]
    assert ClipViews(32, 2, views=3).starts(10) == [0, 0, 0]


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (32, 32), (31, 57)])
def test_three_crops_are_both_ends_and_the_middle_of_the_longer_side(size):
    pixels = torch.arange(3 * size[0] * size[1]).remainder(251).to(torch.uint8).view(3, 1, *size)
    side = min(size)
    seen = ClipViews(1, 1, crops=3).evaluate(HeldClip(pixels), (side, side), DATA)
    spare = max(size) - side
    for crop, begin in zip(seen, (0, round(spare / 2), spare), strict=True):
        top, left = (begin, 0) if size[0] > size[1] else (0, begin)
        assert crop[:, 0].equal(pixels[:, 0, top : top + side, left : left + side])
    assert seen[1, :, 0].equal(eval_crop(pixels[:, 0], (side, side), DATA))


def test_views_and_crops_stand_one_after_the_other():
    seen = ClipViews(2, 1, views=2, crops=3).evaluate(counted(9), (12, 12), DATA)
    assert seen.shape == (6, 3, 2, 12, 12)
    assert [shown(clip) for clip in seen] == [[0, 1]] * 3 + [[7, 8]] * 3


@pytest.mark.parametrize("dihedral", [False, True])
def test_every_frame_of_a_clip_is_cut_turned_and_mirrored_alike(dihedral):
    """A clip of one repeated frame stays one, and its crop is what the image's would be."""
    torch.manual_seed(0)
    frame, data = torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8), replace(DATA, dihedral=dihedral)
    still = HeldClip(frame[:, None].expand(3, 9, 40, 52))
    image = ImageTransform(data, (16, 24), train=True)
    outcomes = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        seen = ClipViews(4, 2).train(still, (16, 24), data, rng)
        assert all(seen[:, 0].equal(seen[:, place]) for place in range(4))
        same = np.random.default_rng(seed)
        same.integers(3)  # the clip's start is drawn first
        assert seen[:, 0].equal(image(frame, {}, same)["images"])
        assert rng.random() == same.random()
        outcomes.add(seen.numpy().tobytes())
    assert len(outcomes) == 12


def test_mirroring_can_be_switched_off():
    """Where the direction of a motion is the label."""
    bright_left = torch.zeros(3, 4, 16, 16, dtype=torch.uint8)
    bright_left[..., :8] = 200
    for hflip, mirrored in ((0.0, {False}), (1.0, {True}), (0.5, {False, True})):
        data = replace(DATA, hflip=hflip, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0])
        rngs = map(np.random.default_rng, range(20))
        seen = [ClipViews(2, 1).train(HeldClip(bright_left), (16, 16), data, rng) for rng in rngs]
        assert {bool(clip[0, 0, 0, -1] > 100) for clip in seen} == mirrored


def test_frames_are_decoded_once_and_in_order():
    """Overlapping views share their frames; only those are decoded that any sees."""

    class Watched(HeldClip):
        asked: list[list[int]] = []

        def frames(self, positions):
            self.asked.append(list(positions))
            return super().frames(positions)

    clip = Watched(torch.zeros(3, 12, 8, 8, dtype=torch.uint8))
    ClipViews(4, 2, views=3).evaluate(clip, (8, 8), DATA)
    assert clip.asked == [[0, 2, 4, 5, 6, 7, 8, 9, 11]]


def test_a_file_of_frames_is_seen_as_it_is_asked():
    clip = open_clip(frames_file(16, first=3), "frames")
    seen = ClipViews(4, 5).evaluate(clip, (32, 48), DATA)
    assert [number_of(seen[:, place].numpy()) for place in range(4)] == [3, 8, 13, 18]


def test_the_box_is_drawn_as_of_an_image():
    """random_box and random_flip draw what random_resized_crop and a flip do."""
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    image = torch.zeros(3, 30, 50, dtype=torch.uint8)
    random_flip(random_resized_crop(image, (8, 8), (0.1, 1), (0.75, 1.33), "bilinear", first), 0.5, first)
    random_box(30, 50, (0.1, 1), (0.75, 1.33), second)
    second.random()
    assert first.random() == second.random()
