"""Window attention of SwinV2: scaled cosine attention with a log-spaced continuous position bias.

Legend: B batch, H W tokens per side, C channels, nW windows per image, N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED_LOGIT = -100.0  # the official additive mask between regions that the cyclic shift brought together
LOGIT_SCALE_MAX = math.log(1.0 / 0.01)  # tau >= 0.01, arXiv:2111.09883 section 3.2
BIAS_HIDDEN = 512
BIAS_RANGE = 16.0


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a table made under inference mode would spoil later training
def relative_position_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (N, N) int64."""
    rows, cols = window
    row = torch.arange(rows, device=device).repeat_interleave(cols)  # (N,)
    col = torch.arange(cols, device=device).repeat(rows)
    d_row = row[:, None] - row[None, :] + rows - 1  # (N, N), from 0
    d_col = col[:, None] - col[None, :] + cols - 1
    return d_row * (2 * cols - 1) + d_col


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a table made under inference mode would spoil later training
def log_spaced_coordinates(window: tuple[int, int], pretrained: tuple[int, int], device: torch.device) -> Tensor:
    """Relative coordinates of the bias table, ((2h-1)(2w-1), 2) float32.

    Offsets are divided by the pretrained window's (or, where that is 0, this window's) largest offset, times 8, then
    sign(x) log2(1+|x|) / log2(8): the official form of arXiv:2111.09883 equation 4.
    """
    axes = []
    for size, trained in zip(window, pretrained, strict=True):
        largest = max((trained or size) - 1, 1)  # a window of one token has the offset 0 alone
        offsets = torch.arange(1 - size, size, dtype=torch.float32, device=device) / largest * 8
        axes.append(torch.sign(offsets) * torch.log2(offsets.abs() + 1) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a table made under inference mode would spoil later training
def shift_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Additive mask (nW, N, N) float32 that keeps a shifted window's regions apart; None without a shift."""
    if shift == (0, 0):
        return None
    regions = []
    for length, win, sh in zip(size, window, shift, strict=True):
        region = torch.zeros(length, dtype=torch.int64, device=device)
        if sh:
            region[length - win : length - sh] = 1
            region[length - sh :] = 2
        regions.append(region)
    region_map = regions[0][:, None] * 3 + regions[1][None, :]  # (H, W)
    ids = partition_windows(region_map[None, :, :, None], window).squeeze(-1)  # (nW, N)
    return (ids[:, None, :] != ids[:, :, None]).float() * MASKED_LOGIT


def partition_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B*nW, N, C); H and W are multiples of the window."""
    batch, height, width, channels = x.shape
    rows, cols = window
    x = x.view(batch, height // rows, rows, width // cols, cols, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * cols, channels)


def merge_windows(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(B*nW, N, C) -> (B, H, W, C): the inverse of :func:`partition_windows`."""
    rows, cols = window
    height, width = size
    channels = windows.shape[-1]
    x = windows.view(-1, height // rows, width // cols, rows, cols, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


class Float32Linear(nn.Linear):
    """A Linear that computes in float32 whatever its weights' dtype, so the position bias is never rounded to bf16."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows, with log-CPB (arXiv:2111.09883 sections 3.2 and 3.3).

    logits = cos(q, k) * exp(min(logit_scale, log 100)) + 16 sigmoid(MLP(log-spaced offsets)) + mask.  Bias, scale and
    softmax are computed in float32.  Keys have no bias.  window_size (rows, cols) is the window really used, after it
    was clamped to the map.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        pretrained_window_size: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.pretrained_window_size = pretrained_window_size
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        self.cpb_mlp = nn.Sequential(
            Float32Linear(2, BIAS_HIDDEN), nn.ReLU(inplace=True), Float32Linear(BIAS_HIDDEN, num_heads, bias=False)
        )
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def position_bias(self, device: torch.device) -> Tensor:
        """The additive position bias (h, N, N) float32, within 0..16."""
        coordinates = log_spaced_coordinates(self.window_size, self.pretrained_window_size, device)
        table = BIAS_RANGE * torch.sigmoid(self.cpb_mlp(coordinates))  # ((2rows-1)(2cols-1), h)
        index = relative_position_index(self.window_size, device)
        tokens = index.shape[0]
        return table[index.flatten()].t().reshape(-1, tokens, tokens)  # indexing: its gradient is deterministic on CUDA

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """windows: (B*nW, N, C), grouped by image.  mask: (nW, N, N) additive or None.  Returns (B*nW, N, C)."""
        count, tokens, dim = windows.shape
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(windows, self.qkv.weight, bias)
        q, k, v = qkv.view(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (B*nW, h, N, d)
        scale = self.logit_scale.float().clamp(max=LOGIT_SCALE_MAX).exp()
        logits = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * scale  # float32: scale promotes
        additive = self.position_bias(windows.device)  # (h, N, N)
        if mask is None:
            logits = logits + additive
        else:
            additive = additive + mask[:, None]  # (nW, h, N, N)
            logits = (logits.view(-1, *additive.shape) + additive).view(logits.shape)
        attention = logits.softmax(dim=-1).to(v.dtype)
        out = (attention @ v).transpose(1, 2).reshape(count, tokens, dim)
        return self.proj(out)
