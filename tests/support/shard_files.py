"""Small samples and tars for the tests of shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from swinv2_train.data.shards.tar_writer import write_shards
from tests.support.images import encoded, image_bytes

ODD_NAME = "a =(~&ü'\\ %$x\n\"z'"
"""A folder's name with what shells, Hydra's grammar and formats of names take apart."""


def samples(count: int, labels: bool = True) -> list[tuple[str, bytes, str, int | None]]:
    """What write_shards takes: keys s0000, s0001, ..., labels 0 to 4."""
    return [(f"s{i:04d}", image_bytes(i), "png", i % 5 if labels else None) for i in range(count)]


def write_plain_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """A tar as somebody else would write it."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def noise_shards(folder: Path) -> tuple[str, str]:
    """Overrides that name 16 training images of 16 px and 6 of evaluation, of 4 classes."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 16), ("test", 6)):
        images = (encoded(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count))
        rows = [(f"k{i:03d}", image, "png", i % 4) for i, image in enumerate(images)]
        write_shards(rows, str(folder / name), 8)
    return (f"data.shards={folder}/train-*.tar", f"data.eval_shards={folder}/test-*.tar")


def ten_class_shards(folder: Path) -> tuple[str, str]:
    """Overrides that name 3 training shards of 20 labelled images of 32 px and one evaluation shard of 10."""
    rng = np.random.default_rng(0)

    def rows(count: int) -> Iterator[tuple[str, bytes, str, int]]:
        for i in range(count):
            label = i % 10
            pixels = rng.integers(0, 100, (32, 32, 3)) + 15 * label
            yield f"image_{i:04d}", encoded(pixels.astype(np.uint8)), "png", label

    write_shards(rows(60), str(folder / "train"), 20)
    write_shards(rows(10), str(folder / "test"), 10)
    return (f"data.shards={folder}/train-*.tar", f"data.eval_shards={folder}/test-*.tar")
