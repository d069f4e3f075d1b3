"""Numbers of a map's places drawn over their image: uint8 (H, W, 3) in, small pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from swinv2_train.inspection.attention import Attention

IMAGE_PX = 224
"""The longer side of a picture of the whole image."""
TILE_PX, HEAD_PX = 132, 72
"""Of a query's attention: its mean over the heads, and one head."""
_GAP_PX = 3
_RAMP = np.array([(40, 14, 84), (133, 32, 107), (214, 65, 62), (250, 146, 37), (252, 241, 150)], np.float64)
"""From the lowest to the highest number; lightness rises throughout."""
_QUERY = (0, 229, 255)
_LEAST_PX = 7
"""Of a query's frame."""
_DIM = 0.28
"""How much light is left of what a query does not look at."""


class View(NamedTuple):
    """A part of a map, in tokens."""

    top: int
    left: int
    height: int
    width: int


def colours_of(shares: np.ndarray) -> np.ndarray:
    """Shares of the highest number, (...) in 0..1, as colours, float64 (..., 3)."""
    at = np.clip(shares, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(at.astype(np.int64), len(_RAMP) - 2)
    return _RAMP[low] + (at - low)[..., None] * (_RAMP[low + 1] - _RAMP[low])


def warmed(image: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """An image under the colours of shares of its own size, (H, W): the more of them, the higher a share is."""
    opaque = (0.25 + 0.6 * np.clip(shares, 0, 1))[..., None]
    return (image * (1 - opaque) + colours_of(shares) * opaque).round().astype(np.uint8)


def view_of(attention: Attention) -> View:
    """The part of the map around a query's reach: twice the window, so that what lies outside can be seen."""
    rows, columns = (np.flatnonzero(attention.reach.any(dim=axis).numpy()) for axis in (1, 0))
    starts, lengths = [], []
    for reached, side, window in zip((rows, columns), attention.grid.size, attention.grid.window, strict=True):
        length = min(side, 2 * window)
        middle = (int(reached[0]) + int(reached[-1]) + 1) // 2
        starts.append(min(max(0, middle - length // 2), side - length))
        lengths.append(length)
    return View(*starts, *lengths)


def attention_picture(image: np.ndarray, attention: Attention, weights: np.ndarray, token_px: int, side: int) -> Any:
    """Weights, (h', w') over the map, over the view of a query: dim and grey where it never looks, its reach framed in
    white, itself in cyan.

    token_px: pixels of the image for a token.  side: the picture's longer side.  Returns an image of Pillow's.
    """
    from PIL import ImageDraw

    view = view_of(attention)
    seen = _cut(image, view, token_px)
    scale = side / max(view.height, view.width)
    size = (max(1, round(view.height * scale)), max(1, round(view.width * scale)))
    part = (slice(view.top, view.top + view.height), slice(view.left, view.left + view.width))
    shown = np.asarray(_resized(seen, size)).astype(np.float64)
    shares, reach = (
        _nearest(each[part], size) for each in (weights / max(weights.max(), 1e-12), attention.reach.numpy())
    )
    dim = np.broadcast_to(shown.mean(axis=2, keepdims=True) * _DIM, shown.shape)
    picture = _pillow(np.where(reach[..., None], warmed(shown, shares), dim).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    rows, columns = np.nonzero(attention.reach.numpy()[part])
    _frame(draw, rows.min(), columns.min(), rows.max() + 1, columns.max() + 1, scale, (255, 255, 255), 1)
    row, column = attention.query[0] - view.top, attention.query[1] - view.left
    more = max(0.0, (_LEAST_PX / scale - 1) / 2)  # around a token that would not be seen
    _frame(draw, row - more, column - more, row + 1 + more, column + 1 + more, scale, _QUERY, 2 if scale > 5 else 1)
    return picture


def heads_picture(image: np.ndarray, block: Sequence[Attention], token_px: int) -> Any:
    """Each query's attention in each head: a row for a query, a column for a head."""
    rows = [
        [attention_picture(image, each, head.numpy(), token_px, HEAD_PX) for head in each.weights] for each in block
    ]
    width, height = rows[0][0].size
    canvas = _pillow(np.full((len(rows) * (height + _GAP_PX), len(rows[0]) * (width + _GAP_PX), 3), 128, np.uint8))
    for at, row in enumerate(rows):
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * (width + _GAP_PX), at * (height + _GAP_PX)))
    return canvas


def activation_picture(image: np.ndarray, activation: np.ndarray, token_px: int) -> Any:
    """A map of numbers, (h', w'), not negative, over the whole image, smoothly; its highest is the hottest."""
    from PIL import Image

    height, width = image.shape[:2]
    size = _within(height, width, IMAGE_PX)
    shares = Image.fromarray((activation / max(activation.max(), 1e-12)).astype(np.float32))
    box = (0, 0, width / token_px, height / token_px)  # a map may reach beyond the image
    smooth = np.asarray(shares.resize(size[::-1], Image.Resampling.BILINEAR, box=box))
    return _pillow(warmed(np.asarray(_resized(image, size)).astype(np.float64), smooth))


def query_picture(image: np.ndarray, queries: Sequence[Sequence[float]]) -> Any:
    """The image with the places of the queries, numbered from 1."""
    from PIL import ImageDraw

    size = _within(image.shape[0], image.shape[1], TILE_PX)
    picture = _resized(image, size)
    draw = ImageDraw.Draw(picture)
    for number, (down, right) in enumerate(queries, start=1):
        x, y = min(right * size[1], size[1] - 8), min(down * size[0], size[0] - 8)
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=(10, 30, 40), outline=_QUERY, width=2)
        draw.text((x, y), str(number), fill=(255, 255, 255), anchor="mm", font_size=11)
    return picture


def plain_picture(image: np.ndarray) -> Any:
    """The image alone, cut down."""
    return _resized(image, _within(image.shape[0], image.shape[1], IMAGE_PX))


def _within(height: int, width: int, side: int) -> tuple[int, int]:
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _cut(image: np.ndarray, view: View, token_px: int) -> np.ndarray:
    """The pixels of a part of a map, black beyond the image."""
    top, left = view.top * token_px, view.left * token_px
    part = image[top : top + view.height * token_px, left : left + view.width * token_px]
    below, right = view.height * token_px - part.shape[0], view.width * token_px - part.shape[1]
    return np.pad(part, ((0, below), (0, right), (0, 0)))


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(values.shape, size, strict=True))
    return values[rows][:, columns]


def _resized(image: np.ndarray, size: tuple[int, int]) -> Any:
    from PIL import Image

    much = min(size) > 4 * min(image.shape[:2])  # so that pixels can be seen
    return _pillow(image).resize(size[::-1], Image.Resampling.NEAREST if much else Image.Resampling.BICUBIC)


def _pillow(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image))


def _frame(
    draw: Any,
    top: float,
    left: float,
    bottom: float,
    right: float,
    scale: float,
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """A frame just inside of tokens."""
    draw.rectangle((left * scale, top * scale, right * scale - 1, bottom * scale - 1), outline=colour, width=width)
