"""The sizes of a model by which engines choose their buffers and the planner counts their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class LayerSizes(NamedTuple):
    """What is gathered and released as one, in elements."""

    largest_block: int
    """The largest block, or the largest layer outside of blocks where that is larger."""
    largest_vector: int
    """The largest parameter with one dimension (besides those of length 1) or in a position-bias MLP."""
    small: int
    """All parameters with at most largest_vector elements, together."""


@dataclass(frozen=True)
class ModelSizes:
    """What formulas of memory and communication need of a model, in elements."""

    parameters: int
    largest_parameter: int
    """Of those that are trained."""
    groups: tuple[int, ...]
    """Elements of each parameter group of the optimizer (with layer decay there are many)."""
    layers: LayerSizes
    blocks: tuple[tuple[int, ...], ...]
    """Elements of each parameter of each block, in the order of the forward pass."""
    others: tuple[int, ...]
    """Elements of each parameter outside of blocks."""
    synced_norms: tuple[int, ...] = ()
    """Channels of each norm whose statistics are of the images of all ranks (models/batch_norm.py)."""

    @property
    def trained(self) -> int:
        """Of parameters, those that have a gradient, a master and moments."""
        return sum(self.groups)

    @property
    def largest_group(self) -> int:
        return max(self.groups)


def layer_sizes(module: nn.Module, block_types: tuple[type[nn.Module], ...]) -> LayerSizes:
    """The sizes of a module's layers, also on the meta device or under ZeRO-3.  block_types: its blocks' classes."""
    numels = {name: _numel(parameter) for name, parameter in module.named_parameters()}
    vectors = [
        numels[name]
        for name, parameter in module.named_parameters()
        if "cpb_mlp" in name or max(getattr(parameter, "ds_shape", parameter.shape), default=1) == numels[name]
    ]
    blocks = [child for child in module.modules() if isinstance(child, block_types)]
    inside = {id(child) for block in blocks for child in block.modules()}
    layers = [sum(_numel(p) for p in block.parameters()) for block in blocks]
    layers += [
        sum(_numel(p) for p in child.parameters(recurse=False)) for child in module.modules() if id(child) not in inside
    ]
    largest_vector = max(vectors, default=0)
    return LayerSizes(max(layers), largest_vector, sum(n for n in numels.values() if n <= largest_vector))


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
