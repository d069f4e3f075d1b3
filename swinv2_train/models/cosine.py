"""The parts of scaled cosine attention that every way of computing it shares.

Legend: N tokens per window, h heads, d head dim, C = h*d channels; "..." stands for any leading dimensions of windows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.precision import at_least_float32
from swinv2_train.models.windows import relative_position_index


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


def window_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The bias of every pair of tokens of a window (rows, cols): ((2rows-1)(2cols-1), h) -> (h, N, N)."""
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
