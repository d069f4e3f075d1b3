"""The composed clips and their demo: the camera moves as the label says, and one frame says nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import compose_clips, demo_video
from scripts.compose_clips import (
    CLASSES,
    FRAMES,
    MIDDLE,
    REACH,
    SCALE,
    SIDE_PX,
    Motion,
    View,
    clip,
    frame_of,
    motion_of,
)
from scripts.package_files import FetchError
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.clips.views import ClipViews

RING = SIDE_PX / 4
"""Radius in pixels of the places at which motion is looked at."""
ALONG = np.array([(np.cos(angle), np.sin(angle)) for angle in np.arange(16) * np.pi / 8])


def blob(right: float, down: float) -> np.ndarray:
    """A film of one frame, black but for a bright spot, so many pixels from its middle: uint8 (1, 120, 160, 3)."""
    rows, columns = np.mgrid[:120, :160] + 0.5
    spot = 255 * np.exp(-((columns - 80 - right) ** 2 + (rows - 60 - down) ** 2) / 8)
    return np.repeat(spot.round().astype(np.uint8)[None, ..., None], 3, 3)


def place(frame: Image.Image) -> np.ndarray:
    """(right, down) of the light's centre from the frame's, in pixels."""
    light = np.asarray(frame, np.float64)[..., 0]
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX] + 0.5 - SIDE_PX / 2
    return np.array([(light * columns).sum(), (light * rows).sum()]) / light.sum()


def seen_motion(label: int, seed: int, scale: float) -> np.ndarray:
    """How far, (right, down), spots on a ring around the middle move from one frame to the next: (16, 2)."""
    motion = motion_of(label, np.random.default_rng(seed))
    moved = []
    for offset in RING * ALONG:
        view = View(blob(*(scale * offset)), 0, 0, (80.0, 60.0), scale)
        before, after = (place(frame_of(view, motion, time)) for time in (0, 1))
        assert np.abs(before - offset).max() < 0.1  # the middle frame: the label does not touch it
        moved.append(after - before)
    return np.array(moved)


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_what_is_seen_moves_as_the_label_says(scale):
    """Measured by spots of light, without the code's own arithmetic; the camera's motion is the opposite."""
    across = np.stack([-ALONG[:, 1], ALONG[:, 0]], 1)  # a quarter turn clockwise on, rows counted downwards
    for label, name in enumerate(CLASSES):
        moved = seen_motion(label, label, scale)
        mean, outward, clockwise = moved.mean(0), (moved * ALONG).sum(1).mean(), (moved * across).sum(1).mean()
        if name.startswith("pan"):
            course = np.rad2deg(np.arctan2(-mean[1], -mean[0]))  # the camera's
            names = ["right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right"]
            assert name == f"pan {names[round(course / 45) % 8]}"
            assert abs((course + 22.5) % 45 - 22.5) < 10 and 0.7 < np.hypot(*mean) < 1.6
            assert abs(outward) < 0.1 and abs(clockwise) < 0.1
        else:
            assert np.hypot(*mean) < 0.1
            wanted = {
                "zoom in": (1, 0),
                "zoom out": (-1, 0),
                "roll clockwise": (0, -1),
                "roll counter-clockwise": (0, 1),
            }
            assert (round(outward / 0.4), round(clockwise / 0.6)) == wanted[name], (name, outward, clockwise)


def test_no_motion_leaves_its_film():
    """A white film, and the fastest of each motion: no frame has a pixel from beyond its edges."""
    margin = SCALE[1] * REACH
    side = int(np.ceil(2 * margin))
    film = np.full((1, side, side, 3), 255, np.uint8)
    view = View(film, 0, 0, (side / 2, side / 2), SCALE[1])
    speed, enlarge, turn = compose_clips.SPEED[1], compose_clips.ZOOM[1], compose_clips.ROLL_DEG[1]
    fastest = [Motion(right=speed), Motion(down=-speed), Motion(roll_deg=turn)]
    fastest += [Motion(enlarge=enlarge), Motion(enlarge=1 / enlarge)]
    for motion in fastest:
        for time in (-MIDDLE, MIDDLE):
            assert np.asarray(frame_of(view, motion, time)).min() == 255
    assert np.asarray(frame_of(view, Motion(right=2 * speed), MIDDLE)).min() == 0  # it could be seen


@pytest.fixture(scope="module")
def films() -> list[tuple[list[np.ndarray], bool]]:
    noise = np.random.default_rng(0).integers(0, 256, (2, FRAMES + 3, 90, 120, 3), dtype=np.uint8)
    return [([noise[0]], True), ([noise[1]], False)]


def test_the_clips_of_a_view_differ_in_all_but_their_middle_frame(films):
    for group in range(3):
        clips = [clip(number, "train", films) for number in range(12 * group, 12 * group + 12)]
        assert [label for _, label in clips] == [*range(len(CLASSES))]
        frames = np.stack([np.stack([np.asarray(frame) for frame in each]) for each, _ in clips])
        assert frames.shape == (12, FRAMES, SIDE_PX, SIDE_PX, 3)
        assert (frames[:, MIDDLE] == frames[0, MIDDLE]).all()
        others = frames[:, [time for time in range(FRAMES) if time != MIDDLE]]
        assert all((others[a] != others[b]).any() for a in range(12) for b in range(a))


def test_a_clip_is_a_function_of_its_split_and_number(films):
    first, again, test = (np.stack(clip(17, split, films)[0]) for split in ("train", "train", "test"))
    assert (first == again).all() and (first != test).any()


def test_no_film_is_in_both_splits_and_somebody_elses_are_refused(tmp_path):
    names = [film.file for film in compose_clips.FILMS]
    assert len(set(names)) == len(names) and {film.split for film in compose_clips.FILMS} == {"train", "test"}
    for name in names:
        (tmp_path / name).write_bytes(b"another film")
    with pytest.raises(FetchError, match=r"bigbuckbunny.mp4: sha256 .*, wanted"):
        compose_clips.find_films(tmp_path / "raw", tmp_path, tmp_path)
    (tmp_path / "bikes.mp4").unlink()
    with pytest.raises(FetchError, match="has no bikes.mp4; put bigbuckbunny.mp4, bikes.mp4, carphone_pri"):
        compose_clips.find_films(tmp_path / "raw", tmp_path, tmp_path)


def test_both_ways_and_the_single_frame_differ_in_what_they_are_about_alone(tmp_path):
    """And no clip is mirrored, for the label of its mirror image is another."""
    phases = demo_video.phases_of(tmp_path, Path("data/clips"), 1, ["train.epochs=3", "task.mask_ratio=0.5"])
    configs = {each.run_dir.name: compose_overrides(each.command) for each in phases}
    assert configs.pop("pretrain").model.frames is None  # weights of images
    scratch, simmim, single = (configs[name] for name in ("from-scratch-0", "from-simmim-weights-0", "one-frame"))
    assert scratch.data.hflip == 0 and not scratch.data.dihedral and scratch.task.init_from is None
    assert (scratch.model.frames, scratch.data.frame_stride) == (compose_clips.FRAMES - 1, 1)
    assert simmim.task.init_from == str(tmp_path / "pretrain") and single.model.frames == 1
    assert ClipViews.of(single).starts(compose_clips.FRAMES) == [compose_clips.MIDDLE]  # which is alike for all labels
    still = replace(scratch, data=replace(scratch.data, frame_stride=int(demo_video.STILL.partition("=")[2])))
    assert ClipViews.of(still).positions(0, compose_clips.FRAMES).tolist() == [0] * scratch.model.frames
    single.model.frames, single.model.patch_frames = scratch.model.frames, scratch.model.patch_frames
    simmim.task.init_from = scratch.task.init_from
    simmim.run_dir = single.run_dir = scratch.run_dir
    assert simmim == scratch == single
