"""Grad-CAM: which places of a map speak for something that a model says of an image (arXiv:1610.02391)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from swinv2_train.inspection.attention import BlockPlace, block_at
from swinv2_train.models import SwinTransformerV2


def cam_layer(encoder: SwinTransformerV2, stage: int) -> nn.Module:
    """What gives a stage's map, channels last: the last norm, or of an earlier stage its last block.  From 0."""
    last = stage == len(encoder.depths) - 1
    return encoder.norm if last else block_at(encoder, BlockPlace(stage, encoder.depths[stage] - 1))


def class_activation(layer: nn.Module, scores: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """A map for each score: relu(sum over c of a_c A_c), a_c the mean of d score / d A_c over the map (equations 1, 2).

    layer: whose output, (1, ..., C), is A.  scores: runs the model on one image and returns numbers (), whose graph
    begins at that output alone, so that nothing before it is kept.  Each map is float32 (...) on the CPU, not negative.
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = layer.register_forward_hook(hook)
    try:
        with torch.enable_grad():
            found = scores()
    finally:
        handle.remove()
    (activation,) = seen
    maps = []
    for score in found:
        (gradient,) = torch.autograd.grad(score, activation, retain_graph=True)
        share = gradient.mean(dim=tuple(range(1, gradient.ndim - 1)), keepdim=True)
        maps.append((share * activation.detach()).sum(dim=-1)[0].relu().float().cpu())
    return maps
