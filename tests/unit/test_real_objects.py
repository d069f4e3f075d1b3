"""Photographs of Pascal VOC with objects in three formats, fetched for the test and never kept: all say the same.

Skipped, by name, where there is no network.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from swinv2_train import make_shards
from swinv2_train.data.objects import Objects, objects_from_json
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from tests.unit.test_real_pairs import fetched

pytestmark = pytest.mark.slow

KEYS = ["2011_000003", "2011_000006", "2011_000025"]


def packed(images: Path, annotations: Path, out: Path) -> tuple[dict[str, Objects], tuple[str, ...]]:
    assert make_shards.run([str(images), str(out / "t"), "--annotations", str(annotations), "--overlays", "0"]) == 0
    manifest = open_manifest(f"{out}/t-*.tar")
    reader = TarReader(manifest)
    read = [reader.read(0, number) for number in range(manifest.num_samples)]
    assert manifest.classes is not None
    found = {sample.key: objects_from_json(sample.targets["objects"]) for sample in read}
    return {key.rpartition("/")[2]: found[key] for key in sorted(found)}, manifest.classes


def named(objects: Objects, classes: tuple[str, ...]) -> list[tuple[str, list[float]]]:
    return sorted((classes[label], box) for label, box in zip(objects.classes, objects.boxes.tolist(), strict=True))


def test_coco_voc_and_labelme_say_the_same_of_the_same_photographs(tmp_path, capsys):
    """Boxes within a pixel and a half, for the tool that wrote the others rounded them; masks in nearly all pixels."""
    with tarfile.open(fetched(tmp_path, "labelme==6.3.1", "no-binary")) as sources:
        sources.extractall(tmp_path, filter="data")
    examples = next(tmp_path.glob("labelme-*/examples"))
    boxes, masks = examples / "bbox_detection", examples / "instance_segmentation"
    own, own_names = packed(boxes / "data_annotated", boxes / "data_annotated", tmp_path / "a")
    voc, voc_names = packed(
        boxes / "data_dataset_voc/JPEGImages", boxes / "data_dataset_voc/Annotations", tmp_path / "b"
    )
    assert [*own] == [*voc] == KEYS and own_names == voc_names == ("bus", "car", "person")
    for key in KEYS:
        pairs = zip(named(own[key], own_names), named(voc[key], voc_names), strict=True)
        for (one, box), (other, same) in pairs:
            assert one == other
            np.testing.assert_allclose(box, same, atol=1.5)
    drawn, drawn_names = packed(masks / "data_annotated", masks / "data_annotated", tmp_path / "c")
    coco = masks / "data_dataset_coco"
    told, told_names = packed(coco, coco / "annotations.json", tmp_path / "d")
    assert len(told_names) == 20 and "_background_" not in told_names  # which the file has as a class
    assert "the background as an object" in capsys.readouterr().out  # the __ignore__ regions of labelme's own
    for key in KEYS:
        size, sides = drawn[key].size, []
        for objects, names in ((drawn[key], drawn_names), (told[key], told_names)):
            all_masks = [(names[label], mask) for label, mask in zip(objects.classes, objects.masks, strict=True)]
            assert all(mask is not None for _, mask in all_masks)
            sides.append(sorted((name, int(mask.pixels(size).sum())) for name, mask in all_masks if mask is not None))
        assert [name for name, _ in sides[0]] == [name for name, _ in sides[1]]
        np.testing.assert_allclose([count for _, count in sides[0]], [count for _, count in sides[1]], rtol=0.06)
