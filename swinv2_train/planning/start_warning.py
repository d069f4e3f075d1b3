"""The planner's word at the start of a run: one line where it will not fit, and nothing is ever stopped."""

from __future__ import annotations

import math

from swinv2_train.config import Config, ConfigError
from swinv2_train.distributed import World
from swinv2_train.planning.hardware import fill_from_machine
from swinv2_train.planning.memory import MemoryPlan, plan_memory
from swinv2_train.runtime.environment import GIB
from swinv2_train.tasks.task import Task

ROUGH_BYTES = 4 * 40
"""No block keeps more than 40 floats for a channel of a token, or 8 for a pair of tokens and head, and no engine more
than 40 bytes of a parameter."""


def memory_warning(config: Config, world: World, task: Task) -> str | None:
    """A line for the user where this run needs more memory than each rank has; None where it fits.

    task: what is trained, with or without values.  Small runs are not traced: where a generous bound is half of the
    memory at hand, this costs nothing.
    """
    hardware = fill_from_machine(config.hardware, world.local_world_size, rates=False)
    assert hardware.memory_gib is not None and hardware.reserved_gib is not None, "complete"
    if rough_bytes(config, task) < 0.5 * (hardware.memory_gib - hardware.reserved_gib) * GIB:
        return None
    try:
        plan, _ = plan_memory(config, hardware, world.world_size)
    except ConfigError:
        return None  # the run itself says what is wrong
    return None if plan.fits else describe_shortfall(plan)


def rough_bytes(config: Config, task: Task) -> int:
    """A generous bound of what a rank needs, without running anything."""
    encoder, total = task.encoder, 0
    for i, (grid, depth, heads) in enumerate(zip(encoder.grids, encoder.depths, encoder.num_heads, strict=True)):
        tokens, window = math.prod(grid.padded), math.prod(grid.window)
        total += (depth + 1) * tokens * (ROUGH_BYTES * encoder.embed_dim * 2**i + 32 * heads * window)
    parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in task.module.parameters())
    return config.train.micro_batch_size * total + 40 * parameters


def describe_shortfall(plan: MemoryPlan) -> str:
    """What does not fit: how much, when, and the largest part."""
    parts = plan.phases[plan.peak_phase]
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"{plan.peak / GIB:.3g} GiB are needed in the {plan.peak_phase}, {-plan.free / GIB:.3g} GiB more than the "
        f"{plan.available * (1 - plan.margin) / GIB:.3g} GiB that may be used; the largest part is {largest} "
        f"({parts[largest] / GIB:.3g} GiB)"
    )
