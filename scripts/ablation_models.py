"""What SwinV2 replaced, put back into our model one part at a time: V1's norms, V1's attention, other position biases.

A variant is the package's SwinTransformerV2 with parts replaced; everything else, and the initial values of all that
the variants share, stays what it is.  Legend: N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.cosine import attention_weights, join_heads, split_heads, window_bias
from swinv2_train.models.precision import Float32LayerNorm
from swinv2_train.models.swin_v2 import SwinBlock, drop_path_factors
from swinv2_train.models.windows import WindowGrid, attention_mask, cut_windows, join_windows, window_grid

NORMS = ("res-post-norm", "pre-norm")
ATTENTIONS = ("cosine", "dot product")
BIASES = ("log", "linear", "table")


class PreNormBlock(SwinBlock):
    """V1's block: x + attention(norm1(x)), then x + mlp(norm2(x)) (arXiv:2103.14030 equation 3); norms start at 1.

    Takes its parts from a block of ours.
    """

    def __init__(self, block: SwinBlock) -> None:
        nn.Module.__init__(self)
        self.window_size = block.window_size
        self.shifted = block.shifted
        self.clamp_to_shorter_side = block.clamp_to_shorter_side
        self.drop_path_rate = block.drop_path_rate
        self.attn, self.mlp, self.norm3 = block.attn, block.mlp, block.norm3
        self.norm1 = Float32LayerNorm(block.norm1.normalized_shape)
        self.norm2 = Float32LayerNorm(block.norm2.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        attn_factors, mlp_factors = (drop_path_factors(x, self.drop_path_rate, self.training) for _ in range(2))
        grid = window_grid((x.shape[1], x.shape[2]), self.window_size, self.shifted, self.clamp_to_shorter_side)
        branch = self.attn(self.norm1(x), grid)
        x = x + (branch if attn_factors is None else branch * attn_factors)
        branch = self.mlp(self.norm2(x))
        x = x + (branch if mlp_factors is None else branch * mlp_factors)
        return x if self.norm3 is None else self.norm3(x)


class OtherAttention(WindowAttention):
    """Ours with something else in a part of it; takes its parameters from an attention of ours."""

    def __init__(self, attention: WindowAttention) -> None:
        nn.Module.__init__(self)
        self.num_heads = attention.num_heads
        self.pretrained_window_size = attention.pretrained_window_size
        self.fused, self.chunks = attention.fused, attention.chunks
        self.logit_scale, self.cpb_mlp = attention.logit_scale, attention.cpb_mlp
        self.qkv, self.q_bias, self.v_bias = attention.qkv, attention.q_bias, attention.v_bias
        self.proj = attention.proj


class DotProductAttention(OtherAttention):
    """V1's attention: softmax(q k^T / sqrt(d) + bias + mask) v (arXiv:2103.14030 equation 4), with our position bias.

    A bias of the keys, which V1 has, adds the same number to a whole row of logits and so changes nothing.
    """

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__(attention)
        self.fused = False  # no kernel knows it, and its block has no passes
        self.logit_scale.requires_grad_(False)  # unused; position_table asks for its dtype

    def forward(self, x: Tensor, grid: WindowGrid) -> Tensor:
        """x: (B, H, W, C); grid: the windows to lay over it.  Returns (B, H, W, C)."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        windows = cut_windows(F.linear(x, self.qkv.weight, bias), grid)  # (B*nW, N, 3C)
        windows = windows.view(x.shape[0], -1, *windows.shape[1:])  # (B, nW, N, 3C)
        q, k, v = split_heads(windows, self.num_heads)  # (B, nW, h, N, d)
        table = self.position_table(grid.window, x.device)
        scale = table.new_full((1, 1, 1), q.shape[-1] ** -0.5)
        mask = attention_mask(grid, x.device).unsqueeze(1) if grid.needs_mask else None  # (nW, 1, N, N)
        weights = attention_weights(q, k, scale, window_bias(table, grid.window), mask)
        out = join_windows(join_heads(weights.to(v.dtype) @ v).flatten(0, 1), grid)
        return self.proj(out.contiguous())


class LinearBiasAttention(OtherAttention):
    """Ours with linearly spaced coordinates of the position bias: offset / largest offset at the pre-training window.

    The paper's "linear-spaced CPB" (arXiv:2111.09883 table 1), whose coordinates leave the trained range by 1.14 times
    its length when the window grows from 8 to 16.
    """

    def position_table(self, window: tuple[int, int], device: torch.device, passes: bool = False) -> Tensor:
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        axes = [
            torch.arange(1 - size, size, dtype=dtype, device=device) / max(trained - 1, 1)
            for size, trained in zip(window, self.pretrained_window_size, strict=True)
        ]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)
        return self.cpb_mlp(coordinates, passes)


class TableBiasAttention(OtherAttention):
    """Ours with V1's position bias: a number for every offset and head, resized bicubically for another window.

    Initial values: normal, 0.02 (V1).  Resized as the official code does when it loads weights (align_corners=False).
    """

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__(attention)
        rows, cols = self.pretrained_window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * rows - 1) * (2 * cols - 1), self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        del self.cpb_mlp

    def position_table(self, window: tuple[int, int], device: torch.device, passes: bool = False) -> Tensor:
        return resized_table(self.relative_position_bias_table, self.pretrained_window_size, window)


def resized_table(table: Tensor, trained: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """A bias table of one window (rows, cols) for another: ((2rows-1)(2cols-1), h) -> the same of `window`."""
    if window == trained:
        return table
    maps = table.t().reshape(1, -1, 2 * trained[0] - 1, 2 * trained[1] - 1)
    sizes = (2 * window[0] - 1, 2 * window[1] - 1)
    return F.interpolate(maps, sizes, mode="bicubic", align_corners=False).flatten(2)[0].t()


def with_parts(model: SwinTransformerV2, norm: str, attention: str, bias: str) -> SwinTransformerV2:
    """The model with these parts in every block, changed in place: "res-post-norm", "cosine" and "log" are ours.

    Raises ValueError for a part that is not in NORMS, ATTENTIONS and BIASES, or a combination that is not built here.
    """
    if norm not in NORMS or attention not in ATTENTIONS or bias not in BIASES:
        raise ValueError(f"({norm}, {attention}, {bias}) are not among {NORMS}, {ATTENTIONS} and {BIASES}")
    if attention == "dot product" and bias != "log":
        raise ValueError(f"dot-product attention is built with the bias 'log' alone, not '{bias}'")
    replacement = {("dot product", "log"): DotProductAttention, ("cosine", "linear"): LinearBiasAttention,
                   ("cosine", "table"): TableBiasAttention}.get((attention, bias))  # fmt: skip
    for stage in model.layers:
        for index, block in enumerate(stage.blocks):
            if replacement is not None:
                block.attn = replacement(block.attn)
            if norm == "pre-norm":
                stage.blocks[index] = PreNormBlock(block)
    return model
