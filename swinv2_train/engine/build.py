"""The engines by name: how each is built, and what it holds in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from swinv2_train.config import Config, EngineConfig
from swinv2_train.distributed import World
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.engine.compile import compile_blocks, compile_choice
from swinv2_train.engine.deepspeed.config import check_engine
from swinv2_train.engine.deepspeed.engine import ZeroEngine
from swinv2_train.engine.deepspeed.memory import zero_memory
from swinv2_train.engine.local import LocalEngine
from swinv2_train.engine.local_memory import local_memory
from swinv2_train.engine.memory import EngineMemory
from swinv2_train.engine.model_sizes import ModelSizes
from swinv2_train.engine.protocol import Engine


class EngineKind(NamedTuple):
    """What belongs to a value of engine.name."""

    build: Callable[..., Engine]
    """With build_engine's arguments."""
    memory: Callable[..., EngineMemory]
    """With engine_memory's arguments."""


ENGINES = {"deepspeed": EngineKind(ZeroEngine, zero_memory), "local": EngineKind(LocalEngine, local_memory)}


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
    if compile_choice(config, world.device.type).blocks:
        compile_blocks(module, block_types, fall_back=config.model.compile == "auto")
    return ENGINES[config.engine.name].build(module, param_groups, config, world, accumulation_steps, block_types)


def engine_memory(
    config: EngineConfig,
    sizes: ModelSizes,
    world_size: int,
    accumulation_steps: int,
    on_cpu: bool,
    ema: bool = False,
) -> EngineMemory:
    """What the engine that config.name says holds on each of world_size ranks, by the formulas beside it.

    on_cpu: the rank computes on the CPU, where gloo copies what it gathers.  ema: averages of the weights are kept
    (optim.ema_decay).
    """
    return ENGINES[config.name].memory(config, sizes, world_size, accumulation_steps, on_cpu, ema)
