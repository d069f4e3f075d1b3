"""A block's layers, each of which can take on what stands before or behind it, where a CPU's passes serve.

What a layer takes on it computes in its own forward, from its own parameters: engines gather those by hooks on it.

Legend: B batch, ... the axes of a map, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from swinv2_train.models.kernels import cpu_passes
from swinv2_train.models.kernels.cpu_products import linear
from swinv2_train.models.precision import Float32LayerNorm


class ResidualLayerNorm(Float32LayerNorm):
    """A norm behind a branch, with what follows it: residual + factors * norm(branch); without a residual the norm."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        factors: Tensor | None = None,
        passes: bool = False,
        plus: Tensor | None = None,
    ) -> Tensor:
        """input, residual: (B, ..., C).  factors: (B, 1, ...), None = all are 1.

        passes: all in one pass over the rows, forward and backward; cpu_passes has to serve.
        plus: (C,), with passes alone, the bias of the layer that the input comes from: added to it before.
        """
        if residual is None:
            return super().forward(input)
        if passes:
            return cpu_passes.add_norm(input, plus, residual, factors, self.weight, self.bias, self.eps)
        assert plus is None, "without passes a layer adds its bias itself"
        normed = super().forward(input)
        return residual + (normed if factors is None else normed * factors)


class ApartLinear(nn.Linear):
    """A linear layer, by the products that are fastest here, that can leave its bias to whoever comes next."""

    def forward(self, input: Tensor, apart: bool = False) -> Any:
        """apart: the product without the bias, and beside it a copy of the bias (or None)."""
        if not apart:
            return linear(input, self.weight, self.bias)
        return linear(input, self.weight), copied(self.bias)


def copied(bias: Tensor | None) -> Tensor | None:
    """A layer's bias as it leaves the layer, after which an engine may let go of the layer's own."""
    return None if bias is None else bias.clone()
