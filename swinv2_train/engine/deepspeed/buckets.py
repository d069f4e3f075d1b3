"""How much DeepSpeed gathers and reduces together, derived from the sizes of a model's layers.

A block is gathered and released as one, so it is the measure of all five numbers:

| key | where it is null |
|---|---|
| persistence_threshold | the largest vector or tensor of a position-bias MLP: all of these stay gathered on every rank (0.1 % of giant), as each of their gathers would cost a message for a few kilobytes |
| prefetch_bucket_size | the largest block: while one is computed the next one arrives |
| max_reuse_distance | the largest block: after its forward pass the last block stays for its backward pass, and no other |
| max_live_parameters | what stays gathered and two of the largest blocks: one in use, one arriving |
| reduce_bucket_size | the largest block, at most 100,000,000: DeepSpeed allocates up to two such buffers for good and two more in the backward pass |

max_live_parameters only holds back what is gathered ahead; what is in use is never refused.
"""  # noqa: E501

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from swinv2_train.config import EngineConfig

REDUCE_AT_MOST = 100_000_000


class LayerSizes(NamedTuple):
    """What the numbers are derived from, in elements."""

    largest_block: int
    """Of the largest block, or of the largest layer outside of blocks where that is larger."""
    largest_vector: int
    """Of the largest parameter with one dimension (besides those of length 1) or in a position-bias MLP."""
    small: int
    """Of all parameters with at most largest_vector elements together."""


class Buckets(NamedTuple):
    """DeepSpeed's sizes, in elements."""

    reduce_bucket_size: int
    prefetch_bucket_size: int
    persistence_threshold: int
    max_reuse_distance: int
    max_live_parameters: int


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


def buckets_of(config: EngineConfig, sizes: LayerSizes) -> Buckets:
    """The sizes that config.engine asks for, those that are null by the model's layers."""
    derived = Buckets(
        reduce_bucket_size=min(sizes.largest_block, REDUCE_AT_MOST),
        prefetch_bucket_size=sizes.largest_block,
        persistence_threshold=sizes.largest_vector,
        max_reuse_distance=sizes.largest_block,
        max_live_parameters=sizes.small + 2 * sizes.largest_block,
    )
    given = {key: getattr(config, key) for key in Buckets._fields}
    return derived._replace(**{key: value for key, value in given.items() if value is not None})


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
