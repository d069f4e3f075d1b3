"""An independent SwinV2 in plain float64, written from the paper and its facts; shares no code with the package.

Works on a state dict with official names.  Every token attends to every token of the map, and what keeps windows apart
is arithmetic on the tokens' coordinates: nothing is reshaped, rolled or padded, so that padding cannot get weight.
"""

from __future__ import annotations

import math

import torch


def reference_features(
    state,
    images,
    *,
    patch,
    depths,
    heads,
    window,
    pretrained,
    norm_period=0,
    mask=None,
    clamp_to_shorter_side=False,
):
    """The map of every stage, (B, C, h, w) each, the last one normed, of images (B, 3, H, W).

    window: (rows, cols); pretrained: an int or (rows, cols) per stage, 0 = the clamped window of this image.
    Of clips (B, 3, T, H, W): maps (B, C, t, h, w), windows (frames, rows, cols), patch (frames, side, side).
    """
    convolution = torch.nn.functional.conv2d if images.ndim == 4 else torch.nn.functional.conv3d
    x = convolution(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = layer_norm(torch.movedim(x, 1, -1), state, "patch_embed.norm")  # (B, H, W, C) or (B, T, H, W, C)
    if mask is not None:
        keep = (~mask).to(x.dtype)[..., None]
        keep = keep if x.ndim == 4 else keep[:, None]
        x = x * keep + state["mask_token"].view(-1) * (1 - keep)
    maps = []
    for i, depth in enumerate(depths):
        clamped, may_shift = official_window(x.shape[1:-1], window, clamp_to_shorter_side)
        trained = (pretrained[i], pretrained[i]) if isinstance(pretrained[i], int) else pretrained[i]
        trained = [t or w for t, w in zip(trained, clamped, strict=True)]
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            shift = [w // 2 if j % 2 == 1 and may else 0 for w, may in zip(clamped, may_shift, strict=True)]
            attended = attention(x, state, f"{name}.attn", heads[i], clamped, shift, trained)
            x = x + layer_norm(attended, state, f"{name}.norm1")
            x = x + layer_norm(mlp(x, state, f"{name}.mlp"), state, f"{name}.norm2")
            if norm_period and (j + 1) % norm_period == 0:
                x = layer_norm(x, state, f"{name}.norm3")
        maps.append(x)
        if i < len(depths) - 1:
            x = merge(x, state, f"layers.{i}.downsample")
    maps[-1] = layer_norm(x, state, "norm")
    return [torch.movedim(x, -1, 1) for x in maps]


def reference_simmim(state, images, mask, *, patch, **settings):
    """(loss, reconstruction (B, 3, H, W)) of SimMIM without target normalisation; state has encoder.* and decoder.*"""
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    x = reference_features(encoder, images, patch=patch, mask=mask, **settings)[-1]
    stride = patch * 2 ** (len(settings["depths"]) - 1)
    weight = state["decoder.0.weight"][:, :, 0, 0]
    values = torch.einsum("oc,bchw->bohw", weight, x) + state["decoder.0.bias"][None, :, None, None]
    height, width = images.shape[2:]
    rows, cols = torch.arange(height), torch.arange(width)
    hidden = mask[:, rows // patch][:, :, cols // patch]  # (B, H, W)
    planes = []
    for c in range(3):  # channel c, row r, column q of a token's square: output (c * stride + r) * stride + q
        output = (c * stride + rows % stride)[:, None] * stride + (cols % stride)[None, :]  # (H, W)
        planes.append(values[:, output, (rows // stride)[:, None], (cols // stride)[None, :]])
    reconstruction = torch.stack(planes, dim=1)
    error = sum((planes[c] - images[:, c]).abs()[hidden].sum() for c in range(3))
    return error / (hidden.sum().to(error.dtype) + 1e-5) / 3, reconstruction


def official_window(size, window, clamp_to_shorter_side):
    """The window per axis after clamping, and per axis whether odd blocks shift it."""
    if clamp_to_shorter_side:  # the official code, for one int
        shorter = min(size)
        assert len(size) == 2, "the official code has no clips"
        return ([shorter] * 2, [False] * 2) if shorter <= window[0] else (list(window), [True] * 2)
    return [min(w, n) for w, n in zip(window, size, strict=True)], [n > w for w, n in zip(window, size, strict=True)]


def layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(x, state, name):
    x = x @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x @ state[f"{name}.fc2.weight"].T + state[f"{name}.fc2.bias"]


def merge(x, state, name):
    """Neighbours (0,0) (1,0) (0,1) (1,1); those beyond an odd map's edge are zeros."""
    *leading, height, width, dim = x.shape
    whole = x.new_zeros(*leading, height + height % 2, width + width % 2, dim)
    whole[..., :height, :width, :] = x
    parts = [whole[..., row::2, col::2, :] for row, col in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return layer_norm(torch.cat(parts, dim=-1) @ state[f"{name}.reduction.weight"].T, state, f"{name}.norm")


def attention(x, state, name, heads, window, shift, trained):
    """Attention of all tokens to all tokens of the map that fall into the same window of the shifted map.

    The map is thought to go on to whole windows.  A token at (r, c), of a clip (t, r, c), stands at
    (r - shift, c - shift) of the shifted map, cyclically; tokens of a window of which one wrapped around that edge and
    the other did not are kept apart by -100, and the two ends of a clip for good.
    """
    batch, *size, dim = x.shape
    whole = [-(-n // w) * w for n, w in zip(size, window, strict=True)]
    cell = torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size))  # (tokens, axes)
    place = (cell - torch.tensor(shift)) % torch.tensor(whole)
    wrapped = cell < torch.tensor(shift)
    same_window = (place[:, None] // torch.tensor(window) == place[None] // torch.tensor(window)).all(-1)
    apart = (wrapped[:, None] != wrapped[None]).any(-1)  # (queries, keys)
    additive = torch.zeros(len(cell), len(cell), dtype=x.dtype)
    additive[apart] = -100.0
    if len(size) == 3:
        additive[wrapped[:, None, 0] != wrapped[None, :, 0]] = -math.inf
    additive[~same_window] = -math.inf

    reach = torch.cartesian_prod(*(torch.arange(1 - w, w) for w in window))
    reach = reach.view(*(2 * w - 1 for w in window), len(window)).to(x.dtype)
    table = position_bias(reach, state, name, trained)
    offset = (place[:, None] - place[None]) + torch.tensor(window) - 1  # indices into the table; other windows: any
    offset = torch.where(same_window[..., None], offset, 0)

    tokens = x.reshape(batch, len(cell), dim)
    weight, d = state[f"{name}.qkv.weight"], dim // heads
    no_bias = torch.zeros(dim, dtype=x.dtype)
    q = tokens @ weight[:dim].T + state.get(f"{name}.q_bias", no_bias)
    k = tokens @ weight[dim : 2 * dim].T
    v = tokens @ weight[2 * dim :].T + state.get(f"{name}.v_bias", no_bias)
    scale = torch.exp(state[f"{name}.logit_scale"].view(-1).clamp(max=math.log(100.0)))
    out = []
    for h in range(heads):
        qh, kh, vh = (t[..., h * d : (h + 1) * d] for t in (q, k, v))
        cosine = (qh / qh.norm(dim=-1, keepdim=True)) @ (kh / kh.norm(dim=-1, keepdim=True)).transpose(1, 2)
        bias = table[offset.unbind(-1)][..., h]
        out.append(torch.softmax(cosine * scale[h] + bias + additive, dim=-1) @ vh)
    out = torch.cat(out, dim=-1) @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]
    return out.view(x.shape)


def position_bias(offsets, state, name, trained):
    """offsets (..., 2) in tokens -> bias (..., heads), by the window (rows, cols) at which it was trained.

    A clip's offsets are (time, rows, cols); its MLP reads time as the last column.
    """
    x = offsets / torch.tensor([max(t - 1, 1) for t in trained], dtype=offsets.dtype) * 8
    x = torch.sign(x) * torch.log2(x.abs() + 1) / 3
    x = torch.cat((x[..., -2:], x[..., :-2]), dim=-1)
    hidden = torch.relu(x @ state[f"{name}.cpb_mlp.0.weight"].T + state[f"{name}.cpb_mlp.0.bias"])
    return 16 / (1 + torch.exp(-(hidden @ state[f"{name}.cpb_mlp.2.weight"].T)))
