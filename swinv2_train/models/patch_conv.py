"""A convolution without overlap as a product of matrices.

Legend: B batch, H W patches per side, T along time, p pixels per side of a patch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as a linear layer on patches: (B, in, H*p, W*p) -> (B, out, H, W).

    Parameters, their names, shapes and initial values are those of nn.Conv2d(in_channels, out_channels, p, stride=p).
    cuDNN chooses an algorithm for a convolution's gradients by what is free and fast at the moment, and some add up
    atomically; cuBLAS repeats itself bit for bit.  The result is a view, channels last in memory.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, input: Tensor) -> Tensor:
        return _on_patches(input, self.weight, self.bias)


class PatchConv3d(nn.Conv3d):
    """The same for clips: (B, in, T*t, H*p, W*p) -> (B, out, T, H, W), patch_size = (t, p, p)."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, input: Tensor) -> Tensor:
        return _on_patches(input, self.weight, self.bias)


def _on_patches(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight: (out, in, ...), the last axes those of a patch."""
    batch, channels, *lengths = input.shape
    cut = [part for length, unit in zip(lengths, weight.shape[2:], strict=True) for part in (length // unit, unit)]
    x = input.reshape(batch, channels, *cut)
    patches, within = range(2, x.ndim, 2), range(3, x.ndim, 2)
    x = x.permute(0, *patches, 1, *within).flatten(1 + len(lengths))  # (B, H, W, in*p*p), in the order of the weight's
    return F.linear(x, weight.flatten(1), bias).movedim(-1, 1)
