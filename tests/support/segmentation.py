"""Images with label images, for the tests of segmentation: discs of a class each on a background of class 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from swinv2_train.data.shards.tar_writer import write_shards
from tests.support.images import encoded

CLASSES = 3


def pixel_pair(number: int, size: tuple[int, int] = (32, 32), classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (*size, 3) and labels uint8 of `size`: a disc whose colour tells its class, of 1 to classes - 1."""
    rng = np.random.default_rng(number)
    labels = np.zeros(size, np.uint8)
    rows, columns = np.indices(size)
    for kind in range(1, classes):
        row, column = rng.integers(0, size[0]), rng.integers(0, size[1])
        labels[(rows - row) ** 2 + (columns - column) ** 2 < (min(size) / 3) ** 2] = kind
    image = rng.integers(0, 60, (*size, 3)) + 180 * (labels[..., None] == np.arange(3)) * (labels[..., None] > 0)
    return image.astype(np.uint8), labels


def write_pairs(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (32, 32)) -> None:
    """ADE20K's layout: folder/images/training/kNNN.jpg and folder/annotations/training/kNNN.png."""
    for name in ("images", "annotations"):
        (folder / name / "training").mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        image, labels = pixel_pair(number, size)
        (folder / "images" / "training" / f"k{number:03d}.jpg").write_bytes(encoded(image, "jpg", quality=95))
        (folder / "annotations" / "training" / f"k{number:03d}.png").write_bytes(encoded(labels))


def pair_shards(
    folder: Path, train: int = 8, test: int = 3, sizes: tuple[tuple[int, int], ...] = ((32, 32),)
) -> tuple[str, str]:
    """Overrides that name shards of pairs; sizes: of the images in turn, (height, width)."""
    for name, count, first in (("train", train, 0), ("test", test, 100)):
        rows = []
        for number in range(first, first + count):
            image, labels = pixel_pair(number, sizes[number % len(sizes)])
            rows.append((f"k{number:03d}", encoded(image), "png", None, {"segmentation": encoded(labels)}))
        write_shards(rows, str(folder / name), 4)
    return (f"data.shards={folder}/train-*.tar", f"data.eval_shards={folder}/test-*.tar")
