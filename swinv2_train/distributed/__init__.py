"""Ranks: the process group, the few collectives that the rest needs, what SLURM says, and whether all started alike.

Knows config and runtime.
"""

from swinv2_train.distributed.collectives import (
    RankError,
    World,
    all_gather,
    all_reduce_max,
    all_reduce_sum,
    all_to_all,
    any_rank,
    barrier,
    broadcast_object,
    gather_objects,
    on_main,
    raise_together,
    sum_with_gradient,
)
from swinv2_train.distributed.process_group import init_distributed, shutdown_distributed

__all__ = [
    "RankError",
    "World",
    "all_gather",
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "broadcast_object",
    "all_to_all",
    "gather_objects",
    "all_reduce_max",
    "init_distributed",
    "on_main",
    "raise_together",
    "shutdown_distributed",
    "sum_with_gradient",
]
