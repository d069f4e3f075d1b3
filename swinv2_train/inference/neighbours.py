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
from swinv2_train.tasks.inputs import picture_bands, viewable

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

    A query is no neighbour of its own; otherwise as most_alike.
    """
    return most_alike(features, np.array(features[queries], np.float32), count, queries)


def most_alike(features: np.ndarray, vectors: np.ndarray, count: int, own: np.ndarray | None = None) -> Neighbours:
    """The rows of features, (N, C), that have the largest cosine similarity with vectors, (Q, C).

    own: (Q,) the row that is no neighbour of each vector; None or none at all = there is none.  Nor is a row that is
    not finite; of equal ones the lower row comes first.  K is count, or less where there are not as many.  Blocks of
    rows are in memory at a time.
    """
    unit = F.normalize(torch.from_numpy(np.array(vectors, np.float32)), dim=1)
    parts = []
    for first in range(0, len(features), _ROWS_AT_ONCE):
        block = F.normalize(torch.from_numpy(np.array(features[first : first + _ROWS_AT_ONCE], np.float32)), dim=1)
        parts.append(unit @ block.T)
    similarities = torch.cat(parts, dim=1).nan_to_num(nan=-np.inf).numpy()  # (Q, N)
    if own is not None and len(own):
        similarities[np.arange(len(vectors)), own] = -np.inf
    count = min(count, int(np.isfinite(similarities).sum(axis=1).min()))
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    return Neighbours(order, np.take_along_axis(similarities, order, axis=1))


class Thumbnails:
    """Images of a source as small pictures, by their numbers; of a clip its middle frame."""

    def __init__(self, config: Config, source: Source) -> None:
        self._reader, self._bands, self._ends = source.open_reader(4), Bands.of(config), list(accumulate(source.counts))
        self._chosen = picture_bands(config)
        self._frames, self._decoder = config.model.frames, config.data.video_decoder

    def of(self, number: int) -> Any:
        """An image of Pillow's, its longer side 112 px.  Raises SampleError for one that cannot be read."""
        from PIL import Image, ImageOps

        sample = self._reader.read(*place_of(self._ends, number))
        if self._frames is not None:
            clip = open_clip(sample.image, sample.extension, sample.times, self._decoder)
            image = next(clip.frames([clip.num_frames // 2]))
        elif self._bands is None:
            image = decode_image(sample.image, sample.extension)
        else:
            image = decode_bands(sample.image, sample.extension, self._bands)
        shown = Image.fromarray(viewable(image, self._bands, self._chosen))
        small = max(shown.size) < _SIDE_PX
        how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC  # pixels of an icon are to be seen
        return ImageOps.contain(shown, (_SIDE_PX, _SIDE_PX), how)

    def key(self, number: int) -> str:
        """What the image is called."""
        return self._reader.key(*place_of(self._ends, number))

    def close(self) -> None:
        """Let go of the files."""
        self._reader.close()


def search_picture(
    config: Config, source: Source, queries: np.ndarray, neighbours: np.ndarray, similarities: np.ndarray
) -> Any:
    """A row for each query, (Q,) numbers of images: it, then its neighbours, (Q, K), with their similarities.  Of a
    clip its middle frame.

    Returns an image of Pillow's.
    """
    from PIL import Image, ImageDraw

    columns = 1 + neighbours.shape[1]
    size = (columns * (_SIDE_PX + _GAP_PX), len(queries) * (_SIDE_PX + _TEXT_PX + _GAP_PX))
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    thumbnails = Thumbnails(config, source)
    for row, (query, others, alike) in enumerate(zip(queries, neighbours, similarities, strict=True)):
        for column, number in enumerate([query, *others]):
            x, y = column * (_SIDE_PX + _GAP_PX), row * (_SIDE_PX + _TEXT_PX + _GAP_PX)
            canvas.paste(thumbnails.of(int(number)), (x, y + _TEXT_PX))
            draw.text((x + 2, y), "query" if column == 0 else f"{alike[column - 1]:.3f}", fill=(60, 60, 60))
    thumbnails.close()
    return canvas
