"""Window attention of SwinV2: scaled cosine attention with a log-spaced continuous position bias.

Legend: B batch, ... the map's axes (T) H W, C channels, nW windows per map, N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_train.models.cosine import (
    window_attention,
    window_bias,
)
from swinv2_train.models.fused_layers import ApartLinear
from swinv2_train.models.kernels import cpu_passes
from swinv2_train.models.kernels.cpu_products import linear
from swinv2_train.models.kernels.dispatch import fused_available, fused_window_attention, unknown
from swinv2_train.models.precision import Float32Linear, at_least_float32
from swinv2_train.models.sequential import Chunks, sequential_window_attention
from swinv2_train.models.windows import Axes, WindowGrid, log_spaced_coordinates

LOGIT_SCALE_MAX = math.log(1.0 / 0.01)  # tau >= 0.01, arXiv:2111.09883 section 3.2
BIAS_HIDDEN = 512
BIAS_RANGE = 16.0


class QkvLinear(nn.Linear):
    """The projection to queries, keys and values: no bias of its own, one may come with each call."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim * 3, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(input, self.weight, bias)


class PositionMlp(nn.Sequential):
    """The position bias of every offset, 16 sigmoid(MLP): log-spaced offsets (n, A) -> (n, h), at least float32."""

    def __init__(self, axes: int, num_heads: int) -> None:
        first, second = Float32Linear(axes, BIAS_HIDDEN), Float32Linear(BIAS_HIDDEN, num_heads, bias=False)
        super().__init__(first, nn.ReLU(inplace=True), second)

    def forward(self, input: Tensor, passes: bool = False) -> Tensor:
        """passes: in one pass, by cpu_passes, which has to serve."""
        if passes:
            first_weight, bias, second_weight = self.parameters()
            return cpu_passes.position_table(input, first_weight, bias, second_weight, BIAS_RANGE)
        first, relu, second = self
        return BIAS_RANGE * torch.sigmoid(second(relu(first(input))))


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows, with log-CPB (arXiv:2111.09883 sections 3.2 and 3.3).

    logits = cos(q, k) * exp(min(logit_scale, log 100)) + 16 sigmoid(MLP(log-spaced offsets)) + mask.  Bias, scale,
    softmax and the lengths of q and k are computed in at least float32, also under autocast; the two products of
    matrices in the dtype of the weights, or autocast's.  Keys have no bias.
    pretrained_window_size: (rows, cols) of the window at which the bias was trained, of clips (frames, rows, cols); it
    normalises the offsets, whatever window a forward pass uses, and as many axes as it has the maps have.
    fused: attend by fused kernels (models/kernels/) where one is available; on the meta device where those of the
    device that it stands for know the sizes.
    chunks: where they are not, None attends in all windows at once, otherwise it tells how many at a time, computed
    again in the backward pass.
    """

    meta_stands_for = "cuda"
    """As Float32LayerNorm's."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrained_window_size: Axes,
        qkv_bias: bool = True,
        fused: bool = False,
        chunks: Chunks | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pretrained_window_size = pretrained_window_size
        self.fused = fused
        self.chunks = chunks
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        self.cpb_mlp = PositionMlp(len(pretrained_window_size), num_heads)
        self.qkv = QkvLinear(dim)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = ApartLinear(dim, dim)

    def position_table(self, window: Axes, device: torch.device, passes: bool = False) -> Tensor:
        """The position bias of every offset within a window: (num_offsets(window), h), at least float32.

        passes: as PositionMlp's.
        """
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        coordinates = log_spaced_coordinates(window, self.pretrained_window_size, dtype, device)
        return self.cpb_mlp(coordinates, passes)

    def position_bias(self, window: Axes, device: torch.device) -> Tensor:
        """The additive position bias of a window: (h, N, N) in at least float32, within 0..16."""
        return window_bias(self.position_table(window, device), window)

    def projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values of tokens: (..., C) -> (..., 3C), channel order (3, h, d)."""
        return self.qkv(x, self.bias())

    def bias(self) -> Tensor | None:
        """What is added to queries, keys and values: (3C,), or None."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def scale(self) -> Tensor:
        """By what cosines are multiplied: (h, 1, 1) in at least float32."""
        return at_least_float32(self.logit_scale).clamp(max=LOGIT_SCALE_MAX).exp()

    def forward(self, x: Tensor, grid: WindowGrid, passes: bool = False) -> Any:
        """x: (B, ..., C), a map as it is, neither padded nor shifted; grid: the windows to lay over it.

        Returns (B, ..., C).  passes: cpu_passes serves; the biases are left to who reads the products next, the kernel
        and the norm, and what returns is (the result without proj's bias, that bias or None).
        """
        bias, scale = self.bias(), self.scale()
        table = self.position_table(grid.window, x.device, passes)
        qkv = self.qkv(x, None if passes else bias)
        if self.fused and self._fused_serves(qkv, grid):
            out = fused_window_attention(qkv, scale, table, grid, self.num_heads, bias if passes else None)
        else:
            qkv = qkv + bias if passes and bias is not None else qkv
            out = self._unfused(qkv, scale, table, grid)
        return self.proj(out, apart=True) if passes else self.proj(out)

    def _unfused(self, qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid) -> Tensor:
        if self.chunks is None:
            return window_attention(qkv, scale, table, grid, self.num_heads)
        at_a_time = self.chunks.windows_at_a_time(grid, self.num_heads, qkv.dtype)
        return sequential_window_attention(qkv, scale, table, grid, self.num_heads, at_a_time)

    def _fused_serves(self, qkv: Tensor, grid: WindowGrid) -> bool:
        if qkv.is_meta:
            dim = qkv.shape[-1] // (3 * self.num_heads)
            return unknown(torch.device(self.meta_stands_for), qkv.dtype, grid, self.num_heads, dim) is None
        return fused_available(qkv, grid, self.num_heads)
