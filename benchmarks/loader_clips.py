"""Clips per second of the loader, beside PyAV alone doing the same work in the same run.

    OMP_NUM_THREADS=1 python -m benchmarks.loader_clips [--rounds 12] [--clips 120] [--frames 16] [--stride 2]

Videos are made here: H.264, 320 x 256 px, 100 to 300 frames, a key frame every 12 and every 250.  The bare loop opens
the files by PyAV, seeks to the key frame before a clip's first frame, decodes up to its last, and makes the same crops.
It is told which frames and which box: those that the loader draws, in its order; the first batch of every reader is
compared with the bare one bit for bit.  How turns are taken and compared: benchmarks/loader_throughput.py.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_throughput import ONE, TWO, Streams, bare_processes, compare
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.loading.loader import TrainLoader, Transform
from swinv2_train.data.sample import Targets
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.transforms.crop import random_box, resize
from swinv2_train.tasks.inputs import ImageTransform

BATCH, VIDEOS, PER_SHARD, HEIGHT, WIDTH = 5, 60, 15, 256, 320
EPOCHS = 4
"""So many passes of the loader are written down; the bare loop begins again behind them."""
GOPS = (12, 250)


@dataclass(frozen=True)
class Job:
    """A clip as the loader draws it."""

    key: str
    start: int
    box: tuple[int, int, int, int]
    flip: bool


@dataclass(frozen=True)
class Draws:
    """A transform that draws what ImageTransform draws of a clip, and reads no frame."""

    of: ImageTransform
    needs: tuple[str, ...] = ()

    @property
    def clips(self) -> ClipViews:
        assert self.of.clips is not None
        return self.of.clips

    def __call__(self, image: Clip, targets: Targets, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        data = self.of.data
        start = int(rng.integers(max(image.num_frames - self.clips.span, 0) + 1))
        box = random_box(HEIGHT, WIDTH, data.crop_scale, data.crop_ratio, rng)
        return {"drawn": torch.tensor([start, *box, int(rng.random() < data.hflip)])}


def video(frames: int, gop: int, seed: int) -> bytes:
    """An mp4: a window that wanders over a larger picture with a photograph's spectrum, and grain."""
    import av

    rng = np.random.default_rng(seed)
    side = 512
    falling = np.maximum(np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :]), 1 / side) ** 1.1
    noise = rng.standard_normal((3, side, side)) + 2 * rng.standard_normal((side, side))
    picture = np.fft.ifft2(np.fft.fft2(noise) / falling).real
    picture = 128 + 50 * picture / picture.std()
    path = np.cumsum(np.cumsum(rng.normal(0, 0.15, (frames, 2)), 0), 0)
    top, left = (np.abs((path + 2 * side) % (2 * room) - room).astype(int).T[axis]
                 for axis, room in enumerate((side - HEIGHT, side - WIDTH)))  # fmt: skip
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        options = {"g": str(gop), "preset": "veryfast", "x264-params": f"scenecut=0:keyint={gop}:min-keyint={gop}"}
        stream: Any = output.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for y, x in zip(top, left, strict=True):
            pixels = picture[:, y : y + HEIGHT, x : x + WIDTH] + rng.normal(0, 3, (HEIGHT, WIDTH))
            image = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p", threads=1)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def bare_clip(path: Path, job: Job, transform: ImageTransform) -> torch.Tensor:
    """The clip by PyAV alone: uint8 (3, frames, *size)."""
    import av
    from av.video.reformatter import VideoReformatter

    assert transform.clips is not None
    views, in_rgb = transform.clips, VideoReformatter()
    clip = torch.empty(3, views.frames, *transform.img_size, dtype=torch.uint8)
    top, left, rows, columns = job.box
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # as many processes as there are cores
        rate, unit = stream.average_rate, stream.time_base
        assert rate is not None and unit is not None
        step = int(1 / (rate * unit))  # made at a constant rate, with the first frame at 0
        wanted = {(job.start + place * views.stride) * step: place for place in range(views.frames)}
        container.seek(job.start * step, stream=stream)
        for frame in container.decode(stream):
            place = wanted.get(frame.pts if frame.pts is not None else -1)
            if place is None:
                continue
            pixels = torch.from_numpy(in_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()).permute(2, 0, 1)
            box = pixels[:, top : top + rows, left : left + columns]
            resized = resize(box, transform.img_size, transform.data.interpolation)
            clip[:, place] = resized.flip(-1) if job.flip else resized
            if place == views.frames - 1:
                return clip
    raise AssertionError(f"{path}: {job} ends too early")


def bare(paths: dict[str, Path], jobs: Sequence[Job], transform: ImageTransform, taken: Any) -> Iterator[int]:
    """taken: how many batches were begun, shared by all processes that make them."""
    while True:
        with taken.get_lock():
            first, taken.value = BATCH * taken.value, taken.value + 1
        for number in range(first, first + BATCH):
            job = jobs[number % len(jobs)]
            bare_clip(paths[job.key], job, transform)
        yield BATCH


def opened(source: Source, transform: Transform, workers: int) -> TrainLoader:
    data = replace(compose_overrides(["run_dir=x", "data.shards=x"]).data, num_workers=workers)
    return TrainLoader(source, data, transform, 0, BATCH, BATCH, 0, 1, 0)


def ours(source: Source, transform: ImageTransform, workers: int, first: torch.Tensor) -> Iterator[int]:
    """first: what its first batch must be."""
    loader = opened(source, transform, workers)
    try:
        for number, batch in enumerate(loader):
            if number == 0 and not batch["images"].equal(first):
                raise AssertionError("the loader's clips are not those of PyAV alone")
            yield len(batch["images"])
    finally:
        loader.close()


def drawn(source: Source, transform: ImageTransform) -> list[Job]:
    """What the loader draws in its first EPOCHS passes, in its order."""
    loader = opened(source, Draws(transform), 0)
    jobs = [
        Job(key.rpartition("/")[2], start, (top, left, rows, columns), bool(flip))
        for batch in islice(loader, EPOCHS * VIDEOS // BATCH)
        for key, (start, top, left, rows, columns, flip) in zip(batch["keys"], batch["drawn"].tolist(), strict=True)
    ]
    loader.close()
    return jobs


def streams_of(gop: int, folder: Path, transform: ImageTransform) -> Streams:
    rng = np.random.default_rng(gop)
    videos = {f"v{seed:03}": video(int(rng.integers(100, 301)), gop, seed) for seed in range(VIDEOS)}
    shards = write_shards(((key, data, "mp4", None) for key, data in videos.items()), str(folder / "t"), PER_SHARD)
    paths = {key: folder / "videos" / f"class{number % 4}" / f"{key}.mp4" for number, key in enumerate(videos)}
    for key, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(videos[key])
    unpacked = open_source(str(folder / "videos"))
    context = get_context("fork")
    found: Streams = {}
    for base, workers, words in ((ONE, 0, "in the training process"), (TWO, 2, "2 workers")):
        for name, source in (("shards", shards), ("a folder", unpacked)):
            jobs = drawn(source, transform)
            first = torch.stack([bare_clip(paths[job.key], job, transform) for job in jobs[:BATCH]])
            if source is shards:
                batches = partial(bare, paths, jobs, transform, context.Value("q", 0))
                found[base] = (base, bare_processes(batches, workers) if workers else batches())
            found[f"ours, {name}, {words}"] = (base, ours(source, transform, workers, first))
    megabytes = sum(map(len, videos.values())) / 1e6
    print(f"\n{VIDEOS} videos, {megabytes:.0f} MB in all, a key frame every {gop} frames\n", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clips", type=int, default=120, help="per reader and round")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--gops", type=int, nargs="+", default=list(GOPS), help="frames from one key frame to the next")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    data = compose_overrides(["run_dir=x", "data.shards=x"]).data
    views = ClipViews(options.frames, options.stride)
    transform = ImageTransform(data, (options.size, options.size), train=True, clips=views)
    for gop in options.gops:
        with tempfile.TemporaryDirectory() as folder:
            compare(streams_of(gop, Path(folder), transform), options.rounds, options.clips, "clip")


if __name__ == "__main__":
    main()
