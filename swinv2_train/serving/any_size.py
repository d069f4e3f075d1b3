"""An encoder that takes images of any size, in a form that torch.export traces once for all of them.

The model lays its windows by Python's own `if` and `min`, which a trace answers once, for the size that it saw.  Here
the same windows follow from arithmetic on the sizes: every token is read and written by its computed place.

Legend: B batch, H W tokens per side, C channels, nW windows per map, N tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import LOGIT_SCALE_MAX, WindowAttention
from swinv2_train.models.cosine import attention_weights, join_heads, split_heads, unit_vectors, window_bias
from swinv2_train.models.precision import at_least_float32
from swinv2_train.models.swin_v2 import Stage, SwinBlock
from swinv2_train.models.windows import PADDING, Axes, region_mask

Length = Any
"""A whole number, or a trace's symbol of one."""


class _Side(NamedTuple):
    """The windows along one side of a map, in tokens."""

    length: Length
    window: Length
    shift: Length
    windows: Length

    @classmethod
    def of(cls, length: Length, window_size: int, limit: Length, shifted: bool) -> _Side:
        """As window_grid has it; limit: the side that clamps the window."""
        window = torch.sym_min(window_size, limit)
        longer = torch.sym_min(limit - window, 1)  # 1 where the side is longer than the window, otherwise 0
        return cls(length, window, longer * (window // 2) if shifted else 0, (length + window - 1) // window)

    @property
    def padded(self) -> Length:
        return self.windows * self.window


class _Places(NamedTuple):
    """Where tokens are read for the windows of a map, and where they are written from."""

    window: Axes
    read: Tensor
    """(nW + 1, N): the row in the flattened map of each token; of padding some token's, which nobody looks at."""
    mask: Tensor
    """(nW + 1, 1, N, N), additive."""
    written: Tensor
    """(H*W,): the row in the flattened windows of each token of the map."""


def _places(rows: _Side, cols: _Side, device: torch.device) -> _Places:
    # one window more than there are, which nobody reads: a trace takes one alone for a case of its own
    number = torch.arange(rows.windows * cols.windows + 1, device=device)[:, None]
    token = torch.arange(rows.window * cols.window, device=device)[None, :]
    row = number // cols.windows * rows.window + token // cols.window  # (nW + 1, N) of the padded and shifted map
    col = number % cols.windows * cols.window + token % cols.window
    from_row, from_col = (row + rows.shift) % rows.padded, (col + cols.shift) % cols.padded
    real = (from_row < rows.length) & (from_col < cols.length)
    regions = 2 * (row >= rows.padded - rows.shift).to(torch.int8) + (col >= cols.padded - cols.shift).to(torch.int8)
    mask = region_mask(regions.masked_fill(~real, PADDING), 2).unsqueeze(1)
    read = from_row.clamp(max=rows.length - 1) * cols.length + from_col.clamp(max=cols.length - 1)

    row = (torch.arange(rows.length, device=device)[:, None] - rows.shift + rows.padded) % rows.padded
    col = (torch.arange(cols.length, device=device)[None, :] - cols.shift + cols.padded) % cols.padded
    number = row // rows.window * cols.windows + col // cols.window  # (H, W)
    token = row % rows.window * cols.window + col % cols.window
    written = (number * (rows.window * cols.window) + token).flatten()
    return _Places((rows.window, cols.window), read, mask, written)


class AnySizeBlocks(nn.Module):
    """The SwinBlocks of a stage in evaluation mode, on maps (B, H, W, C) whose sides may be symbols."""

    def __init__(self, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.window_size, self.clamp_to_shorter_side = blocks[0].window_size, blocks[0].clamp_to_shorter_side

    def forward(self, x: Tensor) -> Tensor:
        places: dict[bool, _Places] = {}  # each kind is laid once, for all its blocks
        for block in self.blocks:
            assert isinstance(block, SwinBlock)
            if block.shifted not in places:
                places[block.shifted] = _places(*self._sides(x, block.shifted), x.device)
            x = x + block.norm1(_attended(block.attn, x, places[block.shifted]))
            x = x + block.norm2(block.mlp(x))
            x = x if block.norm3 is None else block.norm3(x)
        return x

    def _sides(self, x: Tensor, shifted: bool) -> tuple[_Side, _Side]:
        height, width = x.shape[1:3]
        shorter = torch.sym_min(height, width)
        limits = (shorter, shorter) if self.clamp_to_shorter_side else (height, width)
        rows, cols = self.window_size
        return _Side.of(height, rows, limits[0], shifted), _Side.of(width, cols, limits[1], shifted)


def _attended(attn: WindowAttention, x: Tensor, places: _Places) -> Tensor:
    """What the attention's forward gives for the same windows."""
    bias = None
    if attn.q_bias is not None and attn.v_bias is not None:
        bias = torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias))
    windows = F.linear(x, attn.qkv.weight, bias).flatten(1, 2)[:, places.read]  # (B, nW + 1, N, 3C)
    q, k, v = split_heads(windows, attn.num_heads)
    scale = at_least_float32(attn.logit_scale).clamp(max=LOGIT_SCALE_MAX).exp()
    offsets = window_bias(attn.position_table(places.window, x.device), places.window)
    weights = attention_weights(unit_vectors(q), unit_vectors(k), scale, offsets, places.mask)
    out = join_heads(weights @ v).flatten(1, 2)[:, places.written]  # (B, H*W, C)
    return attn.proj(out).view(x.shape)


def takes_any_size(encoder: SwinTransformerV2) -> None:
    """Put AnySizeBlocks in the places of every stage's blocks."""
    for stage in encoder.layers:
        assert isinstance(stage, Stage)
        blocks = [block for block in stage.blocks if isinstance(block, SwinBlock)]
        stage.blocks = nn.ModuleList([AnySizeBlocks(blocks)])


def size_step(encoder: SwinTransformerV2) -> int:
    """Pixels of which both sides are multiples, twice or more, so that no map is odd before it is merged."""
    return encoder.patch_size * 2 ** (len(encoder.depths) - 1)
