"""Boxes and masks in the four formats that make_shards reads, and the JSON of one image in a shard."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from swinv2_train import make_shards
from swinv2_train.config import ConfigError
from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.data.objects import objects_from_json, objects_to_json
from tests.fuzz.mutation import TEXT_TOKENS
from tests.fuzz.target import Target
from tests.support.detection import SIZE, coco_json, scene, write_images, write_labelme, write_voc, write_yolo

_NUMBERS = (1, 2)
_TOKENS = (*TEXT_TOKENS, b"NaN", b"1e999", b"-1", b'"segmentation"', b'"counts"', b"<!DOCTYPE a>", b"&a;", b"0.5 ")


def annotation_targets() -> list[Target]:
    """All of them; makes their seeds."""
    mask = encode_mask(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 7 == 0)
    content = coco_json(_NUMBERS)
    crowd = {"size": list(SIZE), "counts": mask["counts"].decode()}
    content["annotations"][0].update(iscrowd=1, segmentation=crowd)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        voc = (write_voc(place / "voc", _NUMBERS) / "k002.xml").read_bytes()
        yolo = (write_yolo(place / "yolo", _NUMBERS) / "k002.txt").read_bytes()
        names = (place / "yolo" / "data.yaml").read_bytes()
        labelme = (write_labelme(place / "labelme", _NUMBERS) / "k002.json").read_bytes()

    def packed(name: str, *more: tuple[str, bytes]) -> Callable[[bytes, Path], None]:
        def run(data: bytes, place: Path) -> None:
            write_images(place / "images", _NUMBERS)
            (place / "notes").mkdir()
            for path, each in ((name, data), *more):
                (place / "notes" / path).write_bytes(each)
            notes = place / "notes" / (name if name == "coco.json" else "")
            command = [str(place / "images"), str(place / "out" / "t"), "--annotations", str(notes), "--overlays", "0"]
            if (code := make_shards.run(command)) != 0:
                assert code == 2, code
                raise ConfigError("refused")

        return run

    return [
        Target("objects: COCO json", [json.dumps(content).encode()], packed("coco.json"), _TOKENS),
        Target("objects: Pascal VOC", [voc], packed("k002.xml"), _TOKENS),
        Target("objects: YOLO", [yolo], packed("k002.txt", ("data.yaml", names)), _TOKENS),
        Target("objects: YOLO's names", [names], packed("data.yaml", ("k002.txt", yolo)), _TOKENS),
        Target("objects: labelme", [labelme], packed("k002.json"), _TOKENS),
        Target("objects: in a shard", [objects_to_json(scene(2)[1])], _read, _TOKENS),
    ]


def _read(data: bytes, place: Path) -> None:
    objects = objects_from_json(data)
    for mask in objects.masks:
        if mask is not None and objects.size[0] * objects.size[1] < 10**6:
            mask.pixels(objects.size)
