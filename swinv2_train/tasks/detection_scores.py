"""Average precision of boxes and masks, as COCO computes it (faster-coco-eval), of the images of all ranks together.

Ten thresholds of overlap from 0.50 to 0.95, 101 points of recall, at most 100 detections of an image and class; small,
medium and large by the area of the right object (below 32^2, below 96^2).  A crowd may be found any number of times and
counts neither way.  An object without a mask is such a crowd where masks are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.data.mask_codes import NEEDED, Rle
from swinv2_train.tasks.detections import Found, Truth
from swinv2_train.tasks.metrics import Records

DETECTIONS = "detections"
"""The name of Records that hold the detections and right objects of images."""
BOX, MASK = "box", "mask"
_KINDS = {BOX: "bbox", MASK: "segm"}
_AREAS = ("", "_small", "_medium", "_large")
_MOST = (1, 10, 100)


def check_installed() -> None:
    """Raises ConfigError where faster-coco-eval is not."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{NEEDED} ({error})") from error


def detection_records(
    image_ids: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    truths: Sequence[Truth],
    found: Sequence[Found | None],
    num_classes: int,
    masks: bool,
) -> Records:
    """What a batch of images gives for average precision; each row of a batch of its own.

    sizes: (height, width).  found: None for an image that only stands in, of weight 0.
    """
    rows = []
    for image_id, size, truth, mine in zip(image_ids, sizes, truths, found, strict=True):
        rows.append(b"" if mine is None else _record(image_id, size, truth, mine, masks))

    def finish(records: Sequence[bytes]) -> dict[str, float]:
        return all_scores(read_records(records), num_classes, masks)

    return Records(rows, finish)


def _record(image_id: int, size: tuple[int, int], truth: Truth, found: Found, masks: bool) -> bytes:
    finite = found.in_numbers
    if not finite:
        found = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), None, False)
    content: dict[str, Any] = {
        "image_id": int(image_id),
        "size": list(size),
        "finite": finite,
        "truth": {
            "boxes": truth["boxes"].tolist(), "classes": truth["classes"].tolist(), "crowd": truth["crowd"].tolist(),
            "area": truth["area"].tolist(), "masks": [_plain(each) for each in truth["masks"]] if masks else [],
        },
        "found": {
            "boxes": found.boxes.tolist(), "scores": found.scores.tolist(), "classes": found.classes.tolist(),
            "masks": [_plain(each) for each in found.masks or ()] if masks else [],
        },
    }  # fmt: skip
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def _plain(rle: Rle | None) -> Rle | None:
    if rle is None:
        return None
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


Image = dict[str, Any]
"""image_id, size, truth and found of an image, as a record holds them, and whether the model said numbers (finite)."""


def read_records(records: Sequence[bytes]) -> list[Image]:
    """The images, in the order of their numbers: the same whichever rank saw them."""
    found = [json.loads(each) for each in sorted(records)]
    return sorted(found, key=lambda image: int(image["image_id"]))


# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """Of boxes or of masks, in percent; nan where there is nothing to find, or an image of which no number was said."""

    scores: Mapping[str, float]
    """ap, ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10, ar100, ar_small, ar_medium, ar_large."""
    class_ap: np.ndarray
    """(classes,)"""
    class_ap50: np.ndarray
    """(classes,)"""
    precision: np.ndarray
    """(101, classes) at an overlap of 0.50, over recall from 0 to 1; nan for a class without objects."""


def all_scores(images: Sequence[Image], num_classes: int, masks: bool) -> dict[str, float]:
    """val/box_ap, val/box_ap50, ... and, with masks, val/mask_ap, ..."""
    found: dict[str, float] = {}
    for kind in (BOX, MASK) if masks else (BOX,):
        each = average_precision(images, num_classes, kind)
        found |= {f"val/{kind}_{name}": value for name, value in each.scores.items()}
    return found


def average_precision(images: Sequence[Image], num_classes: int, kind: str) -> AveragePrecision:
    """kind: box or mask.  Raises ConfigError where faster-coco-eval is not installed."""
    check_installed()
    from faster_coco_eval import COCO, COCOeval_faster

    known = [{"id": number, "height": each["size"][0], "width": each["size"][1]} for number, each in enumerate(images)]
    categories = [{"id": number, "name": str(number)} for number in range(num_classes)]
    truth = COCO({"images": known, "annotations": _truths(images, kind), "categories": categories})
    evaluation = COCOeval_faster(truth, truth.loadRes(_results(images, kind)), iouType=_KINDS[kind])
    evaluation.params.maxDets = list(_MOST)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.array(evaluation.eval["precision"], np.float64)  # (overlaps, recalls, classes, areas, most)
    recall = np.array(evaluation.eval["recall"], np.float64)  # (overlaps, classes, areas, most)
    precision[precision < 0], recall[recall < 0] = np.nan, np.nan
    if not all(image["finite"] for image in images):
        precision[:], recall[:] = np.nan, np.nan
    scores = {"ap": _mean(precision[..., 0, -1])}
    scores |= {f"ap{name}": _mean(precision[place, ..., 0, -1]) for name, place in (("50", 0), ("75", 5))}
    scores |= {f"ap{name}": _mean(precision[..., area, -1]) for area, name in enumerate(_AREAS) if area}
    scores |= {f"ar{most}": _mean(recall[..., 0, place]) for place, most in enumerate(_MOST)}
    scores |= {f"ar{name}": _mean(recall[..., area, -1]) for area, name in enumerate(_AREAS) if area}
    by_class = [precision[..., number, 0, -1] for number in range(num_classes)]
    return AveragePrecision(
        scores=scores,
        class_ap=np.array([_mean(each) for each in by_class]),
        class_ap50=np.array([_mean(each[0]) for each in by_class]),
        precision=100 * precision[0, :, :, 0, -1],
    )


def _mean(values: np.ndarray) -> float:
    """Of what is there, in percent."""
    known = values[~np.isnan(values)]
    return 100 * float(known.mean()) if known.size else float("nan")


def _truths(images: Sequence[Image], kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        truth = image["truth"]
        for place, box in enumerate(truth["boxes"]):
            row = {
                "id": len(rows) + 1, "image_id": number, "category_id": truth["classes"][place], "bbox": _sides(box),
                "area": truth["area"][place], "iscrowd": int(truth["crowd"][place]),
            }  # fmt: skip
            if kind == MASK:
                row["segmentation"] = truth["masks"][place]
                if row["segmentation"] is None:
                    row["iscrowd"], row["segmentation"] = 1, _box_mask(box, image["size"])
            rows.append(row)
    return rows


def _results(images: Sequence[Image], kind: str) -> list[dict[str, Any]]:
    rows = []
    for number, image in enumerate(images):
        found = image["found"]
        for place, box in enumerate(found["boxes"]):
            row = {
                "image_id": number, "category_id": found["classes"][place], "score": found["scores"][place]
            }  # fmt: skip
            if kind == MASK:
                row["segmentation"] = found["masks"][place]
            else:
                row["bbox"] = _sides(box)
            rows.append(row)
    return rows


def _sides(box: Sequence[float]) -> list[float]:
    """x, y, width, height"""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _box_mask(box: Sequence[float], size: Sequence[int]) -> Rle:
    from swinv2_train.data.mask_codes import encode_mask

    mask = np.zeros(size, bool)
    mask[int(box[1]) : int(np.ceil(box[3])), int(box[0]) : int(np.ceil(box[2]))] = True
    found = _plain(encode_mask(mask))
    assert found is not None, "a mask has run lengths"
    return found
