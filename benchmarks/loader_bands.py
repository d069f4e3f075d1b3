"""Images per second of the loader for images of values, beside numpy, imagecodecs and tifffile alone, webdataset and
torchgeo doing the same work in the same run.

    OMP_NUM_THREADS=1 python -m benchmarks.loader_bands [--rounds 12] [--images 200] [--kinds png16 npy ...]

Kinds: png16 (RGB, uint16), npy (14 bands, float32), tiff and tiff_deflate (12 bands, uint16, the latter with horizontal
differences).  All of 256 px and cut at random to 128 px as float32; batches of 50.
Every reader uses the same box, resize and flip; they differ in what finds, reads, decodes, checks and stacks.  torchgeo
reads a folder, for which it is measured beside our reader of that folder; it is left out where it is not installed
(pip install torchgeo).  How turns are taken and compared: benchmarks/loader_throughput.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.loader_throughput import BATCH, ONE, TWO, Crop, Streams, bare_processes, compare, ours
from swinv2_train.config import Config
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.transforms.bands import Bands

SHARDS, PER_SHARD, SIDE, SIZE = 4, 50, 256, 128
Decode = Callable[[bytes], np.ndarray]


class BandCrop(Crop):
    """A crop of the values of a file's bands."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.data, SIZE)
        self.bands = Bands.of(config)


def values(bands: int, seed: int) -> np.ndarray:
    """float32 (SIDE, SIDE, bands) of about 2,000 +- 600, whose amplitude falls with the frequency as a photograph's."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None, :]
    falling = 1.0 / np.maximum(np.hypot(rows, columns), 1 / SIDE) ** 1.1
    shared = rng.standard_normal((SIDE, SIDE))
    planes = []
    for _ in range(bands):
        noise = 0.9 * shared + 0.3 * rng.standard_normal((SIDE, SIDE))
        plane = np.fft.ifft2(np.fft.fft2(noise) * falling).real
        planes.append(2000 + 600 * plane / plane.std())
    return np.clip(np.stack(planes, -1), 0, 8191).astype(np.float32)


def png16(seed: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.png_encode(values(3, seed).astype(np.uint16) << 3))


def npy(seed: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values(14, seed))
    return buffer.getvalue()


def tiff(seed: int, **options: Any) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    layout = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(buffer, values(12, seed).astype(np.uint16), **layout, **options)
    return buffer.getvalue()


def tiff_deflate(seed: int) -> bytes:
    return tiff(seed, compression="deflate", predictor=True)


def by_imagecodecs(data: bytes) -> np.ndarray:
    import imagecodecs

    return imagecodecs.png_decode(data)


def by_numpy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def by_tifffile(data: bytes) -> np.ndarray:
    import tifffile

    return tifffile.imread(io.BytesIO(data))


KINDS: dict[str, tuple[Callable[[int], bytes], str, int, Decode]] = {
    "png16": (png16, "png", 3, by_imagecodecs),
    "npy": (npy, "npy", 14, by_numpy),
    "tiff": (tiff, "tif", 12, by_tifffile),
    "tiff_deflate": (tiff_deflate, "tif", 12, by_tifffile),
}
"""What writes one, its ending, its bands, and the library that reads it."""


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32, copy=False)).permute(2, 0, 1)


def alone(paths: list[Path], crop: Crop, decode: Decode) -> Iterator[int]:
    """The library on files of the page cache, one after another without end."""
    rng = np.random.default_rng(0)
    for number in itertools.count():
        crop(tensor(decode(paths[number % len(paths)].read_bytes())), {}, rng)
        if number % BATCH == BATCH - 1:
            yield BATCH


def webdataset(manifest: Manifest, crop: Crop, decode: Decode, ending: str, workers: int) -> Iterator[int]:
    import webdataset as wds

    rng = np.random.default_rng(0)

    def row(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        return crop(tensor(decode(sample[ending])), {}, rng)

    stages = wds.WebDataset(list(manifest.paths), shardshuffle=SHARDS, seed=0).repeat().shuffle(50).map(row)
    prefetch = 2 if workers else None
    for batch in DataLoader(stages.batched(BATCH), batch_size=None, num_workers=workers, prefetch_factor=prefetch):
        yield len(batch["images"])


def torchgeo(folder: Path, crop: Crop, workers: int) -> Iterator[int]:
    from torchgeo.datasets import NonGeoClassificationDataset
    from torchgeo.datasets.utils import rasterio_loader

    rng = np.random.default_rng(0)

    def cut(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        return crop(sample["image"], {}, rng)

    data = NonGeoClassificationDataset(str(folder), cut, rasterio_loader, lambda path: str(path).endswith(".tif"))
    sampler = RandomSampler(data, replacement=True, num_samples=10**9)
    for batch in DataLoader(data, BATCH, sampler=sampler, num_workers=workers):
        yield len(batch["images"])


def streams_of(kind: str, folder: Path) -> Streams:
    """All readers of a kind, on files written below folder."""
    write, ending, bands, decode = KINDS[kind]
    numbers = str([1.0] * bands)
    config = compose_overrides([
        "run_dir=x", "data.shards=x", f"model.in_chans={bands}", f"data.mean={numbers}", f"data.std={numbers}",
        *(["data.bands=[0,1,2]"] if bands == 3 else []),
    ])  # fmt: skip
    files = [write(seed) for seed in range(SHARDS * PER_SHARD)]
    manifest = write_shards(
        ((f"i{number:04}", data, ending, None) for number, data in enumerate(files)), str(folder / "t"), PER_SHARD
    )
    paths = [folder / "images" / f"class{number % 4}" / f"i{number:04}.{ending}" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    crop = BandCrop(config)
    size = sum(map(len, files)) / len(files) / 1000
    print(f"\n{kind}: {len(files)} files of {bands} bands, {SIDE} px, {size:.0f} kB each, to {SIZE} px\n", flush=True)
    found: Streams = {
        ONE: (ONE, alone(paths, crop, decode)),
        "ours, in the training process": (ONE, ours(manifest, crop, 0)),
        "webdataset": (ONE, webdataset(manifest, crop, decode, ending, 0)),
        TWO: (TWO, bare_processes(partial(alone, paths, crop, decode), 2)),
        "ours, 2 workers": (TWO, ours(manifest, crop, 2)),
        "webdataset, 2 workers": (TWO, webdataset(manifest, crop, decode, ending, 2)),
    }
    if ending == "tif" and importlib.util.find_spec("torchgeo") is not None:
        found |= {
            "ours, a folder, 2 workers": (TWO, ours(open_source(str(folder / "images")), crop, 2)),
            "torchgeo, a folder, 2 workers": (TWO, torchgeo(folder / "images", crop, 2)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--images", type=int, default=200, help="per reader and round")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            compare(streams_of(kind, Path(folder)), options.rounds, options.images)


if __name__ == "__main__":
    main()
