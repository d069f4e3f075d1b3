"""What a token attends to: no way of computing attention keeps its weights, so those of a few queries come anew.

Legend: M tokens of a map, N of a window, h heads, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.cosine import attention_weights, split_heads, unit_vectors, window_bias
from swinv2_train.models.swin_v2 import Stage, SwinBlock
from swinv2_train.models.windows import Axes, WindowGrid, region_mask, window_regions, window_tokens


class BlockPlace(NamedTuple):
    """A block of an encoder; both numbers count from 0."""

    stage: int
    block: int


class Attention(NamedTuple):
    """What one token of one image's map attends to in a block."""

    place: BlockPlace
    grid: WindowGrid
    query: Axes
    """The token's place on the map."""
    weights: Tensor
    """(h, ...) over the axes of the map, float32 on the CPU: each head's add up to 1, and are 0 out of reach."""
    reach: Tensor
    """(...) bool: the tokens at which the query looks, of its window those that no shift has brought from elsewhere.

    Others of the window have a weight of e^-100 (the official mask), or exactly 0 where they are padding.
    """


class WindowWeights(NamedTuple):
    """What one query attends to, by the tokens of its window."""

    weights: Tensor
    """(h, N), at least float32"""
    values: Tensor
    """(h, N, d)"""
    tokens: Tensor
    """(N,) int64: rows of the flattened map, -1 for padding."""
    reached: Tensor
    """(N,) bool"""


def query_weights(attention: WindowAttention, x: Tensor, grid: WindowGrid, query: int) -> WindowWeights:
    """The attention of one token in all heads, by the formula (arXiv:2111.09883 equations 2 and 3) in float32.

    x: (1, ..., C), the map that the module is given; query: a row of the flattened map.  Only the query's window is
    computed: N rows of queries, keys and values, and h x N weights.
    """
    tokens = window_tokens(grid, x.device)
    window, place = (int(each) for each in (tokens == query).nonzero()[0])
    rows = tokens[window]
    padding = (rows < 0).unsqueeze(1)
    qkv = attention.projected(x.reshape(-1, x.shape[-1])[rows.clamp(min=0)]).float().masked_fill(padding, 0)
    q, k, v = split_heads(qkv, attention.num_heads)  # (h, N, d)
    bias = window_bias(attention.position_table(grid.window, x.device), grid.window)  # (h, N, N)
    mask = region_mask(window_regions(grid, x.device)[window : window + 1], len(grid.size))[0, place]  # (N,)
    one = slice(place, place + 1)
    weights = attention_weights(unit_vectors(q[:, one]), unit_vectors(k), attention.scale(), bias[:, one], mask)
    return WindowWeights(weights[:, 0], v, rows, mask == 0)


def on_map(found: WindowWeights, place: BlockPlace, grid: WindowGrid, query: int) -> Attention:
    """What is known by tokens of a window, by places of the map."""
    length, real = math.prod(grid.size), found.tokens >= 0
    weights = found.weights.new_zeros(len(found.weights), length)
    weights[:, found.tokens[real]] = found.weights[:, real]
    reach = torch.zeros(length, dtype=torch.bool, device=weights.device)
    reach[found.tokens[found.reached]] = True
    return Attention(
        place, grid, unravelled(query, grid.size), weights.view(-1, *grid.size).float().cpu(),
        reach.view(grid.size).cpu(),
    )  # fmt: skip


@torch.no_grad()
def attention_of(
    encoder: SwinTransformerV2,
    run: Callable[[], Any],
    places: Sequence[BlockPlace],
    queries: Sequence[Sequence[float]],
) -> list[list[Attention]]:
    """What queries attend to in some blocks while run() has the encoder see one image: a list for each block.

    queries: shares of the height and of the width, 0 to 1 each; of clips those of time come first.
    """
    found: dict[BlockPlace, list[Attention]] = {}

    def watch(place: BlockPlace, attention: WindowAttention, x: Tensor, grid: WindowGrid) -> None:
        tokens = [token_at(query, grid.size) for query in queries]
        found[place] = [on_map(query_weights(attention, x, grid, each), place, grid, each) for each in tokens]

    with _watching(encoder, places, watch):
        run()
    return [found[place] for place in places]


@contextmanager
def _watching(
    encoder: SwinTransformerV2,
    places: Sequence[BlockPlace],
    watch: Callable[[BlockPlace, WindowAttention, Tensor, WindowGrid], None],
) -> Iterator[None]:
    """watch is called with what the attention of each of these blocks is given."""
    handles = []
    for place in places:
        block = block_at(encoder, place)

        def hook(module: Any, given: tuple[Any, ...], place: BlockPlace = place) -> None:
            watch(place, module, *given[:2])  # the third says how it is computed

        handles.append(block.attn.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_at(encoder: SwinTransformerV2, place: BlockPlace) -> SwinBlock:
    """The block itself."""
    stage = encoder.layers[place.stage]
    assert isinstance(stage, Stage)
    block = stage.blocks[place.block]
    assert isinstance(block, SwinBlock)
    return block


def last_pairs(depths: Sequence[int]) -> list[BlockPlace]:
    """The last two blocks of each stage: one with its windows in place, one with them shifted."""
    return [BlockPlace(stage, block) for stage, depth in enumerate(depths) for block in range(max(0, depth - 2), depth)]


def token_at(query: Sequence[float], size: Axes) -> int:
    """The row of a flattened map at a place given as shares of its axes."""
    found = 0
    for share, length in zip(query, size, strict=True):
        found = found * length + min(int(share * length), length - 1)
    return found


def unravelled(row: int, size: Axes) -> Axes:
    """The place on a map of a row of the flattened one."""
    place: list[int] = []
    for length in reversed(size):
        row, at = divmod(row, length)
        place.insert(0, at)
    return tuple(place)
