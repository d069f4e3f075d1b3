"""A folder and its annotations give what the packer makes of them, without packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swinv2_train import make_shards
from swinv2_train.config import ConfigError
from swinv2_train.data.objects import objects_from_json
from swinv2_train.data.sample import ShardError
from swinv2_train.data.sources.base import Source, open_source
from tests.support.configs import composed
from tests.support.detection import (
    NAMES,
    SIZE,
    coco_json,
    name_of,
    scene,
    write_coco,
    write_images,
    write_labelme,
    write_voc,
    write_yolo,
)

NUMBERS = range(1, 7)
WHERE = {"coco": "../annotations/of_{name}.json", "voc": "../Annotations", "yolo": "../labels/{name}", "labelme": "."}


def written(root: Path, format: str) -> Path:
    """The images, and their annotations where WHERE has them."""
    images = write_images(root / "images", NUMBERS)
    if format == "coco":
        (root / "annotations").mkdir()
        write_coco(root / "annotations" / "of_images.json", NUMBERS)
    elif format == "voc":
        write_voc(root / "Annotations", NUMBERS)
    elif format == "yolo":
        write_yolo(root / "labels" / "images", NUMBERS)
    else:
        write_labelme(images, NUMBERS)
    return images


def samples(source: Source) -> dict[str, tuple[bytes, Any]]:
    reader = source.open_reader()
    read = [reader.read(shard, i) for shard, count in enumerate(source.counts) for i in range(count)]
    return {sample.key: (sample.image, sample.targets) for sample in read}


@pytest.mark.parametrize("format", WHERE)
def test_a_folder_gives_what_its_packed_shards_give(format: str, tmp_path: Path) -> None:
    """In the same order, and with the same JSON."""
    images = written(tmp_path, format)
    annotations = tmp_path / "images" / WHERE[format].replace("{name}", "images")
    assert make_shards.run([str(images), f"{tmp_path}/out/t", "--annotations", str(annotations), "--overlays=0"]) == 0
    packed, folder = open_source(f"{tmp_path}/out/t-*.tar"), open_source(str(images), annotations=WHERE[format])
    assert [*samples(folder).items()] == [*samples(packed).items()] and folder.classes == packed.classes == NAMES
    assert folder.unannotated == packed.unannotated == (0,) and folder.used_labels == frozenset()
    assert folder.digest != open_source(str(images)).digest and sum(open_source(str(images)).unannotated) == 6


def test_what_is_wrong_with_boxes_is_counted_and_named_and_images_without_annotations_are_left_out(
    tmp_path: Path,
) -> None:
    images, content = write_images(tmp_path / "images", [*NUMBERS, 9]), coco_json(NUMBERS)
    content["annotations"][0]["bbox"] = [1, 2, 0, 5]
    content["annotations"][1]["category_id"] = 77
    content["annotations"][2]["bbox"] = [1, None, 4, 4]
    (tmp_path / "train.json").write_text(json.dumps(content))
    said: list[str] = []
    source = open_source(str(images), progress=said.append, annotations="../train.json")
    text = "\n".join(said)
    assert "1 of 7 images have no COCO annotations and are left out" in text and "k009" in text
    assert "a box without an area (left out): k001, object 0" in text
    assert "a class that the set does not list (left out)" in text and "a box that is no four numbers" in text
    found = {key: objects_from_json(targets["objects"]) for key, (_, targets) in samples(source).items()}
    assert sum(len(each.boxes) for each in found.values()) == len(content["annotations"]) - 3 and len(found) == 6


def test_classes_beside_give_their_numbers_and_one_that_is_missing_there_is_refused(tmp_path: Path) -> None:
    """So that a second split of Pascal VOC or labelme, in which a class does not occur, counts as the first."""
    images = written(tmp_path, "voc")
    (tmp_path / "classes.txt").write_text("plane\ntram\ncar\nbus\n")
    source = open_source(str(images), annotations="../Annotations")
    assert source.classes == ("plane", "tram", "car", "bus")
    found = objects_from_json(samples(source)[name_of(2)][1]["objects"])
    assert [source.classes[number] for number in found.classes] == [NAMES[n] for n in scene(2)[1].classes]
    (tmp_path / "classes.txt").write_text("plane\ntram\nbus\n")
    with pytest.raises(ShardError, match=r"classes.txt lists 3 classes, and not .*car"):
        open_source(str(images), annotations="../Annotations")


def test_images_of_many_bands_with_the_classes_of_their_pixels(tmp_path: Path) -> None:
    """Label images stay beside their images where some of these are left out."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in NUMBERS:
        np.save(folder / f"{name_of(number)}.npy", np.full((*SIZE, 5), number, np.float32))
        Image.fromarray(np.full(SIZE, number, np.uint8)).save(folder / f"{name_of(number)}.seg.png")
    content = json.dumps(coco_json([2, 4, 5])).replace(".png", ".npy")
    (tmp_path / "x.json").write_text(content)
    source = open_source(str(folder), image_member="npy", annotations="../x.json")
    found = samples(source)
    assert sorted(found) == ["k002", "k004", "k005"] and source.unsegmented == (0,)
    for key, (image, targets) in found.items():
        number = int(key[1:])
        assert objects_from_json(targets["objects"]).boxes.tolist() == scene(number)[1].boxes.tolist()
        with Image.open(folder / f"{key}.seg.png") as labels:
            assert np.asarray(labels)[0, 0] == number
        assert targets["segmentation"] == (folder / f"{key}.seg.png").read_bytes()
        assert image == (folder / f"{key}.npy").read_bytes()
    write_yolo(tmp_path / "yolo", NUMBERS)
    sizes = [
        objects_from_json(t["objects"]).size
        for _, t in samples(open_source(str(folder), image_member="npy", annotations="../yolo")).values()
    ]
    assert sizes == [SIZE] * 6  # YOLO says none: the files' own


@pytest.mark.parametrize(
    ("where", "cause"),
    [
        ("../gone.json", "data.annotations .*gone.json does not exist"),
        ("../of_{name}.json", "of_images.json does not exist"),
        (".", "holds no annotations"),
    ],
)
def test_annotations_that_are_not_there_are_named(where: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=cause):
        open_source(str(write_images(tmp_path / "images", NUMBERS)), annotations=where)


@pytest.mark.parametrize("value", ["''", "'a_{split}.json'", "'{'"])
def test_a_path_with_other_braces_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="data.annotations .* must be a path"):
        composed(["run_dir=/x", "data.shards=/x", f"data.annotations={value}"])


def test_an_image_that_cannot_be_read_is_named_where_its_size_is_needed(tmp_path: Path) -> None:
    images = written(tmp_path, "yolo")
    (images / "k003.png").write_bytes(b"no image")
    with pytest.raises(ShardError, match="k003.png: its file does not say how many pixels it has; mend it"):
        open_source(str(images), annotations=WHERE["yolo"])
