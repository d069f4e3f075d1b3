"""Window attention of SwinV2: scaled cosine attention with a log-spaced continuous position bias.

Legend: B batch, C channels, nW windows per image, N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.precision import Float32Linear, at_least_float32
from swinv2_train.models.windows import log_spaced_coordinates, relative_position_index

LOGIT_SCALE_MAX = math.log(1.0 / 0.01)  # tau >= 0.01, arXiv:2111.09883 section 3.2
BIAS_HIDDEN = 512
BIAS_RANGE = 16.0


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows, with log-CPB (arXiv:2111.09883 sections 3.2 and 3.3).

    logits = cos(q, k) * exp(min(logit_scale, log 100)) + 16 sigmoid(MLP(log-spaced offsets)) + mask.  Bias, scale,
    softmax and the lengths of q and k are computed in at least float32, also under autocast; the two products of
    matrices in the dtype of the weights, or autocast's.  Keys have no bias.
    pretrained_window_size: (rows, cols) of the window at which the bias was trained; it normalises the offsets,
    whatever window a forward pass uses.
    """

    def __init__(
        self, dim: int, num_heads: int, pretrained_window_size: tuple[int, int], qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pretrained_window_size = pretrained_window_size
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        self.cpb_mlp = nn.Sequential(
            Float32Linear(2, BIAS_HIDDEN), nn.ReLU(inplace=True), Float32Linear(BIAS_HIDDEN, num_heads, bias=False)
        )
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def position_bias(self, window: tuple[int, int], device: torch.device) -> Tensor:
        """The additive position bias of a window (rows, cols): (h, N, N) in at least float32, within 0..16."""
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        coordinates = log_spaced_coordinates(window, self.pretrained_window_size, dtype, device)
        table = BIAS_RANGE * torch.sigmoid(self.cpb_mlp(coordinates))  # ((2rows-1)(2cols-1), h)
        index = relative_position_index(window, device)
        tokens = index.shape[0]
        return table[index.flatten()].t().reshape(-1, tokens, tokens)  # indexing: its gradient is deterministic on CUDA

    def forward(self, windows: Tensor, window: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """windows: (B*nW, N, C), grouped by image, of N = rows x cols tokens.  mask: (nW, N, N) additive or None.

        Returns (B*nW, N, C).
        """
        count, tokens, dim = windows.shape
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(windows, self.qkv.weight, bias)
        q, k, v = qkv.view(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (B*nW, h, N, d)
        scale = at_least_float32(self.logit_scale).clamp(max=LOGIT_SCALE_MAX).exp()
        logits = (unit_vectors(q) @ unit_vectors(k).transpose(-2, -1)) * scale  # float32: scale promotes
        additive = self.position_bias(window, windows.device)  # (h, N, N)
        if mask is None:
            logits = logits + additive
        else:
            additive = additive + mask[:, None]  # (nW, h, N, N)
            logits = (logits.view(-1, *additive.shape) + additive).view(logits.shape)
        attention = logits.softmax(dim=-1).to(v.dtype)
        out = (attention @ v).transpose(1, 2).reshape(count, tokens, dim)
        return self.proj(out)


def unit_vectors(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, computed in at least float32 and returned in x's dtype; zero stays zero.

    In float16 the official lower bound of the length, 1e-12, would be 0, and padding (keys have no bias) become NaN.
    """
    return F.normalize(at_least_float32(x), dim=-1).to(x.dtype)
