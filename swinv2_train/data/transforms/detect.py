"""An image and its objects, changed together: crops of one size at a random scale, and whole images.

Boxes are x0, y0, x1, y1 in continuous pixels, (N, 4).  Random numbers come from the sample's generator alone, in one
order, and as many whatever comes of them.  Source: large-scale jitter of arXiv:2012.07177 section 3, by which Swin V2
was trained on COCO (arXiv:2111.09883 A2.1: 1536 px, scale 0.1 to 2.0); its order of changes is detectron2's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swinv2_train.data.mask_codes import decode_rle, polygons_mask
from swinv2_train.data.objects import Mask, Objects
from swinv2_train.data.transforms.segment import fit_inside, pad_image, resize_image, turned

IGNORED = 255
"""The label of a pixel that is not learnt from."""


class Cut(NamedTuple):
    """The way from an image to a view of it: turned, resized, cut out, mirrored.  Points and pixels take it alike."""

    size: tuple[int, int]
    """(height, width) of the image."""
    turn: int
    """The direction, of eight, as crop.random_dihedral counts them."""
    fitted: tuple[int, int]
    """(height, width) after the resize."""
    top: int
    left: int
    extent: tuple[int, int]
    """(height, width) of what is cut out of that."""
    mirrored: bool

    def points(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) of x, y in the image -> float64 in the view, also beyond its edges."""
        x, y = (points[..., axis].astype(np.float64) for axis in (0, 1))
        height, width = self.size
        for _ in range(self.turn % 4):  # a quarter to the left
            x, y, height, width = y, width - x, width, height
        if self.turn >= 4:
            y = height - y
        x = x * (self.fitted[1] / width) - self.left
        y = y * (self.fitted[0] / height) - self.top
        return np.stack([self.extent[1] - x if self.mirrored else x, y], axis=-1)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) -> float64 (N, 4), also beyond the view's edges."""
        corners = self.points(boxes.reshape(-1, 2, 2))
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    def image(self, image: Tensor, how: str) -> Tensor:
        """(C, H, W) -> (C, *extent).  how: of resize_image."""
        height, width = self.extent
        resized = resize_image(turned(image, self.turn), self.fitted, how)
        view = resized[:, self.top : self.top + height, self.left : self.left + width]
        return view.flip(-1) if self.mirrored else view

    def mask(self, mask: Mask) -> np.ndarray:
        """bool, of `extent`: polygons are drawn in the view itself; of pixels each takes the one under its centre."""
        height, width = self.extent
        if mask.rle is None:
            polygons = [self.points(each) for each in mask.polygons]
            corner = np.floor(np.min([each.min(axis=0) for each in polygons], axis=0))
            beyond = np.minimum(corner, 0).astype(int)  # drawn whole, for the rule rounds others than what is below 0
            drawn = polygons_mask([each - beyond for each in polygons], (height - beyond[1], width - beyond[0]))
            return drawn[-beyond[1] :, -beyond[0] :]
        return self.nearest(decode_rle(mask.rle, self.size))

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """(H, W) of the image -> `extent`: each pixel takes the value under its centre."""
        pixels = turned(torch.from_numpy(values.copy()), self.turn).numpy()
        rows, columns = (
            (2 * (np.arange(count) + first) + 1) * old // (2 * new)
            for first, count, old, new in zip(
                (self.top, self.left), self.extent, pixels.shape, self.fitted, strict=True
            )
        )
        found: np.ndarray = pixels[rows][:, columns]
        return found[:, ::-1] if self.mirrored else found


class View(NamedTuple):
    """What training sees of an image and its objects."""

    images: Tensor
    """(C, *size), as decoded."""
    extent: Tensor
    """int64 (2,): rows and columns that are of the image; the rest, below and to the right, is filled up."""
    boxes: Tensor
    """float32 (M, 4), 0 where there is no object."""
    classes: Tensor
    """int64 (M,), -1 where there is no object."""
    crowd: Tensor
    """bool (M,)"""
    masks: Tensor | None
    """uint8 (M, H, ceil(W / 8)), eight pixels in a byte, the first in its highest bit, all 0 where an object's mask is
    not known; None where masks are not asked for.
    """
    semantic: Tensor | None
    """uint8 (ceil(H / s), ceil(W / s)) for cells of s x s pixels: the label of the pixel in the middle of each, IGNORED
    beyond the image; None where it is not asked for.
    """
    left_out: int
    """Objects that are more than M."""


@dataclass(frozen=True)
class DetectTrainView:
    """Turn, resize, cut out, mirror and fill up, in this order.  Picklable."""

    size: tuple[int, int]
    """(height, width) of the view in pixels."""
    scale: tuple[float, float]
    """The image is fitted into `size` times a number drawn between these two."""
    resize: str
    """opencv or antialias, as resize_image's."""
    flip: float
    """Probability of the mirrored view."""
    dihedral: bool
    """Turn and mirror into one of eight directions first."""
    max_objects: int
    """M; where a view holds more, the largest are kept."""
    min_object_px: float
    """An object of which less than this is left, in either direction, is left out."""
    masks: bool
    fill: tuple[float, ...]
    """The value of each band where the view reaches beyond the image: its mean, which is 0 when normalised."""

    cell: int = 8
    """s, the pixels between two labels."""

    def __call__(
        self, image: Tensor, objects: Objects, rng: np.random.Generator, labels: np.ndarray | None = None
    ) -> View:
        """image: (C, H, W), uint8 or float32 with NaN where nothing was measured; objects: of that very size; labels:
        uint8 (H, W), of its pixels, where they are asked for.

        Raises SampleError for masks that cannot be drawn.
        """
        cut = self.draw((image.shape[1], image.shape[2]), rng)
        placed = cut.boxes(objects.boxes)
        boxes = _clipped(placed, cut.extent)
        kept = np.flatnonzero(_remains(boxes, self.min_object_px))
        bits = np.zeros((0, cut.extent[0], -(-cut.extent[1] // 8)), np.uint8)
        if self.masks:
            boxes, kept, bits = self._drawn(cut, objects, placed, boxes, kept)
        left_out = max(len(kept) - self.max_objects, 0)
        if left_out:
            kept, bits = _largest(boxes, kept, bits, self.max_objects)
        semantic = None if labels is None else self._cells(cut.nearest(labels))
        return self._view(cut.image(image, self.resize), cut.extent, objects, boxes, kept, bits, left_out, semantic)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Cut:
        """How an image of this size (height, width) is seen."""
        turn = int(rng.integers(8)) if self.dihedral else 0
        low, high = self.scale
        drawn = low + (high - low) * rng.random()
        place, mirrored = rng.random(2), bool(rng.random() < self.flip)
        seen = size[::-1] if turn % 2 else size
        fitted = _fitted(seen, (self.size[0] * drawn, self.size[1] * drawn))
        extent = (min(fitted[0], self.size[0]), min(fitted[1], self.size[1]))
        top, left = (int(each * (side - cut + 1)) for each, side, cut in zip(place, fitted, extent, strict=True))
        return Cut((size[0], size[1]), turn, fitted, top, left, extent, mirrored)

    def _drawn(
        self, cut: Cut, objects: Objects, placed: np.ndarray, boxes: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The boxes, those of objects that the view's edges cut around what is left; the objects that are kept; and
        their masks, uint8 (n, h, ceil(w / 8)), empty where an object's mask is not known.
        """
        boxes, drawn, still = boxes.copy(), [], []
        for number in kept.tolist():
            mask = objects.masks[number]
            pixels = np.zeros(cut.extent, bool) if mask is None else cut.mask(mask)
            if mask is not None and (boxes[number] != placed[number]).any():
                boxes[number] = _bounds(pixels, boxes[number])
            if mask is None or (_remains(boxes[number : number + 1], self.min_object_px)[0] and pixels.any()):
                drawn.append(np.packbits(pixels, axis=1))
                still.append(number)
        shape = (len(drawn), cut.extent[0], -(-cut.extent[1] // 8))
        return boxes, np.array(still, np.int64), np.array(drawn, np.uint8).reshape(shape)

    def _cells(self, labels: np.ndarray) -> Tensor:
        """Those in the middle of each cell."""
        rows, columns = (-(-side // self.cell) * self.cell for side in self.size)
        whole = np.full((rows, columns), IGNORED, np.uint8)
        whole[: labels.shape[0], : labels.shape[1]] = labels
        middle = self.cell // 2
        return torch.from_numpy(whole[middle :: self.cell, middle :: self.cell].copy())

    def _view(
        self, image: Tensor, extent: tuple[int, int], objects: Objects, boxes: np.ndarray, kept: np.ndarray,
        bits: np.ndarray, left_out: int, semantic: Tensor | None,
    ) -> View:  # fmt: skip
        count, most = len(kept), self.max_objects
        padded = np.zeros((most, 4), np.float32)
        padded[:count] = boxes[kept]
        classes, crowd = np.full(most, -1, np.int64), np.zeros(most, bool)
        classes[:count], crowd[:count] = objects.classes[kept], objects.crowd[kept]
        masks = None
        if self.masks:
            padded_bits = np.zeros((most, self.size[0], -(-self.size[1] // 8)), np.uint8)
            padded_bits[:count, : extent[0], : bits.shape[2]] = bits
            masks = torch.from_numpy(padded_bits)
        return View(
            pad_image(image, self.size, self.fill).contiguous(), torch.tensor(extent), torch.from_numpy(padded),
            torch.from_numpy(classes), torch.from_numpy(crowd), masks, semantic, left_out,
        )  # fmt: skip


def _fitted(size: tuple[int, int], room: tuple[float, float]) -> tuple[int, int]:
    """(height, width) of the largest image of this shape within a room of (height, width)."""
    scale = min(room[0] / size[0], room[1] / size[1])
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def _clipped(boxes: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
    limits = np.array([extent[1], extent[0]] * 2, np.float64)
    found: np.ndarray = np.clip(boxes, 0, limits)
    return found


def _remains(boxes: np.ndarray, least_px: float) -> np.ndarray:
    """bool (N,): whether there is as much of a box in both directions."""
    found: np.ndarray = ((boxes[:, 2:] - boxes[:, :2]) >= least_px).all(axis=1)
    return found


def _bounds(pixels: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """The box around a mask; `otherwise` where it is empty."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return otherwise
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _largest(boxes: np.ndarray, kept: np.ndarray, bits: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The objects of the largest boxes, in their order, and their masks where there are any."""
    sides = boxes[kept, 2:] - boxes[kept, :2]
    chosen = np.sort(np.argsort(-sides[:, 0] * sides[:, 1], kind="stable")[:most])
    return kept[chosen], bits[chosen] if len(bits) else bits


def eval_views(image: Tensor, long_px: int, short_px: int, scales: Sequence[float], how: str) -> list[np.ndarray]:
    """The whole image fitted into long_px x short_px times each of the scales: (C, h, w) each."""
    sides = [(int(long_px * each), int(short_px * each)) for each in scales]
    return [resize_image(image, fit_inside(image.shape[-2:], *each), how).numpy() for each in sides]
