"""A model's matrix products and nothing between them: the time that no implementation of SwinV2 can go below.

Legend: B batch, C channels, nW windows per image, N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.kernels import cpu_products

Product = Callable[[], object]


class MatrixProducts:
    """The products of one training step, into buffers that are there before: linear layers, q k^T and weights v.

    Each by the fastest that we know on this processor (models/kernels/cpu_products.py), whose result is a new tensor.

    model: tells the sizes alone, and may be on the meta device.  Products of equal shapes share their buffers.  Left
    out is the position bias's MLP, a thousandth of the rest.
    """

    def __init__(self, model: SwinTransformerV2, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._dtype, self._device = dtype, device
        self._forward: list[Product] = []
        self._backward: list[Product] = []
        for rows, inputs, outputs, needs_input_grad in _linear_layers(model, batch):
            self._add_linear(rows, inputs, outputs, needs_input_grad)
        for i, (grid, depth, heads) in enumerate(zip(model.grids, model.depths, model.num_heads, strict=True)):
            tokens = math.prod(grid.window)
            windows = batch * math.prod(grid.padded) // tokens
            for _ in range(depth):
                self._add_attention(windows * heads, tokens, model.embed_dim * 2**i // heads)

    def forward(self) -> None:
        for product in self._forward:
            product()

    def backward(self) -> None:
        for product in self._backward:
            product()

    def buffers_gib(self) -> float:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values()) / 2**30

    def _buffer(self, role: str, *shape: int) -> Tensor:
        if (role, *shape) not in self._buffers:
            self._buffers[role, *shape] = torch.randn(shape, device=self._device).to(self._dtype)
        return self._buffers[role, *shape]

    def _add_linear(self, rows: int, inputs: int, outputs: int, needs_input_grad: bool) -> None:
        x, grad_x = (self._buffer(role, rows, inputs) for role in ("x", "grad_x"))
        weight, grad_weight = (self._buffer(role, outputs, inputs) for role in ("weight", "grad_weight"))
        y, grad_y = (self._buffer(role, rows, outputs) for role in ("y", "grad_y"))

        def product(a: Tensor, b: Tensor, out: Tensor) -> object:
            return cpu_products.product(a, b) if cpu_products.serves(a, b) else torch.mm(a, b.t(), out=out)

        def weight_gradient() -> object:
            serves = cpu_products.serves(x, weight)
            return cpu_products.weight_gradient(grad_y, x) if serves else torch.mm(grad_y.t(), x, out=grad_weight)

        self._forward.append(lambda: product(x, weight, y))
        self._backward.append(weight_gradient)
        if needs_input_grad:
            self._backward.append(lambda: product(grad_y, weight.t(), grad_x))

    def _add_attention(self, count: int, tokens: int, head_dim: int) -> None:
        """count: B*nW*h."""
        roles = ("q", "k", "v", "out", "grad_q", "grad_k", "grad_v", "grad_out")
        q, k, v, out, grad_q, grad_k, grad_v, grad_out = (self._buffer(r, count, tokens, head_dim) for r in roles)
        scores, grad_scores = (self._buffer(role, count, tokens, tokens) for role in ("scores", "grad_scores"))
        self._forward += [
            lambda: torch.bmm(q, k.transpose(1, 2), out=scores),
            lambda: torch.bmm(scores, v, out=out),
        ]
        self._backward += [
            lambda: torch.bmm(grad_out, v.transpose(1, 2), out=grad_scores),
            lambda: torch.bmm(scores.transpose(1, 2), grad_out, out=grad_v),
            lambda: torch.bmm(grad_scores, k, out=grad_q),
            lambda: torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k),
        ]


def _linear_layers(model: SwinTransformerV2, batch: int) -> Iterator[tuple[int, int, int, bool]]:
    """(rows, input channels, output channels, whether the input's gradient is wanted) of every linear layer."""
    patch = model.in_chans * model.patch_size**2
    yield batch * math.prod(model.sizes[0]), patch, model.embed_dim, False
    for i, (size, depth) in enumerate(zip(model.sizes, model.depths, strict=True)):
        rows, dim = batch * math.prod(size), model.embed_dim * 2**i
        hidden = int(dim * model.mlp_ratio)
        for _ in range(depth):
            for inputs, outputs in ((dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)):
                yield rows, inputs, outputs, True
        if i < len(model.depths) - 1:
            yield batch * math.prod(model.sizes[i + 1]), 4 * dim, 2 * dim, True
    if model.num_classes:
        yield batch, model.num_features, model.num_classes, True
