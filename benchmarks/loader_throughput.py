"""Images per second of the loader alone, beside a bare decode loop and webdataset's own streaming, in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader_throughput.py [--rounds 7] [--images 1000] [--size 192]

Every reader does the same work with the same functions (read a JPEG of 500 x 375 pixels from a tar, decode it, cut a
random box, resize it, flip it), except the one named "PIL", which decodes and resizes with Pillow, as webdataset's own
examples do.  The readers take turns; what counts is the median over the rounds of each one's ratio to the bare loop of
the same round.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from swinv2_train.command_line import compose_overrides
from swinv2_train.config import DataConfig
from swinv2_train.data.crop import random_box, random_flip, random_resized_crop
from swinv2_train.data.decode import decode_image
from swinv2_train.data.loader import TrainLoader
from swinv2_train.data.shards import Manifest, TarReader, open_manifest, write_shards

BATCH = 50
SHARDS, PER_SHARD = 8, 100


class Crop:
    """What pre-training does with an image, without the mask."""

    needs_label = False

    def __init__(self, config: DataConfig, size: int) -> None:
        self.config, self.size = config, size

    def __call__(self, image: torch.Tensor, label: int | None, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        config = self.config
        box = random_resized_crop(
            image, (self.size, self.size), config.crop_scale, config.crop_ratio, config.interpolation, rng
        )
        return {"images": random_flip(box, config.hflip, rng)}


def photograph(seed: int) -> bytes:
    """A JPEG of 500 x 375 pixels with the spectrum of a photograph: the amplitude falls with the frequency."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None, :]
    falling = 1.0 / np.maximum(np.hypot(rows, columns), 1 / 500) ** 1.1
    channels = []
    shared = rng.standard_normal((375, 500))
    for _ in range(3):
        noise = 0.9 * shared + 0.3 * rng.standard_normal((375, 500))
        values = np.fft.ifft2(np.fft.fft2(noise) * falling).real
        channels.append(128 + 55 * values / values.std())
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def bare(manifest: Manifest, crop: Crop) -> Iterator[int]:
    """Read, decode, crop: nothing else, in the order of the tars, without end.  Yields BATCH after so many images."""
    reader, rng = TarReader(manifest), np.random.default_rng(0)
    for number in itertools.count():
        shard, index = divmod(number % manifest.num_samples, PER_SHARD)
        crop(decode_image(reader.read(shard, index).image, "jpg"), None, rng)
        if number % BATCH == BATCH - 1:
            yield BATCH


def bare_processes(manifest: Manifest, crop: Crop, processes: int) -> Iterator[int]:
    """The same in several processes at once."""
    done = get_context("fork").SimpleQueue()

    def work() -> None:
        for count in bare(manifest, crop):
            done.put(count)

    workers = [get_context("fork").Process(target=work, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        while True:
            yield done.get()
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def ours(manifest: Manifest, crop: Crop, workers: int) -> Iterator[int]:
    config = replace(crop.config, num_workers=workers)
    loader = TrainLoader(manifest, config, crop, 0, BATCH, BATCH, 0, 1, 0)
    try:
        for batch in loader:
            yield len(batch["images"])
    finally:
        loader.close()


def webdataset(manifest: Manifest, crop: Crop, workers: int, pil: bool) -> Iterator[int]:
    import webdataset as wds

    rng = np.random.default_rng(0)

    def with_our_functions(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        return crop(decode_image(sample["jpg"], "jpg"), None, rng)

    def with_pil(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        image, config = sample["jpg"], crop.config
        top, left, height, width = random_box(image.height, image.width, config.crop_scale, config.crop_ratio, rng)
        box = (left, top, left + width, top + height)
        resized = image.resize((crop.size, crop.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return {"images": random_flip(pixels, config.hflip, rng)}

    stages = wds.WebDataset(list(manifest.paths), shardshuffle=SHARDS, seed=0).repeat().shuffle(100)
    stages = stages.decode("pil").map(with_pil) if pil else stages.map(with_our_functions)
    prefetch = 2 if workers else None
    for batch in DataLoader(stages.batched(BATCH), batch_size=None, num_workers=workers, prefetch_factor=prefetch):
        yield len(batch["images"])


def images_per_sec(batches: Iterator[int], images: int) -> float:
    """Measured between the arrivals of two batches, after a start that fills every queue once."""
    for _ in range(6):
        next(batches)
    started, count = time.perf_counter(), 0
    while count < images:
        count += next(batches)
    seconds = time.perf_counter() - started
    batches.close()  # type: ignore[attr-defined]
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=1000, help="per reader and round")
    parser.add_argument("--size", type=int, default=192, help="side of the crop in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    config = compose_overrides(["run_dir=x", "data.shards=x"]).data
    with tempfile.TemporaryDirectory() as folder:
        pictures = ((f"p{i:04d}", photograph(i), "jpg", None) for i in range(SHARDS * PER_SHARD))
        write_shards(pictures, f"{folder}/train", PER_SHARD)
        measure(open_manifest(f"{folder}/train-*.tar"), Crop(config, options.size), options.rounds, options.images)


def measure(manifest: Manifest, crop: Crop, rounds: int, images: int) -> None:
    one, two = "bare decode loop", "bare decode loop, 2 processes"
    readers: dict[str, tuple[str, Callable[[], Iterator[int]]]] = {
        one: (one, lambda: bare(manifest, crop)),
        "ours, in the training process": (one, lambda: ours(manifest, crop, 0)),
        "webdataset, our functions": (one, lambda: webdataset(manifest, crop, 0, pil=False)),
        "webdataset, PIL": (one, lambda: webdataset(manifest, crop, 0, pil=True)),
        two: (two, lambda: bare_processes(manifest, crop, 2)),
        "ours, 2 workers": (two, lambda: ours(manifest, crop, 2)),
        "webdataset, our functions, 2 workers": (two, lambda: webdataset(manifest, crop, 2, pil=False)),
        "webdataset, PIL, 2 workers": (two, lambda: webdataset(manifest, crop, 2, pil=True)),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, (_, start) in readers.items():
            rates[name].append(images_per_sec(start(), images))
    size = sum(manifest.sizes) / manifest.num_samples / 1000
    print(f"{manifest.num_samples} JPEGs of 500 x 375 px, {size:.0f} kB each, to {crop.size} px; batches of {BATCH}\n")
    print("| reader | images/s (median) | min - max | ratio to bare |\n|---|---|---|---|")
    for name, (base, _) in readers.items():
        ratio = statistics.median(rate / of for rate, of in zip(rates[name], rates[base], strict=True))
        low, high = min(rates[name]), max(rates[name])
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {low:.0f} - {high:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
