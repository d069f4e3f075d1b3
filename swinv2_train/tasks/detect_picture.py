"""Images with the boxes, masks and classes of their objects, the right ones beside the predicted ones with scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swinv2_train.data.mask_codes import decode_rle
from swinv2_train.report.pictures import grid
from swinv2_train.tasks.detections import Found
from swinv2_train.tasks.segment_picture import palette

SIDE_PX = 384
COLUMNS = ("right objects", "predicted objects and scores")
LEAST_SCORE = 0.3
"""Predictions of less are not drawn."""
_MOST_DRAWN = 60
_MASK_SHARE = 0.45
_NAME_CHARACTERS = 14


class Shown(NamedTuple):
    """Objects to draw, in pixels of the image."""

    boxes: np.ndarray
    """(N, 4): x0, y0, x1, y1."""
    classes: np.ndarray
    """(N,)"""
    scores: np.ndarray | None
    """(N,); None for what is known to be there."""
    masks: Sequence[np.ndarray | None]
    """bool (H, W) each; None without one, or empty where there are none."""


def seen_of(batch: dict[str, Any], number: int) -> tuple[Tensor, tuple[int, int]]:
    """The first view of an image of a batch, (C, h, w), and the (height, width) that its objects are of."""
    if "views" in batch:
        height, width = batch["size"][number]
        return torch.from_numpy(batch["views"][number][0]), (height, width)
    rows, columns = batch["extent"][number].tolist()
    return batch["images"][number][:, :rows, :columns], (rows, columns)


def right_objects(batch: dict[str, Any], number: int) -> Shown:
    """The right objects of an image of a batch of either kind."""
    if "truth" in batch:
        truth = batch["truth"][number]
        masks = [None if each is None else decode_rle(each, tuple(batch["size"][number])) for each in truth["masks"]]
        return Shown(truth["boxes"], truth["classes"], None, masks)
    there = batch["classes"][number] >= 0
    boxes, classes = (batch[name][number][there].cpu().numpy() for name in ("boxes", "classes"))
    rows, columns = batch["extent"][number].tolist()
    bits = batch["masks"][number][there].cpu().numpy() if "masks" in batch else ()
    return Shown(boxes, classes, None, [np.unpackbits(each, axis=1)[:rows, :columns].astype(bool) for each in bits])


def found_objects(found: Found) -> Shown:
    """What was found, to draw."""
    masks = [decode_rle(each, tuple(each["size"])) for each in found.masks or ()]
    return Shown(found.boxes, found.classes, found.scores, masks)


def enlarged(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, ...) -> (*size, ...), the nearest pixel's value."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(image.shape, size, strict=False))
    found: np.ndarray = image[rows][:, columns]
    return found


def detect_picture(rows: Sequence[tuple[np.ndarray, Shown, Shown]], names: Sequence[str] | None) -> np.ndarray:
    """rows: image uint8 (H, W, 3), its right and its predicted objects.  names: of the classes; None = their numbers.

    Each image is shown within 384 x 384 pixels.  Returns uint8 (H', W', 3).
    """
    shown = [[_framed(draw_objects(image, each, names)) for each in (right, said)] for image, right, said in rows]
    return grid(shown, COLUMNS)


def draw_objects(image: np.ndarray, objects: Shown, names: Sequence[str] | None) -> np.ndarray:
    """The image within 384 x 384 pixels and its objects over it: the most certain ones, else the largest, on top.

    image: uint8 (H, W, 3).  Returns uint8 (h, w, 3).
    """
    from PIL import Image, ImageDraw

    scale = SIDE_PX / max(image.shape[:2])
    size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    pixels = enlarged(image, size).astype(np.float32)
    order = _drawn(objects)
    colours = palette(int(objects.classes.max(initial=0)) + 1)
    for number in order:
        mask = objects.masks[number] if len(objects.masks) else None
        if mask is not None:
            inside = enlarged(mask, size)
            colour = colours[objects.classes[number]].astype(np.float32)
            pixels[inside] = (1 - _MASK_SHARE) * pixels[inside] + _MASK_SHARE * colour
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for number in order:
        colour = tuple(int(part) for part in colours[objects.classes[number]])
        x0, y0, x1, y1 = (float(value) * scale for value in objects.boxes[number])
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
        text = _text(objects, number, names)
        left, top, right, bottom = draw.textbbox((x0 + 2, max(0.0, y0 - 11)), text)
        draw.rectangle((left - 1, top, right + 1, bottom), fill=colour)
        draw.text((x0 + 2, max(0.0, y0 - 11)), text, fill=(255, 255, 255))
    return np.asarray(picture)


def _drawn(objects: Shown) -> list[int]:
    """Which objects, the first below the others."""
    if objects.scores is not None:
        order = np.argsort(objects.scores, kind="stable")
        order = order[objects.scores[order] >= LEAST_SCORE]
    else:
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        order = np.argsort(-sides[:, 0] * sides[:, 1], kind="stable")
    found: list[int] = order[-_MOST_DRAWN:].tolist()
    return found


def _text(objects: Shown, number: int, names: Sequence[str] | None) -> str:
    label = int(objects.classes[number])
    name = str(label) if names is None or label >= len(names) else names[label][:_NAME_CHARACTERS]
    name = name.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
    return name if objects.scores is None else f"{name} {objects.scores[number]:.2f}"


def _framed(image: np.ndarray) -> np.ndarray:
    """At the top left of a white square."""
    square = np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)
    square[: image.shape[0], : image.shape[1]] = image
    return square
