"""A convolution without overlap as a product of matrices.

Legend: B batch, H W patches per side, p pixels per side of a patch.
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
        patch = self.kernel_size[0]
        batch, channels, height, width = input.shape
        x = input.reshape(batch, channels, height // patch, patch, width // patch, patch)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H, W, in*p*p), in the order of the weight's
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
