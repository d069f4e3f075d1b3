"""Aerial photographs with hand-drawn boxes of trees, as shards of tiles: one photograph to train on, another to test.

    python scripts/fetch_trees.py --out data/trees [--photographs FOLDER]

The photographs (NEON, Yellowstone) and their Pascal VOC files are data of the package deepforest (MIT), whose wheel
comes through pip; its checksum is compared, and nothing of it is installed or run.  Or name a folder with the four
files.  Each photograph's colours are levelled, for each has a light of its own.  Training tiles overlap by half, test
tiles do not.  A tree that a tile's edge cuts keeps the box of its part in the tile; of which less than half is there,
it counts neither way (a crowd).  Run again, it returns at once when the shards are complete.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from scripts.package_files import FetchError, compare, fetch_wheel, sha256_of
from swinv2_train.data.annotations.form import Drawn, DrawnImage
from swinv2_train.data.annotations.reading import match, read_annotations
from swinv2_train.data.annotations.rules import BadBoxes
from swinv2_train.data.object_checks import ObjectChecks
from swinv2_train.data.packing import Entry, pack
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_reader import open_manifest

WHEEL = "deepforest==2.1.0"
WHEEL_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
PHOTOGRAPHS_SHA256 = "b37289470a55f6afa5c03b84792d92ea246d674f741c61607a9384d99b3ea939"
"""Of all four files' checksums, in the order of their names."""
IN_WHEEL = "deepforest/data/"
PHOTOGRAPHS = {"train": "2019_YELL_2_528000_4978000_image_crop2", "test": "2019_YELL_2_541000_4977000_image_crop"}
"""PNG and xml of each split."""
CLASS = "Tree"
TILE_PX = 400
"""Side of a training tile, and the most of a test tile, which share the photograph evenly."""
WHOLE = 0.5
"""Of a tree's box, in a tile, for it to be an object there."""
SAMPLES_PER_SHARD = 64
MEAN, SPREAD = 128, 50
"""Of each colour of a photograph; as they come, haze makes the second one bluer than the first."""


def find_photographs(raw: Path, given: Path | None) -> Path:
    """The folder with the photographs and their boxes.  Raises FetchError."""
    names = [f"{stem}{ending}" for stem in PHOTOGRAPHS.values() for ending in (".png", ".xml")]
    folder = given or raw / "photographs"
    if given is None and not all((folder / name).is_file() for name in names):
        path = fetch_wheel(raw, WHEEL, 21, "--photographs FOLDER")
        compare(path, sha256_of(path), WHEEL_SHA256)
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(path) as wheel:
            for name in names:
                (folder / name).write_bytes(wheel.read(IN_WHEEL + name))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FetchError(f"{folder} has no {missing[0]}; put the files of deepforest's deepforest/data there")
    sums = "".join(sha256_of(folder / name) for name in sorted(names))
    compare(folder, hashlib.sha256(sums.encode()).hexdigest(), PHOTOGRAPHS_SHA256)
    return folder


def windows(side: int, tile: int, overlapping: bool) -> list[tuple[int, int]]:
    """First and last pixel + 1 of the tiles along a side: of `tile` pixels and half of it further each, the last one
    at the edge; or, without overlap, equal parts of at most that.
    """
    if overlapping:
        count = max(1, -(-(side - tile) // (tile // 2)) + 1)
        starts = [min(number * (tile // 2), max(side - tile, 0)) for number in range(count)]
        return [(start, min(start + tile, side)) for start in starts]
    count = -(-side // tile)
    edges = [side * number // count for number in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


def tiles(size: tuple[int, int], tile: int, overlapping: bool) -> Iterator[tuple[int, int, int, int]]:
    """x0, y0, x1, y1 of every tile of an image of (height, width), row by row."""
    for y0, y1 in windows(size[0], tile, overlapping):
        for x0, x1 in windows(size[1], tile, overlapping):
            yield x0, y0, x1, y1


def objects_in(tile: tuple[int, int, int, int], boxes: np.ndarray) -> DrawnImage:
    """What of the boxes (N, 4) lies in a tile, in the tile's own pixels; parts of less than half are crowds."""
    low, high = np.array(tile[:2] * 2, np.float64), np.array(tile[2:] * 2, np.float64)
    parts = np.clip(boxes, low, high)
    share = (parts[:, 2:] - parts[:, :2]).prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    found = [
        Drawn(CLASS, (part - low).tolist(), crowd=bool(left < WHOLE))
        for part, left in zip(parts, share, strict=True)
        if left > 0
    ]
    return DrawnImage(found, (tile[3] - tile[1], tile[2] - tile[0]))


def levelled(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) with each colour's mean and spread over the photograph moved to MEAN and SPREAD."""
    mean, spread = pixels.mean(axis=(0, 1), dtype=np.float64), pixels.std(axis=(0, 1), dtype=np.float64)
    moved = (pixels - mean) * (SPREAD / np.maximum(spread, 1)) + MEAN
    found: np.ndarray = moved.round().clip(0, 255).astype(np.uint8)
    return found


def _entries(folder: Path, split: str) -> list[Entry]:
    name = f"{PHOTOGRAPHS[split]}.png"
    pixels = levelled(np.asarray(Image.open(folder / name).convert("RGB")))
    drawn = match(read_annotations(folder, "--photographs"), [f"{stem}.png" for stem in PHOTOGRAPHS.values()], name)
    image = drawn.images[name]
    assert image is not None, name
    boxes = np.array([each.box for each in image.objects], np.float64).reshape(-1, 4)
    found = []
    for number, tile in enumerate(tiles(pixels.shape[:2], TILE_PX, split == "train"), 1):
        buffer = io.BytesIO()
        Image.fromarray(pixels[tile[1] : tile[3], tile[0] : tile[2]]).save(buffer, "PNG")
        content = partial(bytes, buffer.getvalue())
        drawn_in = objects_in(tile, boxes)
        found.append(Entry(f"{split}_{number:03d}", "png", None, content, drawn=drawn_in, image_id=number))
    return found


def complete(out: Path) -> bool:
    """True when both splits lie there, whole."""
    try:
        return all(not any(open_manifest(str(out / f"{split}-*.tar")).unannotated) for split in PHOTOGRAPHS)
    except ShardError:
        return False


def main(out: Path, photographs: Path | None = None) -> None:
    """Fetch, cut and pack into `out`; does nothing when that is done.  Raises FetchError or ShardError."""
    if complete(out):
        print(f"{out} is complete: tiles of aerial photographs with boxes of trees", flush=True)
        return
    folder = find_photographs(out / "raw", photographs)
    for split, stem in PHOTOGRAPHS.items():
        checks = ObjectChecks(stem, (CLASS,), BadBoxes(stem))
        pack(_entries(folder, split), str(out / split), SAMPLES_PER_SHARD, 0, (CLASS,), overwrite=True, checks=checks)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (2: no source, or a wrong one, with one message)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/trees"), help="folder of the shards (%(default)s)")
    parser.add_argument("--photographs", type=Path, default=None, help="folder of the four files; default: through pip")
    options = parser.parse_args(arguments)
    try:
        main(options.out, options.photographs)
    except (FetchError, ShardError, subprocess.SubprocessError) as error:
        print(f"fetch_trees: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
