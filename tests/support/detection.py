"""Images with objects, for the tests of detection: rectangles of a colour for each class, in every format of boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_train.data.objects import Mask, Objects, objects_to_json
from swinv2_train.data.shards.tar_writer import write_shards
from tests.support.images import encoded

NAMES = ("bus", "car", "tram")
SIZE = (40, 60)


def scene(number: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, Objects]:
    """Image uint8 (*size, 3) and one to three objects, whose masks are polygons; every fifth image has none."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 60, (*size, 3)).astype(np.uint8)
    boxes, classes, masks = [], [], []
    for label in range(number % 5 and 1 + number % 3):
        height, width = rng.integers(6, 20, 2)
        y0, x0 = int(rng.integers(0, size[0] - height)), int(rng.integers(0, size[1] - width))
        x1, y1 = x0 + int(width), y0 + int(height)
        image[y0:y1, x0:x1] = 60
        image[y0:y1, x0:x1, label] = 230
        boxes.append([x0, y0, x1, y1])
        classes.append(label)
        masks.append(Mask(polygons=(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float),)))
    found = np.array(boxes, np.float32).reshape(-1, 4)
    area = ((found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])).astype(np.float64)
    crowd = np.zeros(len(found), bool)
    return image, Objects(size, number, found, np.array(classes, np.int64), crowd, area, tuple(masks))


def name_of(number: int) -> str:
    return f"k{number:03d}"


def write_images(folder: Path, numbers: Sequence[int]) -> Path:
    """The scenes as folder/kNNN.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{name_of(number)}.png").write_bytes(encoded(scene(number)[0]))
    return folder


def coco_json(numbers: Sequence[int]) -> dict[str, Any]:
    """Ids with gaps, as COCO's own."""
    images, rows = [], []
    for number in numbers:
        objects = scene(number)[1]
        images.append({"id": number, "file_name": f"{name_of(number)}.png", "height": SIZE[0], "width": SIZE[1]})
        for box, label, mask, area in zip(
            objects.boxes.tolist(), objects.classes, objects.masks, objects.area, strict=True
        ):
            assert mask is not None
            rows.append({
                "id": len(rows) + 1, "image_id": number, "category_id": 10 * int(label) + 3, "iscrowd": 0,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "area": float(area),
                "segmentation": [mask.polygons[0].ravel().tolist()],
            })  # fmt: skip
    categories = [{"id": 10 * label + 3, "name": name} for label, name in reversed([*enumerate(NAMES)])]
    return {"images": images, "annotations": rows, "categories": categories}


def write_coco(path: Path, numbers: Sequence[int]) -> Path:
    path.write_text(json.dumps(coco_json(numbers)))
    return path


def write_voc(folder: Path, numbers: Sequence[int]) -> Path:
    """Corners from 1, both of the box."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        objects = scene(number)[1]
        rows = "".join(
            f"<object><name>{NAMES[label]}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1:g}</xmin>"
            f"<ymin>{y0 + 1:g}</ymin><xmax>{x1:g}</xmax><ymax>{y1:g}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), label in zip(objects.boxes.tolist(), objects.classes, strict=True)
        )
        size = f"<size><width>{SIZE[1]}</width><height>{SIZE[0]}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name_of(number)}.png</filename>{size}{rows}</annotation>"
        (folder / f"{name_of(number)}.xml").write_text(text)
    return folder


def write_yolo(folder: Path, numbers: Sequence[int]) -> Path:
    """With data.yaml; no file for an image without objects."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        objects = scene(number)[1]
        lines = [
            f"{label} {(x0 + x1) / 2 / SIZE[1]:.7f} {(y0 + y1) / 2 / SIZE[0]:.7f} {(x1 - x0) / SIZE[1]:.7f} "
            f"{(y1 - y0) / SIZE[0]:.7f}"
            for (x0, y0, x1, y1), label in zip(objects.boxes.tolist(), objects.classes, strict=True)
        ]
        if lines:
            (folder / f"{name_of(number)}.txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text(f"path: .\nnames:\n  0: {NAMES[0]}\n  1: {NAMES[1]}\n  2: {NAMES[2]}\n")
    return folder


def write_labelme(folder: Path, numbers: Sequence[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        objects = scene(number)[1]
        shapes = []
        for label, mask in zip(objects.classes, objects.masks, strict=True):
            assert mask is not None
            points = mask.polygons[0].tolist()
            shapes.append(
                {"label": NAMES[label], "points": points, "group_id": None, "shape_type": "polygon", "flags": {}}
            )
        content = {
            "version": "5.0", "shapes": shapes, "imagePath": f"{name_of(number)}.png", "imageData": None,
            "imageHeight": SIZE[0], "imageWidth": SIZE[1],
        }  # fmt: skip
        (folder / f"{name_of(number)}.json").write_text(json.dumps(content))
    return folder


def object_shards(folder: Path, train: int = 8, test: int = 4) -> tuple[str, str]:
    """Overrides that name shards of scenes."""
    for name, count, first in (("train", train, 1), ("test", test, 101)):
        rows = []
        for number in range(first, first + count):
            image, objects = scene(number)
            rows.append((name_of(number), encoded(image), "png", None, {"objects": objects_to_json(objects)}))
        write_shards(rows, str(folder / name), 4)
    return (f"data.shards={folder}/train-*.tar", f"data.eval_shards={folder}/test-*.tar")
