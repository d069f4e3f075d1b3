"""The parts of scaled cosine attention that every way of computing it shares.

Legend: N tokens per window, h heads, d head dim, C = h*d channels; "..." stands for any leading dimensions of windows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.precision import at_least_float32
from swinv2_train.models.windows import (
    Axes,
    WindowGrid,
    attention_mask,
    cut_windows,
    join_windows,
    relative_position_index,
)


def unit_vectors(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, computed in at least float32 and returned in x's dtype; zero stays zero.

    In float16 the official lower bound of the length, 1e-12, would be 0, and padding (keys have no bias) become NaN.
    """
    return F.normalize(at_least_float32(x), dim=-1).to(x.dtype)


def split_heads(windows: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projected windows (..., N, 3C) of channel order (3, h, d) -> queries, keys, values (..., h, N, d)."""
    heads = windows.view(*windows.shape[:-1], 3, num_heads, -1)
    q, k, v = heads.transpose(-4, -2).unbind(-3)
    return q, k, v


def join_heads(x: Tensor) -> Tensor:
    """(..., h, N, d) -> (..., N, C)."""
    return x.transpose(-3, -2).flatten(-2)


def window_bias(table: Tensor, window: Axes) -> Tensor:
    """The bias of every pair of tokens of a window, from that of every offset: (offsets, h) -> (h, N, N)."""
    index = relative_position_index(window, table.device)
    tokens = index.shape[0]
    return table[index.flatten()].t().reshape(-1, tokens, tokens)  # indexing: its gradient is deterministic on CUDA


def attention_weights(unit_q: Tensor, unit_k: Tensor, scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T scale + bias + mask) over the keys: (..., h, N, N) in the dtype of scale, at least float32.

    unit_q, unit_k: (..., h, N, d), multiplied in their own dtype.  scale: (h, 1, 1).  bias: (h, N, N).
    mask: additive, (..., 1, N, N) of the same or fewer leading dimensions, or None.
    """
    logits = (unit_q @ unit_k.transpose(-2, -1)) * scale  # at least float32: scale promotes
    logits += bias  # in place: neither sum is needed in the backward pass
    if mask is not None:
        logits += mask
    return logits.softmax(dim=-1)


def window_attention(qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, num_heads: int) -> Tensor:
    """Attention in all windows of a map at once: the reference that every other way of computing it must equal.

    qkv: (B, H, W, 3C), of a clip (B, T, H, W, 3C), the projected map, channel order (3, h, d).  scale: (h, 1, 1) and
    table: (num_offsets(grid.window), h), both at least float32.  Returns (B, H, W, C), a clip's (B, T, H, W, C), in
    the dtype of qkv.
    Padding is zeros, which no token of the map looks at.
    """
    windows = cut_windows(qkv, grid)  # (B*nW, N, 3C)
    windows = windows.view(qkv.shape[0], -1, *windows.shape[1:])  # (B, nW, N, 3C)
    q, k, v = split_heads(windows, num_heads)  # (B, nW, h, N, d)
    mask = attention_mask(grid, qkv.device).unsqueeze(1) if grid.needs_mask else None  # (nW, 1, N, N)
    weights = attention_weights(unit_vectors(q), unit_vectors(k), scale, window_bias(table, grid.window), mask)
    out = join_windows(join_heads(weights.to(v.dtype) @ v).flatten(0, 1), grid)
    return out.contiguous()  # of a view, a linear layer adds its bias to the already rounded product
