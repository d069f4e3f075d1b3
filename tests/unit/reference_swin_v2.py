"""An independent SwinV2 in plain float64 loops, written from the paper and its facts; shares no code with the package.

Works on a state dict with official names; the position of every token is a coordinate pair, never a reshape trick.
"""

from __future__ import annotations

import math

import torch


def reference_features(state, images, *, patch, depths, heads, window, pretrained, norm_period=0, mask=None):
    """Normed last map (B, C, h, w) of float64 images (B, 3, H, W); window: (rows, cols), pretrained: int per stage."""
    x = torch.nn.functional.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch
    )
    x = layer_norm(x.permute(0, 2, 3, 1), state, "patch_embed.norm")  # (B, H, W, C)
    if mask is not None:
        keep = (~mask).to(x.dtype)[..., None]
        x = x * keep + state["mask_token"].view(-1) * (1 - keep)
    for i, depth in enumerate(depths):
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            x = x + layer_norm(
                attention(x, state, f"{name}.attn", heads[i], window, pretrained[i], j % 2 == 1), state, f"{name}.norm1"
            )
            x = x + layer_norm(mlp(x, state, f"{name}.mlp"), state, f"{name}.norm2")
            if norm_period and (j + 1) % norm_period == 0:
                x = layer_norm(x, state, f"{name}.norm3")
        if i < len(depths) - 1:
            parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            x = torch.cat(parts, dim=-1) @ state[f"layers.{i}.downsample.reduction.weight"].T
            x = layer_norm(x, state, f"layers.{i}.downsample.norm")
    return layer_norm(x, state, "norm").permute(0, 3, 1, 2)


def layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(x, state, name):
    x = x @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x @ state[f"{name}.fc2.weight"].T + state[f"{name}.fc2.bias"]


def attention(x, state, name, heads, window, pretrained, shifted):
    """Attention in windows of a cyclically shifted map; tokens that the shift brought together stay apart."""
    _, rows, cols, dim = x.shape
    window = (min(window[0], rows), min(window[1], cols))
    shift = tuple(w // 2 if shifted and n > w else 0 for w, n in zip(window, (rows, cols), strict=True))
    out = torch.zeros_like(x)
    d = dim // heads
    scale = torch.exp(
        torch.minimum(state[f"{name}.logit_scale"].view(-1), torch.tensor(math.log(100.0), dtype=x.dtype))
    )
    for top in range(0, rows, window[0]):
        for left in range(0, cols, window[1]):
            shifted_cells = [(r, c) for r in range(top, top + window[0]) for c in range(left, left + window[1])]
            cells = [((r + shift[0]) % rows, (c + shift[1]) % cols) for r, c in shifted_cells]
            wrapped = [(r + shift[0] >= rows, c + shift[1] >= cols) for r, c in shifted_cells]
            tokens = torch.stack([x[:, r, c] for r, c in cells], dim=1)  # (B, N, C)
            weight = state[f"{name}.qkv.weight"]
            q = tokens @ weight[:dim].T + state[f"{name}.q_bias"]
            k = tokens @ weight[dim : 2 * dim].T
            v = tokens @ weight[2 * dim :].T + state[f"{name}.v_bias"]
            heads_out = []
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                qh, kh, vh = q[..., part], k[..., part], v[..., part]
                cosine = (qh / qh.norm(dim=-1, keepdim=True)) @ (kh / kh.norm(dim=-1, keepdim=True)).transpose(1, 2)
                offsets = torch.tensor(
                    [[(a[0] - b[0], a[1] - b[1]) for b in shifted_cells] for a in shifted_cells], dtype=x.dtype
                )
                bias = position_bias(offsets, state, name, window, pretrained)[..., h]
                apart = torch.tensor([[0.0 if a == b else -100.0 for b in wrapped] for a in wrapped], dtype=x.dtype)
                heads_out.append(torch.softmax(cosine * scale[h] + bias + apart, dim=-1) @ vh)
            result = torch.cat(heads_out, dim=-1) @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]
            for n, (r, c) in enumerate(cells):
                out[:, r, c] = result[:, n]
    return out


def position_bias(offsets, state, name, window, pretrained):
    """offsets (..., 2) in tokens -> bias (..., heads)."""
    largest = torch.tensor([max((pretrained or w) - 1, 1) for w in window], dtype=offsets.dtype)
    x = offsets / largest * 8
    x = torch.sign(x) * torch.log2(x.abs() + 1) / 3
    hidden = torch.relu(x @ state[f"{name}.cpb_mlp.0.weight"].T + state[f"{name}.cpb_mlp.0.bias"])
    return 16 / (1 + torch.exp(-(hidden @ state[f"{name}.cpb_mlp.2.weight"].T)))
