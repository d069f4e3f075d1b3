"""swinv2-make-shards of images with objects: four formats give the same samples, and bad boxes go by stated rules."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swinv2_train import make_shards
from swinv2_train.data.loading.loader import TrainLoader
from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.data.objects import Objects, objects_from_json
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
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
from tests.support.detector import DETECT, detector

NUMBERS = range(1, 7)
WRITERS: dict[str, Callable[[Path, Any], Path]] = {
    "coco": lambda folder, numbers: write_coco(folder / "instances.json", numbers),
    "voc": lambda folder, numbers: write_voc(folder / "Annotations", numbers),
    "yolo": lambda folder, numbers: write_yolo(folder / "labels", numbers),
    "labelme": lambda folder, numbers: write_labelme(folder / "images", numbers),
}


def run(images: Path, annotations: Path, *options: str, out: str = "out/train") -> int:
    command = [str(images), str(images.parent / out), "--annotations", str(annotations), "--overlays", "0", *options]
    return make_shards.run(command)


def packed(pattern: str) -> dict[str, Objects]:
    manifest = open_manifest(pattern)
    reader = TarReader(manifest)
    read = [reader.read(shard, i) for shard, count in enumerate(manifest.counts) for i in range(count)]
    return {sample.key: objects_from_json(sample.targets["objects"]) for sample in read}


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_same_boxes_classes_and_names(format: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", NUMBERS)
    assert run(images, WRITERS[format](tmp_path, NUMBERS), "--samples-per-shard", "4") == 0
    found = packed(f"{tmp_path}/out/train-*.tar")
    assert sorted(found) == [name_of(number) for number in NUMBERS]
    for number in NUMBERS:
        mine, truth = found[name_of(number)], scene(number)[1]
        np.testing.assert_allclose(mine.boxes, truth.boxes, atol=1e-3)
        assert mine.classes.tolist() == truth.classes.tolist() and mine.size == SIZE
        np.testing.assert_allclose(mine.area, truth.area, rtol=1e-3)
        if format in ("coco", "labelme"):
            for mask, right in zip(mine.masks, truth.masks, strict=True):
                assert mask is not None and right is not None
                assert (mask.pixels(SIZE) == right.pixels(SIZE)).all()
        else:
            assert set(mine.masks) <= {None}
    manifest = open_manifest(f"{tmp_path}/out/train-*.tar")
    assert manifest.classes == NAMES and manifest.unannotated == (0, 0)
    assert found[name_of(3)].image_id == 3


def test_a_second_split_takes_the_numbers_of_the_first(tmp_path: Path) -> None:
    """Without the first class in it, its own numbers would be others."""
    images = write_images(tmp_path / "images", NUMBERS)
    assert run(images, write_coco(tmp_path / "train.json", NUMBERS)) == 0
    content = coco_json([3])  # one object, of class 0
    content["categories"] = [{"id": 1, "name": "zebra"}, {"id": 2, "name": "tram"}]
    content["annotations"][0]["category_id"] = 2
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert run(images, tmp_path / "val.json", out="out/val") == 0
    assert packed(f"{tmp_path}/out/val-*.tar")[name_of(3)].classes.tolist() == [2]
    content["annotations"][0]["category_id"] = 1
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert run(images, tmp_path / "val.json", out="out/other") == 2


def faults() -> dict[str, Any]:
    """One good object in image 1 and one of each fault in image 2; image 5 has none."""
    content = coco_json([1, 2, 5])
    good = content["annotations"][0]
    content["annotations"] = [good]
    content["categories"] += [{"id": 0, "name": "_background_"}]
    whole = encode_mask(np.ones((SIZE[0], SIZE[1] + 1), bool))

    def add(**changes: Any) -> None:
        row = {**good, "image_id": 2, "bbox": [5, 5, 10, 10], "segmentation": [[5, 5, 15, 5, 15, 15]], **changes}
        content["annotations"].append(row)

    add(bbox=[5, 5, float("nan"), 10])
    add(bbox=[1, 2, 3])
    add(bbox="5 5 10 10")
    add(category_id=77)
    add(category_id=None)
    add(category_id=0)
    add(bbox=[5, 5, 0, 10])
    add(bbox=[5, 5, 10, -3])
    add(bbox=[70, 5, 10, 10])
    add(bbox=[51, 20, 10, 10])  # to 61 of 60
    add(bbox=[-30, 20, 40, 10])
    add()
    add()
    add(bbox=[6, 5, 10, 10], segmentation=[[1, 1, 2, 2]])
    add(bbox=[7, 5, 10, 10], segmentation={"size": [SIZE[0], SIZE[1] + 1], "counts": whole["counts"].decode()})
    add(bbox=[8, 5, 10, 10], segmentation={"size": list(SIZE), "counts": [3, 4]})
    add(bbox=[9, 5, 10, 10], area=None, segmentation=[])
    add(bbox=[2, 2, 30, 30], iscrowd=1, segmentation={"size": list(SIZE), "counts": [0, SIZE[0] * SIZE[1]]}, area=900.0)
    add(bbox=[10, 5, 10, 10], segmentation="no mask")
    add(category_id=[1])
    add(image_id=999)
    return content


def test_bad_boxes_are_counted_named_and_handled_by_their_rules(tmp_path: Path, capsys: Any) -> None:
    images = write_images(tmp_path / "images", [1, 2, 5])
    (tmp_path / "bad.json").write_text(json.dumps(faults()))
    assert run(images, tmp_path / "bad.json", "--drop-empty") == 0
    said = capsys.readouterr().out
    for count, kind in (
        (3, "no four numbers"), (3, "the set does not list"), (1, "background as an object"), (2, "without an area"),
        (1, "outside the image"), (1, "by a pixel or less"), (1, "beyond the image (clipped)"), (1, "twice"),
        (2, "fewer than 3 points"), (2, "run lengths of another size, or broken"),
    ):  # fmt: skip
        assert any(line.split()[:1] == [str(count)] and kind in line for line in said.splitlines()), (count, kind, said)
    assert "k002, object 0: [5, 5, nan" in said.replace("5.0", "5") and "image_id 999" in said
    assert "1 images without objects left out" in said
    found = packed(f"{tmp_path}/out/train-*.tar")
    assert sorted(found) == ["k001", "k002"] and open_manifest(f"{tmp_path}/out/train-*.tar").classes == NAMES
    mine = found["k002"]
    assert mine.boxes.tolist() == [
        [51, 20, 60, 30], [0, 20, 10, 30], [5, 5, 15, 15], [6, 5, 16, 15], [7, 5, 17, 15], [8, 5, 18, 15],
        [9, 5, 19, 15], [2, 2, 32, 32], [10, 5, 20, 15],
    ]  # fmt: skip
    assert [mask is not None for mask in mine.masks] == [True, True, True, False, False, False, False, True, False]
    assert mine.crowd.tolist() == [False] * 7 + [True, False] and mine.area[6] == 100


def test_the_first_bad_box_ends_it_where_that_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    images = write_images(tmp_path / "images", [1, 2, 5])
    (tmp_path / "bad.json").write_text(json.dumps(faults()))
    assert run(images, tmp_path / "bad.json", "--on-bad-box", "error") == 2
    assert "object 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_annotations_of_images_of_another_size_end_it(tmp_path: Path, capsys: Any) -> None:
    images = write_images(tmp_path / "images", [1])
    content = coco_json([1])
    content["images"][0].update(height=SIZE[1], width=SIZE[0])
    (tmp_path / "turned.json").write_text(json.dumps(content))
    assert run(images, tmp_path / "turned.json") == 2
    said = capsys.readouterr().err
    assert "k001" in said and "turned by a quarter" in said


def test_annotated_images_that_are_not_there_and_images_without_annotations_are_told(
    tmp_path: Path, capsys: Any
) -> None:
    images = write_images(tmp_path / "images" / "deep", [1, 2, 3]).parent
    assert run(images, write_voc(tmp_path / "voc", [2, 3, 4])) == 0  # of the same names in another folder
    said = capsys.readouterr().out
    assert "1 of 3 images have no Pascal VOC annotations" in said and "deep/k001.png" in said
    assert "1 images of --annotations" in said and "k004" in said
    assert sorted(packed(f"{tmp_path}/out/train-*.tar")) == ["deep/k002", "deep/k003"]
    assert run(images, write_voc(tmp_path / "others", [7, 8]), out="none/t") == 2
    assert "none of its 2 images is in" in capsys.readouterr().err


def test_objects_are_drawn_over_the_first_images_of_a_set_that_is_packed(tmp_path: Path, capsys: Any) -> None:
    images = write_images(tmp_path / "images", NUMBERS)
    assert run(images, write_coco(tmp_path / "c.json", NUMBERS), "--overlays", "2") == 0
    pictures = sorted((tmp_path / "out").glob("train-objects-*.png"))
    assert [each.name for each in pictures] == ["train-objects-0.png", "train-objects-1.png"]
    with Image.open(pictures[0]) as picture:
        assert max(picture.size) == 384 and len(set(np.asarray(picture).reshape(-1, 3)[:, 0])) > 10
    drawn = re.findall("the objects of '(.*)'; look", capsys.readouterr().out)
    other = next(name for name in map(name_of, NUMBERS) if name not in drawn)
    (images / f"{other}.png").write_bytes(b"no image")
    assert run(images, tmp_path / "c.json", "--overlays", "2", out="refused/train") == 2
    assert f"'{other}' cannot be packed" in capsys.readouterr().err and not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "write, cause",
    [
        (lambda folder: (folder / "x.json").write_text("{}"), "labelme's"),
        (lambda folder: None, "holds no annotations"),
        (lambda folder: (folder / "x.txt").write_text("car 1 2 3 4"), "line 1 .*YOLO"),
        (lambda folder: (folder / "x.txt").write_text("0 0.5 0.5"), "line 1"),
        (lambda folder: (folder / "x.xml").write_text("<a/>"), "its root is <a>"),
        (lambda folder: (folder / "x.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>'), "DOCTYPE"),
        (lambda folder: (folder / "x.xml").write_text("<annotation>" * 40), "nested too deeply"),
        (lambda folder: [(folder / f"x.{end}").write_text("") for end in ("xml", "txt")], "several formats"),
    ],
)
def test_what_is_no_set_of_annotations_is_told(
    write: Callable[[Path], Any], cause: str, tmp_path: Path, capsys: Any
) -> None:
    images = write_images(tmp_path / "images", [1])
    (tmp_path / "notes").mkdir()
    write(tmp_path / "notes")
    assert run(images, tmp_path / "notes") == 2
    assert re.search(cause, capsys.readouterr().err)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)], ids=["H x W x C", "C x H x W"])
def test_images_of_many_bands_are_packed_with_their_objects(axes: tuple[int, ...], tmp_path: Path) -> None:
    """Either order of an array's axes; the annotations' size tells which, and YOLO has none."""
    values = np.zeros((*SIZE, 5), np.float32)
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        np.save(tmp_path / "images" / f"{name_of(number)}.npy", values.transpose(axes))
    assert run(tmp_path / "images", write_voc(tmp_path / "voc", [1, 2])) == 0
    found = packed(f"{tmp_path}/out/train-*.tar")
    assert {key: each.size for key, each in found.items()} == {"k001": SIZE, "k002": SIZE}
    if axes == (0, 1, 2):
        assert run(tmp_path / "images", write_yolo(tmp_path / "yolo", [1, 2]), out="out/yolo") == 0
        np.testing.assert_allclose(packed(f"{tmp_path}/out/yolo-*.tar")["k001"].boxes, scene(1)[1].boxes, atol=1e-3)


@pytest.mark.parametrize("where", ["beside", "apart"])
def test_classes_of_pixels_are_packed_with_the_objects_and_train_the_semantic_branch(
    where: str, tmp_path: Path, capsys: Any
) -> None:
    """Label images beside the images are none of these, though YOLO takes every image without a file as empty."""
    images, labels = write_images(tmp_path / "images", NUMBERS), tmp_path / "labels"
    labels.mkdir()
    for number in NUMBERS:
        path = images / f"{name_of(number)}.seg.png" if where == "beside" else labels / f"{name_of(number)}.png"
        values = np.full(SIZE, 255, np.uint8)
        values[:, :30] = number % 5
        Image.fromarray(values).save(path)
    options = ("--samples-per-shard", "4", "--num-classes", "5", *(("--labels", str(labels)) * (where == "apart")))
    assert run(images, write_yolo(tmp_path / "yolo", NUMBERS), *options) == 0
    assert "the values of 6 label images" in capsys.readouterr().out
    pattern = f"{tmp_path}/out/train-*.tar"
    assert len(packed(pattern)) == 6
    manifest, task = open_manifest(pattern), detector("task.masks=false", "task.semantic_classes=5")
    assert manifest.unsegmented == (0, 0)
    data = composed([*DETECT, "run_dir=x", "data.shards=unused"]).data
    batch = next(iter(TrainLoader(manifest, data, task.train_transform, 7, 4, 2, 0, 1, 0)))
    meta = task.meta_batch(2)["semantic"]
    assert (batch["semantic"].shape, batch["semantic"].dtype) == (meta.shape, meta.dtype)
    assert {0, 1, 2, 3, 4} & set(batch["semantic"].flatten().tolist())
    few = detector("task.masks=false", "task.semantic_classes=1")
    with pytest.raises(SampleError, match=r"0 to 0 are classes, 255 is ignored \(task.semantic_classes\)"):
        [*TrainLoader(manifest, data, few.train_transform, 7, 4, 2, 0, 1, 0)]


def test_the_semantic_branch_without_classes_of_pixels_is_refused_with_the_remedy(tmp_path: Path, capsys: Any) -> None:
    images = write_images(tmp_path / "images", NUMBERS)
    yolo = write_yolo(tmp_path / "yolo", NUMBERS)
    assert run(images, yolo) == 0
    task = detector("task.masks=false", "task.semantic_classes=5")
    data = composed([*DETECT, "run_dir=x", "data.shards=unused"]).data
    with pytest.raises(ShardError, match="pack the images with --annotations and --labels .*task.semantic_classes=0"):
        TrainLoader(open_manifest(f"{tmp_path}/out/train-*.tar"), data, task.train_transform, 7, 4, 2, 0, 1, 0)
    capsys.readouterr()
    for option, cause in (("--reduce-zero-label", "is of task=segment"), ("--num-classes=3", "there are none")):
        assert run(images, yolo, option, out="out/again") == 2
        assert cause in capsys.readouterr().err


def test_names_in_another_form_of_unicode_are_the_same_classes_and_images(tmp_path: Path, capsys: Any) -> None:
    """macOS writes an accent as a letter of its own; a list of names gives one form back."""
    images, apart = (
        write_images(tmp_path / "images", [1, 2]),
        unicodedata.normalize("NFD", "Stra\u00dfenb\u00e4hn\u00e9"),
    )
    (images / "k001.png").rename(images / f"{apart}.png")
    content = coco_json([1, 2])
    content["images"][0]["file_name"] = unicodedata.normalize("NFC", f"{apart}.png")
    for form in ("NFC", "NFD"):
        content["categories"][0]["name"] = unicodedata.normalize(form, apart)
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert run(images, tmp_path / "a.json", out=f"out/{form}") == 0
        found = packed(f"{tmp_path}/out/{form}-*.tar")
        assert len(found) == 2 and 2 in found[name_of(2)].classes
    assert open_manifest(f"{tmp_path}/out/NFD-*.tar").classes == ("bus", "car", unicodedata.normalize("NFC", apart))
    capsys.readouterr()
    content["categories"][0]["name"] = "a\nb"
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert run(images, tmp_path / "a.json", out="other/x") == 2
    assert "name of several lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"images": []}, "lists no images"),
        (
            {"images": [{"id": 2**64, "file_name": "k001.png"}]},
            r"images\[0\] needs a file_name and an id, a whole number of",
        ),
        ({"categories": [{"id": 1, "name": 7}]}, "a category needs a name that is text and an id"),
        ({"annotations": [None]}, "annotations must be a list of objects"),
    ],
)
def test_a_coco_file_that_cannot_be_one_is_told_why(
    change: dict[str, Any], cause: str, tmp_path: Path, capsys: Any
) -> None:
    images = write_images(tmp_path / "images", [1])
    (tmp_path / "a.json").write_text(json.dumps({**coco_json([1]), **change}))
    assert run(images, tmp_path / "a.json") == 2
    assert re.search(cause, capsys.readouterr().err)


def test_masks_without_their_library_are_refused_with_the_remedy(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    images = write_images(tmp_path / "images", [1])
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    content = coco_json([1])
    del content["annotations"][0]["area"]  # it is counted in the mask
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert run(images, tmp_path / "c.json") == 2
    assert "pip install -e '.[detection]'" in capsys.readouterr().err
