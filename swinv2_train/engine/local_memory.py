"""Bytes that the local engine holds: the whole model in fp32, AdamW's two numbers of each weight, and gradients."""

from __future__ import annotations

from swinv2_train.config import EngineConfig
from swinv2_train.engine.memory import EngineMemory, replicated_memory
from swinv2_train.engine.model_sizes import ModelSizes


def local_memory(
    config: EngineConfig, sizes: ModelSizes, world_size: int, accumulation_steps: int, on_cpu: bool, ema: bool
) -> EngineMemory:
    """What the one process of the local engine holds; arguments as for engine_memory (engine/build.py)."""
    memory = replicated_memory(sizes, ema)
    memory.keep_earlier_gradients(sizes.trained, accumulation_steps)
    return memory
