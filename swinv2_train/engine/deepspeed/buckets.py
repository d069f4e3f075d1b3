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

from swinv2_train.config import EngineConfig
from swinv2_train.engine.model_sizes import LayerSizes

REDUCE_AT_MOST = 100_000_000


class Buckets(NamedTuple):
    """DeepSpeed's sizes, in elements."""

    reduce_bucket_size: int
    prefetch_bucket_size: int
    persistence_threshold: int
    max_reuse_distance: int
    max_live_parameters: int


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
