"""The engine that a configuration names."""

from __future__ import annotations

from typing import Any

from torch import nn

from swinv2_train.config import Config
from swinv2_train.distributed import World
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.engine.compile import compile_blocks
from swinv2_train.engine.deepspeed.config import check_engine
from swinv2_train.engine.protocol import Engine


def build_engine(
    module: nn.Module,
    param_groups: list[dict[str, Any]],
    config: Config,
    world: World,
    accumulation_steps: int,
    block_types: tuple[type[nn.Module], ...],
) -> Engine:
    """The engine that config.engine names, holding the module on world.device.

    module: without values (models/initial.py), and then Engine.initialise or load must follow: under ZeRO-3 no rank
    ever holds it whole.  Or constructed plainly, in float32, on the CPU; rank 0's values are given to all ranks.
    param_groups: from training/param_groups.py.  accumulation_steps: backward passes per optimizer step.  block_types:
    the classes of which the module is mostly made, each of them recomputed, compiled and gathered as one.
    The process group must be up.  Raises ConfigError for a combination that cannot be computed right.
    """
    check_engine(config.engine)
    assert accumulation_steps >= 1, accumulation_steps
    apply_recompute(module, config.model.recompute, block_types)
    if config.model.compile == "blocks":
        compile_blocks(module, block_types)
    if config.engine.name == "local":
        from swinv2_train.engine.local import LocalEngine

        return LocalEngine(module, param_groups, config, world, accumulation_steps)
    from swinv2_train.engine.deepspeed.engine import ZeroEngine

    return ZeroEngine(module, param_groups, config, world, accumulation_steps, block_types)
