"""Average precision against pycocotools on random detections with crowds, and each image counted once."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.tasks.detection_scores import (
    all_scores,
    average_precision,
    detection_records,
    read_records,
)
from swinv2_train.tasks.detection_tables import confusions, detection_tables
from swinv2_train.tasks.detections import Found, Truth
from swinv2_train.tasks.metrics import Records

CLASSES, SIZE = 4, (200, 240)
STATS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


def block(box: np.ndarray) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    x0, y0, x1, y1 = box.round().astype(int)
    mask[y0:y1, x0:x1] = True
    mask[y0 : y0 + 2, x0 : x0 + 2] = False  # so that it is no box
    return mask


def boxes_of(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = rng.uniform(0, 1, (count, 2)) * [SIZE[1] - 12, SIZE[0] - 12]
    sides = np.minimum(rng.uniform(4, 190, (count, 2)), np.array([SIZE[1], SIZE[0]]) - corners)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def image_of(number: int) -> tuple[Truth, Found]:
    """Up to 8 objects, some of them crowds, found roughly, twice, as other classes, or not; and what is not there."""
    rng = np.random.default_rng(number)
    boxes = boxes_of(rng, int(rng.integers(0, 9)))
    masks: Any = [encode_mask(block(box)) for box in boxes]
    truth = Truth(
        boxes=boxes, classes=rng.integers(0, CLASSES - 1, len(boxes)), crowd=rng.random(len(boxes)) < 0.15,
        area=np.array([float(block(box).sum()) for box in boxes]), masks=masks,
    )  # fmt: skip
    near = np.repeat(boxes, rng.integers(0, 3, len(boxes)), axis=0)
    labels = (
        np.repeat(truth["classes"], 1)[[int(np.abs(boxes - each).sum(1).argmin()) for each in near]]
        if len(near)
        else np.zeros(0, np.int64)
    )
    near = near + rng.normal(0, 3, near.shape).astype(np.float32)
    labels = np.where(rng.random(len(near)) < 0.2, rng.integers(0, CLASSES, len(near)), labels)
    far = boxes_of(rng, int(rng.integers(0, 40)))
    found = np.concatenate([near, far]).clip(0, [SIZE[1], SIZE[0]] * 2).astype(np.float32)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    scores = rng.random(len(found)).round(2).astype(np.float32)  # with ties
    codes: Any = [encode_mask(block(box)) for box in found]
    classes = np.concatenate([labels, rng.integers(0, CLASSES, len(far))]).astype(np.int64)
    return truth, Found(found, scores, classes, codes)


def records(numbers: range, masks: bool = True) -> Records:
    truths, found = zip(*map(image_of, numbers), strict=True)
    return detection_records([*numbers], [SIZE] * len(numbers), truths, found, CLASSES, masks)


def reference(numbers: range, kind: str) -> np.ndarray:
    """pycocotools' twelve numbers, built from the same objects without any of our code."""
    images, rows, results = [], [], []
    for number in numbers:
        truth, found = image_of(number)
        images.append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        for box, label, crowd, area, mask in zip(
            *(truth[name] for name in ("boxes", "classes", "crowd", "area", "masks")), strict=True
        ):  # type: ignore[literal-required]
            x0, y0, x1, y1 = map(float, box)
            rows.append({
                "id": len(rows) + 1, "image_id": number, "category_id": int(label), "iscrowd": int(crowd),
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(area), "segmentation": mask,
            })  # fmt: skip
        for box, score, label, mask in zip(
            found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), found.masks or (), strict=True
        ):
            x0, y0, x1, y1 = box
            row = {"image_id": number, "category_id": label, "score": score}
            results.append(row | ({"segmentation": mask} if kind == "segm" else {"bbox": [x0, y0, x1 - x0, y1 - y0]}))
    with contextlib.redirect_stdout(io.StringIO()):
        truth_set = COCO()
        truth_set.dataset = {
            "images": images,
            "annotations": rows,
            "categories": [{"id": n, "name": str(n)} for n in range(CLASSES)],
            "info": {},
        }
        truth_set.createIndex()
        evaluation = COCOeval(truth_set, truth_set.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats: np.ndarray = evaluation.stats
    return stats


@pytest.mark.parametrize("kind, theirs", [("box", "bbox"), ("mask", "segm")])
def test_all_twelve_numbers_are_pycocotools_own(kind: str, theirs: str) -> None:
    images = read_records(records(range(40)).values)
    mine = average_precision(images, CLASSES, kind)
    right = reference(range(40), theirs)
    assert 0.05 < right[0] < 0.95 and (right > -1).all()
    np.testing.assert_allclose([mine.scores[name] for name in STATS], 100 * right, rtol=0, atol=1e-6)
    assert mine.precision.shape == (101, CLASSES) and np.isnan(mine.class_ap[CLASSES - 1])
    np.testing.assert_allclose(np.nanmean(mine.class_ap), mine.scores["ap"], atol=1e-9)
    np.testing.assert_allclose(np.nanmean(mine.precision), mine.scores["ap50"], atol=1e-9)


def test_the_scores_do_not_depend_on_the_order_of_images() -> None:
    given = records(range(12))
    assert given.finish(sorted(given.values)) == given.finish([*reversed(given.values)])
    assert set(given.finish(given.values)) == {f"val/{kind}_{name}" for kind in ("box", "mask") for name in STATS}


def test_nothing_found_is_0_and_nothing_to_find_is_nan() -> None:
    truth, found = image_of(3)
    assert len(truth["boxes"])
    none = Found(found.boxes[:0], found.scores[:0], found.classes[:0], [])
    empty = Truth(
        boxes=truth["boxes"][:0],
        classes=truth["classes"][:0],
        crowd=truth["crowd"][:0],
        area=truth["area"][:0],
        masks=[],
    )
    for each, right, expected in ((none, truth, 0.0), (found, empty, None), (none, empty, None)):
        images = read_records(detection_records([3], [SIZE], [right], [each], CLASSES, True).values)
        for value in (all_scores(images, CLASSES, True)[f"val/{kind}_ap"] for kind in ("box", "mask")):
            assert value == expected if expected is not None else np.isnan(value)


@pytest.mark.parametrize("lost", ["scores", "finite", "boxes"])
def test_an_image_of_which_the_model_says_no_numbers_leaves_no_score(lost: str) -> None:
    """A model whose weights are nan finds nothing: that is no AP of 0, and no reason to end a run."""
    images = [image_of(number) for number in (3, 4)]
    truths, found = ([each[place] for each in images] for place in (0, 1))
    value = False if lost == "finite" else np.full_like(getattr(found[1], lost), np.inf)
    found[1] = found[1]._replace(**{lost: value})
    given = detection_records([3, 4], [SIZE, SIZE], truths, found, CLASSES, True)
    assert all(np.isnan(value) for value in given.finish(given.values).values())
    tables = detection_tables(given.values)
    assert set(tables["class_box_ap"]) == {None} and tables["box_precision_at_recall"] == []
    assert sum(tables["class_objects"]) == sum(int((~each["crowd"]).sum()) for each in truths)


def test_an_object_without_a_mask_counts_neither_way_where_masks_are_compared() -> None:
    truth, found = image_of(3)
    whole = Found(truth["boxes"], np.ones(len(truth["boxes"]), np.float32), truth["classes"], truth["masks"])  # type: ignore[arg-type]
    lost = Truth(**{**truth, "masks": [None, *truth["masks"][1:]]})  # type: ignore[typeddict-item]
    images = read_records(detection_records([3], [SIZE], [lost], [whole], CLASSES, True).values)
    assert all_scores(images, CLASSES, True)["val/mask_ap50"] == 100


def test_confusions_pair_each_object_with_what_was_found_there() -> None:
    truth = {
        "boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [0, 50, 50, 100]],
        "classes": [0, 1, 1, 2],
        "crowd": [False, False, False, True],
    }
    found = {
        "boxes": [[0, 0, 10, 9], [20, 0, 30, 10], [0, 50, 50, 99], [80, 80, 90, 90], [40, 0, 50, 10]],
        "scores": [0.9, 0.8, 0.7, 0.6, 0.1],
        "classes": [0, 2, 2, 1, 1],
    }
    assert confusions([{"truth": truth, "found": found}]) == {(0, 0): 1, (1, 2): 1, (-1, 1): 1, (1, -1): 1}


def test_the_tables_are_of_the_same_objects_as_the_scores() -> None:
    given = records(range(12))
    tables, scores = detection_tables(given.values), given.finish(given.values)
    for kind in ("box", "mask"):
        known = [value for value in tables[f"class_{kind}_ap"] if value is not None]
        assert np.mean(known) == pytest.approx(scores[f"val/{kind}_ap"], abs=1e-3)
        assert np.mean(tables[f"{kind}_precision_at_recall"]) == pytest.approx(scores[f"val/{kind}_ap50"], abs=0.01)
        assert len(tables[f"{kind}_precision_at_recall"]) == 101
    truths = [image_of(number)[0] for number in range(12)]
    assert sum(tables["class_objects"]) == sum(int((~truth["crowd"]).sum()) for truth in truths)
    assert all(right != named for right, named, _ in tables["confusions"]) and len(tables["confusions"]) > 3
