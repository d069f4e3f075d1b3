"""Images per second of the loader alone, beside a bare decode loop and other libraries' loaders, in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader_throughput.py [--rounds 30] [--images 600] [--size 192] [--sources]

--sources: instead of other libraries' readers, ours on the same images as a folder and as a saved data set of
`datasets`.  The others are webdataset, torchvision's ImageFolder and, where it can be imported, litdata (of an
environment of its own: pip install --target DIR litdata, and PYTHONPATH=DIR here).

Every reader does the same work with the same functions (read a JPEG of 500 x 375 pixels, decode it, cut a random box,
resize it, flip it), except those named "PIL", which decode and resize with Pillow, as webdataset's and torchvision's
own examples do.  All of them shuffle: ours, ImageFolder and litdata over all images, webdataset tars and a buffer of
100 images.  The readers stay alive and take turns of a second; what counts is the median over the rounds of each one's
ratio to the bare loop with as many processes in the same round.  The ratio is given twice: by the clock, and by the CPU
time per image of all processes of a reader (Linux), which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import io
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import DatasetFolder, ImageFolder
from torchvision.transforms.v2 import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from swinv2_train.config import DataConfig
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.loading.loader import TrainLoader
from swinv2_train.data.sample import Targets
from swinv2_train.data.shards.tar_reader import Manifest, TarReader
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.transforms.crop import random_box, random_flip, random_resized_crop
from swinv2_train.data.transforms.decode import decode_image

BATCH = 50
SHARDS, PER_SHARD = 8, 100
ONE, TWO = "bare decode loop", "bare decode loop, 2 processes"
Streams = dict[str, tuple[str, Iterator[int]]]
"""By name: the bare loop to compare with, and the batches."""


class Crop:
    """What pre-training does with an image, without the mask."""

    needs = ()

    def __init__(self, config: DataConfig, size: int) -> None:
        self.config, self.size = config, size

    def __call__(self, image: torch.Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, torch.Tensor]:
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
    """Read, decode, crop: nothing else, in the order of the tars, without end.

    Yields BATCH after every BATCH images.
    """
    reader, rng = TarReader(manifest), np.random.default_rng(0)
    for number in itertools.count():
        shard, index = divmod(number % manifest.num_samples, PER_SHARD)
        crop(decode_image(reader.read(shard, index).image, "jpg"), None, rng)
        if number % BATCH == BATCH - 1:
            yield BATCH


def bare_processes(bare: Callable[[], Iterator[int]], processes: int) -> Iterator[int]:
    """The stream of bare() from several processes at once, each at most two batches ahead of the caller."""
    context = get_context("fork")
    done, ahead = context.SimpleQueue(), context.Semaphore(2 * processes)

    def work() -> None:
        for count in bare():
            done.put(count)
            ahead.acquire()

    workers = [context.Process(target=work, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        while True:
            count = done.get()
            ahead.release()
            yield count
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def ours(source: Source, crop: Crop, workers: int) -> Iterator[int]:
    config = replace(crop.config, num_workers=workers)
    loader = TrainLoader(source, config, crop, 0, BATCH, BATCH, 0, 1, 0)
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


class Reader:
    """A stream of batches with the processes that it starts."""

    def __init__(self, batches: Iterator[int]) -> None:
        before = children()
        self.batches = batches
        next(batches)
        self.processes = children() - before

    def turn(self, images: int) -> tuple[float, float]:
        """(seconds, CPU seconds of all its processes) per image, between the arrivals of two batches."""
        for _ in range(6):  # what was made before the turn
            next(self.batches)
        started, cpu, count = time.perf_counter(), self.cpu_sec(), 0
        while count < images:
            count += next(self.batches)
        seconds, cpu = time.perf_counter() - started, self.cpu_sec() - cpu
        while self.processes:  # until its queues are full again
            before = self.cpu_sec()
            time.sleep(0.05)
            if self.cpu_sec() - before < 0.005:
                break
        return seconds / count, cpu / count

    def cpu_sec(self) -> float:
        threads = (path for pid in self.processes for path in glob.glob(f"/proc/{pid}/task/*/schedstat"))
        return time.process_time() + sum(int(open(path).read().split()[0]) for path in threads) / 1e9


def children() -> set[int]:
    """The process ids of this process's children."""
    return {int(pid) for path in glob.glob("/proc/self/task/*/children") for pid in open(path).read().split()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=600, help="per reader and round")
    parser.add_argument("--size", type=int, default=192, help="side of the crop in pixels")
    parser.add_argument("--sources", action="store_true", help="shards, folder and saved data set")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    config = compose_overrides(["run_dir=x", "data.shards=x"]).data
    with tempfile.TemporaryDirectory() as folder:
        pictures = [photograph(i) for i in range(SHARDS * PER_SHARD)]
        named = [(f"p{i:04d}", data, "jpg", None) for i, data in enumerate(pictures)]
        manifest, crop = write_shards(named, f"{folder}/train", PER_SHARD), Crop(config, options.size)
        others = unpacked(pictures, folder, crop) if options.sources else peers(manifest, pictures, folder, crop)
        measure(manifest, crop, options.rounds, options.images, others)


def image_folder(folder: Path, crop: Crop, workers: int, pil: bool) -> Iterator[int]:
    """torchvision's, shuffled by DataLoader; pil: with torchvision's own loader and transforms."""
    rng, config = np.random.default_rng(0), crop.config
    own = Compose(
        [RandomResizedCrop(crop.size, config.crop_scale, config.crop_ratio), RandomHorizontalFlip(), PILToTensor()]
    )
    if pil:
        images: DatasetFolder = ImageFolder(folder, own)
    else:
        images = DatasetFolder(
            str(folder), lambda path: decode_image(Path(path).read_bytes(), "jpg"), (".jpg",),
            lambda image: crop(image, None, rng)["images"],
        )  # fmt: skip
    return epochs(DataLoader(images, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0))


def litdata(folder: Path, crop: Crop, workers: int) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    rng = np.random.default_rng(0)
    images = StreamingDataset(
        str(folder), shuffle=True, transform=lambda data: crop(decode_image(data, "jpg"), None, rng)["images"]
    )
    return epochs(StreamingDataLoader(images, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0))


def epochs(loader: DataLoader) -> Iterator[int]:
    """The sizes of a loader's batches, epoch after epoch, of images or of (images, labels)."""
    while True:
        for batch in loader:
            yield len(batch if isinstance(batch, torch.Tensor) else batch[0])


def peers(manifest: Manifest, pictures: list[bytes], folder: str, crop: Crop) -> Streams:
    """Other libraries' readers, each in one process and with two workers."""
    images = class_folders(pictures, folder)
    made: dict[str, Callable[[int], Iterator[int]]] = {
        "webdataset, our functions": lambda workers: webdataset(manifest, crop, workers, pil=False),
        "webdataset, PIL": lambda workers: webdataset(manifest, crop, workers, pil=True),
        "ImageFolder, our functions": lambda workers: image_folder(images, crop, workers, pil=False),
        "ImageFolder, PIL": lambda workers: image_folder(images, crop, workers, pil=True),
    }
    if importlib.util.find_spec("litdata") is not None:
        chunks = litdata_chunks(pictures, folder)
        made["litdata, our functions"] = lambda workers: litdata(chunks, crop, workers)
    else:
        print("litdata cannot be imported and is left out\n")
    alone = {name: (ONE, stream(0)) for name, stream in made.items()}
    return {**alone, **{f"{name}, 2 workers": (TWO, stream(2)) for name, stream in made.items()}}


def class_folders(pictures: list[bytes], folder: str) -> Path:
    """The images as files in ten folders."""
    for number, data in enumerate(pictures):
        path = Path(folder, "images", f"class{number % 10}", f"p{number:04d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Path(folder, "images")


def litdata_chunks(pictures: list[bytes], folder: str) -> Path:
    """The images as litdata keeps them, as many in a chunk as in a tar."""
    from litdata import optimize

    optimize(
        pictures.__getitem__,
        list(range(len(pictures))),
        f"{folder}/litdata",
        chunk_size=PER_SHARD,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )
    return Path(folder, "litdata")


def unpacked(pictures: list[bytes], folder: str, crop: Crop) -> Streams:
    """The same images as files in class folders, and as a saved data set."""
    from datasets import Dataset, Features, Image, disable_progress_bars

    disable_progress_bars()
    cells = {"image": [{"bytes": data, "path": None} for data in pictures]}
    Dataset.from_dict(cells, features=Features({"image": Image()})).save_to_disk(f"{folder}/saved", num_shards=SHARDS)
    images, saved = open_source(str(class_folders(pictures, folder))), open_source(f"{folder}/saved")
    return {
        "ours, a folder": (ONE, ours(images, crop, 0)),
        "ours, a saved data set": (ONE, ours(saved, crop, 0)),
        "ours, a folder, 2 workers": (TWO, ours(images, crop, 2)),
        "ours, a saved data set, 2 workers": (TWO, ours(saved, crop, 2)),
    }


def measure(manifest: Manifest, crop: Crop, rounds: int, images: int, others: Streams) -> None:
    streams: Streams = {
        ONE: (ONE, bare(manifest, crop)),
        "ours, in the training process": (ONE, ours(manifest, crop, 0)),
        TWO: (TWO, bare_processes(partial(bare, manifest, crop), 2)),
        "ours, 2 workers": (TWO, ours(manifest, crop, 2)),
        **others,
    }
    size = sum(manifest.sizes) / manifest.num_samples / 1000
    print(f"{manifest.num_samples} JPEGs of 500 x 375 px, {size:.0f} kB each, to {crop.size} px; batches of {BATCH}\n")
    compare(dict(sorted(streams.items(), key=lambda item: item[1][0] == TWO)), rounds, images)


def compare(streams: Streams, rounds: int, images: int, unit: str = "image") -> None:
    """Let the streams take turns of so many images; print each one's rates and ratios, and end them.

    unit: what a stream's numbers count.
    """
    readers = {name: Reader(batches) for name, (_, batches) in streams.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            turns[name].append(reader.turn(images))
    print(f"| reader | {unit}s/s (median) | quartiles | ratio to bare | CPU ms/{unit} (median) | ratio to bare |")
    print("|---|---|---|---|---|---|")
    for name, (base, _) in streams.items():
        rates = [1 / seconds for seconds, _ in turns[name]]
        low, middle, high = statistics.quantiles(rates, n=4)
        digits = 0 if middle >= 100 else 1
        pairs = list(zip(turns[name], turns[base], strict=True))
        by_clock, by_cpu = (statistics.median(of[i] / own[i] for own, of in pairs) for i in (0, 1))
        cpu = 1000 * statistics.median(cpu for _, cpu in turns[name])
        spread = f"{low:.{digits}f} - {high:.{digits}f}"
        print(f"| {name} | {middle:.{digits}f} | {spread} | {by_clock:.3f} | {cpu:.3f} | {by_cpu:.3f} |")
    for _, batches in streams.values():
        batches.close()


if __name__ == "__main__":
    main()
