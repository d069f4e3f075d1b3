"""Parameters and multiply-adds of a model, counted without running it."""

from __future__ import annotations

import math

from torch import nn

from swinv2_train.models.swin_v2 import SwinTransformerV2


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; works on the meta device too."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(model: SwinTransformerV2) -> int:
    """Multiply-adds of the forward pass of one image or clip, as the official code counts them (norms included,
    bias MLP left out), and the padding of windows and of merging with them.

    A training step is about three times this, and a FLOP count twice as many operations.
    """
    total: int = math.prod(model.sizes[0]) * model.embed_dim * (model.in_chans * math.prod(model.patch) + 1)
    for i, (grid, depth) in enumerate(zip(model.grids, model.depths, strict=True)):
        tokens, dim = math.prod(grid.size), model.embed_dim * 2**i
        attention = math.prod(grid.padded) * (4 * dim * dim + 2 * math.prod(grid.window) * dim)
        mlp = 2 * tokens * dim * int(dim * model.mlp_ratio)
        total += depth * (attention + mlp + 2 * tokens * dim)
        if i < len(model.depths) - 1:
            total += math.prod(model.sizes[i + 1]) * 8 * dim * dim + tokens * dim // 2
    return total + tokens * model.num_features + model.num_features * model.num_classes
