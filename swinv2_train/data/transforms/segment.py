"""An image and the labels of its pixels, changed together: the published training views and what evaluation sees.

Labels are (H, W), uint8 or int32, and take the nearest pixel's value.  Random numbers come from the sample's generator
alone, in one order, and as many whatever comes of them.  Source: the training of Swin on ADE20K (mmsegmentation 0.11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.data.transforms.crop import resize as resize_antialiased
from swinv2_train.data.transforms.photometric import photometric_distortion

MOST_REDRAWS = 10
"""Of a crop that is mostly one class."""


@dataclass(frozen=True)
class SegmentTrainView:
    """Resize, crop, mirror, change of colours and padding, in this order.  Picklable."""

    size: tuple[int, int]
    """(height, width) of the view in pixels."""
    long_px: int
    """The image is fitted into long_px x short_px, times a number drawn between the two of `scale`."""
    short_px: int
    scale: tuple[float, float]
    resize: str
    """opencv or antialias, as resize_pair's."""
    max_share: float
    """A crop in which one class has this share of the labelled pixels is drawn again; 1 = the first is taken."""
    flip: float
    """Probability of the mirrored view."""
    dihedral: bool
    """Turn and mirror into one of eight directions first."""
    photometric: bool
    """Change colours; uint8 RGB alone."""
    ignore_index: int
    fill: tuple[float, ...]
    """The value of each band where the view reaches beyond the image: its mean, which is 0 when normalised."""

    def __call__(self, image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """image: (C, H, W), uint8 or float32 with NaN where nothing was measured.  labels: (H, W).

        Returns the view (C, *size), its labels *size, and int64 (2,), the height and width of the image in it: what
        lies below and right of these is padding, of ignore_index.
        """
        if self.dihedral:
            number = int(rng.integers(8))
            image, labels = turned(image, number), turned(labels, number)
        low, high = self.scale
        drawn = low + (high - low) * rng.random()
        fitted = fit_inside(labels.shape, int(self.long_px * drawn), int(self.short_px * drawn))
        labels = resize_labels(labels, fitted, self.resize)
        top, left = draw_crop(labels, self.size, self.max_share, self.ignore_index, rng)
        height, width = (min(side, crop) for side, crop in zip(fitted, self.size, strict=True))
        labels = labels[top : top + height, left : left + width]
        image = resize_image(image, fitted, self.resize)[:, top : top + height, left : left + width]
        if rng.random() < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.photometric:
            image = photometric_distortion(image, rng)
        image, labels = pad(image, labels, self.size, self.fill, self.ignore_index)
        return image, labels, torch.tensor([height, width])


def turned(values: Tensor, number: int) -> Tensor:
    """(..., H, W) in the direction `number` of eight, as random_dihedral (crop.py) counts them."""
    turned = values.rot90(number % 4, (-2, -1))
    return turned.flip(-2) if number >= 4 else turned


def fit_inside(size: Sequence[int], long_px: int, short_px: int) -> tuple[int, int]:
    """(height, width) of the largest image of the same shape within long_px x short_px, in either direction."""
    height, width = size
    scale = min(long_px / max(height, width), short_px / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """(C, H, W) -> (C, *size), bilinear.  uint8 stays uint8, any other type becomes float32; NaN spreads.

    how: opencv, four neighbours whatever the size, as OpenCV's INTER_LINEAR within a grey level; or antialias, all
    pixels that the result covers.
    """
    if how == "antialias":
        return resize_antialiased(image, size, "bilinear")
    if tuple(image.shape[-2:]) == tuple(size):
        return image if image.dtype == torch.uint8 else image.float()
    values = image.float().contiguous()[None]
    missing = values.isnan()
    resized = F.interpolate(values.masked_fill(missing, 0), size, mode="bilinear", align_corners=False)[0]
    if image.dtype == torch.uint8:
        return resized.add_(0.5).to(torch.uint8)
    if missing.any():
        reached = F.interpolate(missing.float(), size, mode="bilinear", align_corners=False)[0] > 0
        resized = resized.masked_fill_(reached, torch.nan)
    return resized


def resize_labels(labels: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """(H, W) -> size, the nearest pixel's value.  how: opencv, which rounds down (INTER_NEAREST), or antialias, the
    pixel under the centre.
    """
    rows, columns = (_nearest(old, new, how) for old, new in zip(labels.shape, size, strict=True))
    return labels[rows][:, columns]


def _nearest(old: int, new: int, how: str) -> Tensor:
    """int64 (new,): the pixel of `old` that each new one takes."""
    places = torch.arange(new)
    return places * old // new if how == "opencv" else (2 * places + 1) * old // (2 * new)


def draw_crop(
    labels: Tensor, size: tuple[int, int], max_share: float, ignore_index: int, rng: np.random.Generator
) -> tuple[int, int]:
    """(top, left) of a crop of `size` (h, w), or of less where labels, (H, W), are smaller.

    It is drawn again, at most MOST_REDRAWS times, until it has more than one class and the largest has less than
    max_share of the pixels that are not ignored; the last draw is taken as it is.
    """
    room = [max(side - crop, 0) + 1 for side, crop in zip(labels.shape, size, strict=True)]
    draws = rng.integers(room, size=(MOST_REDRAWS + 1, 2))  # all of them, so that what is drawn later does not move
    values = labels.numpy()
    for top, left in draws[:-1].tolist():
        if max_share >= 1 or _is_mixed(values[top : top + size[0], left : left + size[1]], max_share, ignore_index):
            return top, left
        if room == [1, 1]:
            break
    return int(draws[-1, 0]), int(draws[-1, 1])


def _is_mixed(labels: np.ndarray, max_share: float, ignore_index: int) -> bool:
    if labels.dtype == np.uint8:
        counts = np.bincount(labels.reshape(-1), minlength=ignore_index + 1)
        counts[ignore_index] = 0
        counts = counts[counts > 0]
    else:
        found, counts = np.unique(labels, return_counts=True)
        counts = counts[found != ignore_index]
    return len(counts) > 1 and bool(counts.max() / counts.sum() < max_share)


def pad(
    image: Tensor, labels: Tensor, size: tuple[int, int], fill: Sequence[float], ignore_index: int
) -> tuple[Tensor, Tensor]:
    """image (C, H, W) and labels (H, W), at the top left of `size`; around them fill (rounded in uint8), ignored."""
    height, width = labels.shape
    if (height, width) == tuple(size):
        return image, labels
    around = torch.full(size, ignore_index, dtype=labels.dtype)
    around[:height, :width] = labels
    return pad_image(image, size, fill), around


def pad_image(image: Tensor, size: tuple[int, int], fill: Sequence[float]) -> Tensor:
    """(C, h, w) at the top left of (C, *size); around it fill, rounded in uint8."""
    height, width = image.shape[1:]
    if (height, width) == tuple(size):
        return image
    values = torch.tensor(fill)
    values = values.round().to(torch.uint8) if image.dtype == torch.uint8 else values.to(image.dtype)
    padded = values.view(-1, 1, 1).expand(-1, *size).contiguous()
    padded[:, :height, :width] = image
    return padded


def eval_image(image: Tensor, long_px: int, short_px: int, how: str) -> Tensor:
    """The whole image fitted into long_px x short_px, (C, H, W) -> (C, h, w); its labels keep their size."""
    return resize_image(image, fit_inside(image.shape[-2:], long_px, short_px), how)
