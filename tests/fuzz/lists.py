"""Lists that lie beside images: names of classes and of bands, and right classes by image."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from swinv2_train.data.class_names import CLASSES_NAME, read_class_names
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.band_names import BANDS_NAME, with_band_names
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.label_files import read_label_overrides
from swinv2_train.data.transforms.bands import Bands
from tests.fuzz.mutation import TEXT_TOKENS
from tests.fuzz.target import Target
from tests.support.images import image_bytes

_CLASSES = ("ape", "bee", "cat")
_KEYS = tuple(f"val/ILSVRC2012_val_{number:08d}" for number in (1, 2, 3))


def list_targets() -> list[Target]:
    """All of them; makes their seeds."""
    with tempfile.TemporaryDirectory() as folder:
        samples = [(key, image_bytes(i, size=(8, 8)), "png", i) for i, key in enumerate(_KEYS)]
        write_shards(samples, f"{folder}/t", 3)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def source(place: Path):
        for name, content in files.items():
            (place / name).write_bytes(content)
        return open_source(str(place / "t-*.tar"))

    def classes(data: bytes, place: Path) -> None:
        (place / CLASSES_NAME).write_bytes(data)
        assert source(place).classes == read_class_names(place / CLASSES_NAME)

    def bands(data: bytes, place: Path) -> None:
        (place / BANDS_NAME).write_bytes(data)
        found = with_band_names(Bands(2, ("B03", "B02"), "hwc", (), 0.0), source(place))
        assert found is not None and not found.named

    def labels(data: bytes, place: Path) -> None:
        opened = source(place)
        (place / "labels.json").write_bytes(data)
        found = read_label_overrides(str(place / "labels.json"), opened, 3, "data.eval_labels", _CLASSES)
        assert set(found.labels) == set(_KEYS) and all(0 <= one < 3 for each in found.labels.values() for one in each)

    by_key = {_KEYS[0]: [0], _KEYS[1]: ["bee", 2], _KEYS[2]: []}
    return [
        Target("lists: classes.txt", [b"ape\nbee\ncat\n", "\ufeffape\r\nb\u00e9e\r\ncat\r\n".encode()], classes,
               TEXT_TOKENS),
        Target("lists: bands.json", [b'["B02", "B03", "B04"]'], bands, TEXT_TOKENS),
        Target("lists: labels by image", [b"[[0], [1, 2], []]", json.dumps(by_key).encode()], labels, TEXT_TOKENS),
    ]  # fmt: skip
