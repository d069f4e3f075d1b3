"""The official SwinV2's sequence of operations, restated in eager torch: what our speed and memory are compared with.

It computes with the parameters of one of our models, so both have the same weights and, to rounding, the same outputs.
The operations, and the copies between them, are those of the official code (microsoft/Swin-Transformer,
models/swin_transformer_v2.py): tokens as (B, L, C); roll, partition and reverse as copies of their own; the scores, the
bias and the mask added one after the other; the position bias computed in every call.  Its precision is torch's, so
bf16 means torch.autocast around it, as it was trained.

Legend: B batch, L tokens of a map, C channels, nW windows per image, N tokens per window, h heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.swin_v2 import PatchMerging, Stage, SwinBlock, drop_path_factors
from swinv2_train.models.windows import log_spaced_coordinates, relative_position_index


class OfficialArithmetic(nn.Module):
    """A SwinTransformerV2 computed the official way; images (B, 3, H, W) of the model's img_size -> (B, num_classes).

    use_checkpoint: recompute every block in the backward pass (the official switch of that name).
    Raises ValueError for sizes that the official code refuses: it never pads, and takes square images only.
    """

    def __init__(self, model: SwinTransformerV2, use_checkpoint: bool = False) -> None:
        super().__init__()
        for size, grid in zip(model.sizes, model.grids, strict=True):
            if grid.padded != size or size[0] != size[1] or grid.window[0] != grid.window[1]:
                raise ValueError(
                    f"a map of {size}, windows of {grid.window}: the official code takes square maps that windows tile"
                )
        self.model = model
        self.use_checkpoint = use_checkpoint
        for i, grid in enumerate(model.grids):  # buffers of every block there; the same tensors for a stage here
            side, window, shift = grid.size[0], grid.window[0], grid.shift[0]
            device, dtype = model.norm.weight.device, model.norm.weight.dtype
            self.register_buffer(f"mask_{i}", shift_mask(side, window, shift).to(device) if shift else None)
            trained = model.pretrained_window_sizes[i]
            table = log_spaced_coordinates(grid.window, trained, dtype, device)
            self.register_buffer(f"coordinates_{i}", table.clone())
            self.register_buffer(f"index_{i}", relative_position_index(grid.window, device).clone())

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = layer_norm(x, model.patch_embed.norm)
        for i, stage in enumerate(model.layers):
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                x = (
                    checkpoint(self.block, x, block, i, use_reentrant=False)
                    if self.use_checkpoint
                    else self.block(x, block, i)
                )
            if stage.downsample is not None:
                x = merge(x, stage.downsample, model.sizes[i][0])
        x = layer_norm(x, model.norm)
        return model.head(F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1))

    def block(self, x: Tensor, block: SwinBlock, stage: int) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        grid = self.model.grids[stage]
        side, window = grid.size[0], grid.window[0]
        shift = grid.shift[0] if block.shifted else 0
        batch, length, dim = x.shape
        shortcut, x = x, x.view(batch, side, side, dim)
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        x = x.view(batch, side // window, window, side // window, window, dim).permute(0, 1, 3, 2, 4, 5).contiguous()
        x = self.attention(x.view(-1, window * window, dim), block.attn, stage, shift > 0)
        x = x.view(batch, side // window, side // window, window, window, dim).permute(0, 1, 3, 2, 4, 5).contiguous()
        x = x.view(batch, side, side, dim)
        if shift:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        x = x.view(batch, length, dim)
        x = shortcut + drop_path(layer_norm(x, block.norm1), block)
        hidden = F.linear(
            F.gelu(F.linear(x, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight, block.mlp.fc2.bias
        )
        x = x + drop_path(layer_norm(hidden, block.norm2), block)
        return x if block.norm3 is None else layer_norm(x, block.norm3)

    def attention(self, x: Tensor, attn: WindowAttention, stage: int, masked: bool) -> Tensor:
        """(B*nW, N, C) -> (B*nW, N, C)."""
        windows, tokens, dim = x.shape
        heads = attn.num_heads
        bias = None
        if attn.q_bias is not None:
            bias = torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias, requires_grad=False), attn.v_bias))
        qkv = F.linear(x, attn.qkv.weight, bias).reshape(windows, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(attn.logit_scale, max=math.log(100.0)).exp()
        hidden, last = attn.cpb_mlp[0], attn.cpb_mlp[2]
        table = F.linear(
            F.relu(F.linear(getattr(self, f"coordinates_{stage}"), hidden.weight, hidden.bias)), last.weight
        )
        index = getattr(self, f"index_{stage}")
        position = table[index.view(-1)].view(tokens, tokens, heads).permute(2, 0, 1).contiguous()
        scores = scores + (16 * torch.sigmoid(position)).unsqueeze(0)
        if masked:
            mask = getattr(self, f"mask_{stage}")
            per_image = mask.shape[0]
            scores = scores.view(windows // per_image, per_image, heads, tokens, tokens) + mask[None, :, None]
            scores = scores.view(-1, heads, tokens, tokens)
        weights = torch.softmax(scores, dim=-1)
        out = (weights @ v).transpose(1, 2).reshape(windows, tokens, dim)
        return F.linear(out, attn.proj.weight, attn.proj.bias)


def drop_path(x: Tensor, block: SwinBlock) -> Tensor:
    """Stochastic depth of a block's branch (B, L, C)."""
    factors = drop_path_factors(x, block.drop_path_rate, block.training)
    return x if factors is None else x * factors


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """torch's own, without our float32 rule."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def merge(x: Tensor, merging: PatchMerging, side: int) -> Tensor:
    """(B, L, C) -> (B, L/4, 2C): four strided copies, one concatenation."""
    x = x.view(x.shape[0], side, side, -1)
    parts = [x[:, row::2, col::2] for row, col in ((0, 0), (1, 0), (0, 1), (1, 1))]
    x = torch.cat(parts, -1).view(x.shape[0], (side // 2) ** 2, -1)
    return layer_norm(F.linear(x, merging.reduction.weight), merging.norm)


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """(nW, N, N): -100 between the nine regions of a shifted map, numbered slice by slice."""
    regions = torch.zeros(side, side)
    slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(slices):
        for j, cols in enumerate(slices):
            regions[rows, cols] = 3 * i + j
    per_axis = side // window
    regions = regions.view(per_axis, window, per_axis, window).transpose(1, 2).reshape(per_axis**2, window * window)
    return torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
