"""Window attention a few windows at a time (arXiv:2111.09883 section 3.5), so that memory does not grow with the map.

Taking turns alone saves nothing in training, because every turn's softmax waits for the backward pass.  So the forward
pass keeps its inputs only, and the backward pass computes each chunk's attention again.

Legend: B batch, H W tokens per side (T H W of a clip), C channels, nW windows per map, n windows per chunk,
N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinv2_train.models.cosine import attention_weights, join_heads, split_heads, unit_vectors, window_bias
from swinv2_train.models.precision import at_least_float32, without_autocast
from swinv2_train.models.windows import WindowGrid, region_mask, window_regions, window_tokens


class Chunks(NamedTuple):
    """How many windows a chunk holds: that many windows of the whole batch, or as many as mib MiB allow.

    Counted are a chunk's tensors of N x N: the attention weights and their gradient (n, h, N, N) in float32 (float64
    in a float64 model), a third such tensor in the dtype of the weights where that is narrower, and the mask (n, N, N).
    Beside them a call holds the bias (h, N, N) and, in the backward pass, its gradient, however few windows there are.
    """

    windows: int | None
    mib: float

    def windows_at_a_time(self, grid: WindowGrid, num_heads: int, dtype: torch.dtype) -> int:
        """Windows per chunk, at least one.  dtype: of the projected map."""
        if self.windows is not None:
            return self.windows
        pairs = math.prod(grid.window) ** 2
        wide = max(dtype.itemsize, 4)
        a_window = num_heads * pairs * (2 * wide + (dtype.itemsize if dtype.itemsize < wide else 0))
        if grid.needs_mask:
            a_window += pairs * 4
        return max(1, int(self.mib * 2**20) // a_window)


def sequential_window_attention(
    qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, num_heads: int, chunk_windows: int
) -> Tensor:
    """What :func:`swinv2_train.models.attention.window_attention` computes, chunk_windows windows at a time.

    qkv: (B, H, W, 3C), of a clip (B, T, H, W, 3C), the projected map, channel order (3, h, d), multiplied in its own
    dtype, also under autocast.  scale: (h, 1, 1) and table: (num_offsets(grid.window), h), both at least float32.
    chunk_windows: of the whole batch, 1 or more; it need not divide their number.  Returns (B, H, W, C), a clip's
    (B, T, H, W, C), in the dtype of qkv.
    Has no second derivative: asking for one is a RuntimeError.
    """
    out: Tensor = _Sequential.apply(qkv, scale, table, grid, num_heads, chunk_windows)
    return out


class _Sequential(torch.autograd.Function):
    """Gradients are written into one buffer for qkv, and summed in the dtype of scale for scale and table."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, num_heads: int, chunk_windows: int
    ) -> Tensor:
        ctx.save_for_backward(qkv, scale, table)
        ctx.grid, ctx.num_heads, ctx.chunk_windows = grid, num_heads, chunk_windows
        rows = qkv.flatten(0, -2)  # (B*H*W, 3C)
        out = _buffer(rows, rows.shape[1] // 3, grid)
        with without_autocast(qkv.device):
            bias = window_bias(table, grid.window)
            for chunk in _chunks(qkv, grid, chunk_windows):
                chunk.write(out, _attend(chunk.read(rows), scale, bias, chunk.mask, num_heads))
                del chunk  # or its mask would still be there when the next is made
        return out[: len(rows)].view(*qkv.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scale, table = ctx.saved_tensors
        grid, num_heads = ctx.grid, ctx.num_heads
        rows, d_out = qkv.flatten(0, -2), d_out.flatten(0, -2)  # (B*H*W, 3C), (B*H*W, C)
        d_rows = _buffer(rows, rows.shape[1], grid)
        d_scale = torch.zeros_like(scale)
        with without_autocast(qkv.device), torch.enable_grad():
            leaf = table.detach().requires_grad_()
            bias = window_bias(leaf, grid.window)
        d_bias = torch.zeros_like(bias)
        with without_autocast(qkv.device):
            for chunk in _chunks(qkv, grid, ctx.chunk_windows):
                d_windows, d_scale_part, d_bias_part = _gradients(
                    chunk.read(d_out), chunk.read(rows), scale, bias.detach(), chunk.mask, num_heads
                )
                chunk.write(d_rows, d_windows)
                d_scale += d_scale_part
                d_bias += d_bias_part
                del chunk, d_windows, d_bias_part
            (d_table,) = torch.autograd.grad(bias, leaf, d_bias)
        return d_rows[: len(rows)].view_as(qkv), d_scale, d_table, None, None, None


def _attend(windows: Tensor, scale: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """Attention in the windows of a chunk: (n, N, 3C) -> (n, N, C)."""
    q, k, v = split_heads(windows, num_heads)  # (n, h, N, d)
    weights = attention_weights(unit_vectors(q), unit_vectors(k), scale, bias, mask)
    return join_heads(weights.to(v.dtype) @ v)


def _gradients(
    d_out: Tensor, windows: Tensor, scale: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of windows (n, N, 3C), scale (h, 1, 1) and bias (h, N, N) from that of _attend's output.

    Of what is (n, h, N, N), the weights and one gradient are there, written over in place, and a copy of one of them in
    the dtype of windows where that is narrower; each goes as soon as it has been used.
    """
    q, k, v = split_heads(windows, num_heads)  # (n, h, N, d)
    d_out = d_out.view(*q.transpose(1, 2).shape).transpose(1, 2)  # (n, h, N, d)
    unit_q, unit_k = unit_vectors(q), unit_vectors(k)
    weights = attention_weights(unit_q, unit_k, scale, bias, mask)  # (n, h, N, N)
    d_v = weights.to(v.dtype).transpose(-2, -1) @ d_out
    d_logits = (d_out @ v.transpose(-2, -1)).to(weights.dtype)
    d_logits *= weights  # the softmax's backward
    d_logits.addcmul_(weights, d_logits.sum(dim=-1, keepdim=True), value=-1)
    del weights
    d_bias = d_logits.sum(dim=0)
    d_cosine = d_logits.to(v.dtype)  # but for the scale
    del d_logits
    d_unit_q = at_least_float32(d_cosine @ unit_k)
    d_unit_k = at_least_float32(d_cosine.transpose(-2, -1) @ unit_q)
    del d_cosine
    d_scale = (d_unit_q * unit_q).sum(dim=(0, 2, 3)).view_as(scale)  # of d_logits * cosines, summed over keys first
    d_q, d_k = _through_length(q, d_unit_q * scale), _through_length(k, d_unit_k * scale)
    d_heads = torch.stack((d_q, d_k, d_v), dim=-3)  # (n, h, 3, N, d)
    return d_heads.permute(0, 3, 2, 1, 4).flatten(2), d_scale, d_bias


class _Chunk(NamedTuple):
    """Some windows of a batch: where their tokens are among the map's rows, and what may look at what."""

    places: Tensor
    """(n, N) int64, B*H*W for padding."""
    mask: Tensor | None
    """(n, 1, N, N) additive."""
    has_padding: bool

    def read(self, rows: Tensor) -> Tensor:
        """(B*H*W, any) -> (n, N, any), zeros for padding."""
        if not self.has_padding:
            return rows[self.places]
        windows = rows[self.places.clamp(max=len(rows) - 1)]
        return windows.masked_fill_((self.places == len(rows)).unsqueeze(-1), 0)

    def write(self, buffer: Tensor, windows: Tensor) -> None:
        """The inverse of read(); a window's padding goes to the buffer's spare row."""
        buffer[self.places] = windows


def _chunks(qkv: Tensor, grid: WindowGrid, chunk_windows: int) -> Iterator[_Chunk]:
    """All windows of the batch, image by image; the mask is made for each chunk alone, because there may be
    thousands of windows (604 MB for the masks of stage 1 at 1536 px and window 32)."""
    batch, map_tokens = qkv.shape[0], math.prod(grid.size)
    has_padding = grid.padded != grid.size
    tokens, regions = window_tokens(grid, qkv.device), window_regions(grid, qkv.device)  # (nW, N)
    for first in range(0, batch * len(tokens), chunk_windows):
        last = min(first + chunk_windows, batch * len(tokens))
        number = torch.arange(first, last, device=qkv.device)
        image, window = number // len(tokens), number % len(tokens)
        places = tokens[window] + image.unsqueeze(1) * map_tokens
        if has_padding:
            places = places.masked_fill(tokens[window] < 0, batch * map_tokens)
        mask = region_mask(regions[window], len(grid.size)).unsqueeze(1) if grid.needs_mask else None
        yield _Chunk(places, mask, has_padding)
        del mask  # or it would still be there when the next is made


def _buffer(rows: Tensor, channels: int, grid: WindowGrid) -> Tensor:
    """Uninitialised rows for results, every one of which some window will write: (B*H*W + 1 spare, channels)."""
    return rows.new_empty(len(rows) + (grid.padded != grid.size), channels)


def _through_length(x: Tensor, d_unit: Tensor) -> Tensor:
    """The gradient of x from that of unit_vectors(x): (..., d), in x's dtype."""
    wide = at_least_float32(x)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    unit = wide / length
    return ((d_unit - unit * (unit * d_unit).sum(dim=-1, keepdim=True)) / length).to(x.dtype)
