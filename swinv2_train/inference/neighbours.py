"""The images whose features are most alike, and a picture of them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from swinv2_train.config import Config
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.loading.listed import place_of
from swinv2_train.data.sources.base import Source
from swinv2_train.data.transforms.bands import Bands, decode_bands
from swinv2_train.data.transforms.decode import decode_image
from swinv2_train.tasks.inputs import viewable

_ROWS_AT_ONCE = 65536
_SIDE_PX, _GAP_PX, _TEXT_PX = 112, 4, 14


class Neighbours(NamedTuple):
    """Of Q queries, K each, the most alike first."""

    places: np.ndarray
    """(Q, K) int64, rows of the features."""
    similarities: np.ndarray
    """(Q, K) float32: cosines."""


def nearest(features: np.ndarray, queries: np.ndarray, count: int) -> Neighbours:
    """The rows of features, (N, C), that have the largest cosine similarity with rows of these numbers.

    A query is no neighbour of its own, nor is a row that is not finite; of equal ones the lower row comes first.  K is
    count, or less where there are not as many.  Blocks of rows are in memory at a time.
    """
    unit = F.normalize(torch.from_numpy(np.array(features[queries], np.float32)), dim=1)
    parts = []
    for first in range(0, len(features), _ROWS_AT_ONCE):
        block = F.normalize(torch.from_numpy(np.array(features[first : first + _ROWS_AT_ONCE], np.float32)), dim=1)
        parts.append(unit @ block.T)
    similarities = torch.cat(parts, dim=1).nan_to_num(nan=-np.inf).numpy()  # (Q, N)
    similarities[np.arange(len(queries)), queries] = -np.inf
    count = min(count, int(np.isfinite(similarities).sum(axis=1).min()))
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    return Neighbours(order, np.take_along_axis(similarities, order, axis=1))


def search_picture(
    config: Config, source: Source, queries: np.ndarray, neighbours: np.ndarray, similarities: np.ndarray
) -> Any:
    """A row for each query, (Q,) numbers of images: it, then its neighbours, (Q, K), with their similarities.  Of a
    clip its middle frame.

    Returns an image of Pillow's.
    """
    from PIL import Image, ImageDraw, ImageOps

    columns = 1 + neighbours.shape[1]
    size = (columns * (_SIDE_PX + _GAP_PX), len(queries) * (_SIDE_PX + _TEXT_PX + _GAP_PX))
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    reader, bands, ends = source.open_reader(4), Bands.of(config), list(accumulate(source.counts))
    chosen = config.data.picture_bands or (range(3) if config.model.in_chans >= 3 else (0,))
    for row, (query, others, alike) in enumerate(zip(queries, neighbours, similarities, strict=True)):
        for column, number in enumerate([query, *others]):
            sample = reader.read(*place_of(ends, int(number)))
            if config.model.frames is not None:
                clip = open_clip(sample.image, sample.extension, sample.times, config.data.video_decoder)
                image = next(clip.frames([clip.num_frames // 2]))
            elif bands is None:
                image = decode_image(sample.image, sample.extension)
            else:
                image = decode_bands(sample.image, sample.extension, bands)
            shown = Image.fromarray(viewable(image, bands, chosen))
            small = max(shown.size) < _SIDE_PX
            how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC  # pixels of an icon are to be seen
            shown = ImageOps.contain(shown, (_SIDE_PX, _SIDE_PX), how)
            x, y = column * (_SIDE_PX + _GAP_PX), row * (_SIDE_PX + _TEXT_PX + _GAP_PX)
            canvas.paste(shown, (x, y + _TEXT_PX))
            draw.text((x + 2, y), "query" if column == 0 else f"{alike[column - 1]:.3f}", fill=(60, 60, 60))
    reader.close()
    return canvas
