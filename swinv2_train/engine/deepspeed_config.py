"""DeepSpeed's own configuration, generated from ours by one pure function.

Nothing is left to DeepSpeed's defaults that changes what is computed; reference: DeepSpeed 0.19.8.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from swinv2_train.config import Config, ConfigError, EngineConfig

# fmt: off
KNOWN_KEYS = frozenset([
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown",
    "optimizer", "pipeline", "prescale_gradients", "scheduler", "seq_parallel_communication_data_type",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb",
    "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
])
# fmt: on
"""Top-level keys that DeepSpeed 0.19.8 reads.  It ignores any other without a word, so we must not."""

_CLOSED = {
    "optimizer": "the optimizer is built from the optim section; set optim.*",
    "scheduler": "the learning rate comes from optim.schedule; set optim.schedule.*",
    "fp16": "set engine.precision=bf16 or fp32",
    "torch_autocast": "set engine.precision=bf16 or fp32",
    "wandb": "set log.wandb",
    "train_batch_size": "set train.global_batch_size",
    "managed_gradient_accumulation": "the engine counts the accumulation steps itself",
}
"""Keys that we do not write but whose meaning is ours, and the key to set instead."""


def check_engine(config: EngineConfig) -> None:
    """Raise ConfigError for what DeepSpeed accepts but computes wrongly, or cannot do.

    Called by the entry points before any process group is touched; the gate has checked each key alone.
    """
    if config.name == "local":
        if config.precision != "fp32":
            raise ConfigError(
                f"engine.precision ({config.precision}) with engine.name=local, which is the fp32 reference; "
                "set engine.precision=fp32 or engine.name=deepspeed"
            )
        return
    if config.zero_stage == 0 and config.precision == "bf16":
        raise ConfigError(
            "engine.zero_stage (0) with engine.precision (bf16): DeepSpeed takes a dummy optimizer step at "
            "its start, which shifts Adam's bias correction and the losses by 0.1; "
            "set engine.zero_stage=1 or engine.precision=fp32"
        )
    if config.zero_stage == 0 and config.offload_optimizer != "none":
        raise ConfigError("engine.offload_optimizer (cpu) needs engine.zero_stage 1, 2 or 3")
    zero = config.deepspeed_overrides.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("round_robin_gradients"):
        raise ConfigError(
            "engine.deepspeed_overrides.zero_optimization.round_robin_gradients: DeepSpeed then takes another "
            "parameter's master for a parameter's own when weights are read or loaded; leave it out"
        )
    _check_overrides(config)


def deepspeed_json(config: Config, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """The dictionary that deepspeed.initialize gets.

    world_size: ranks; accumulation_steps: backward passes per optimizer step.
    Raises ConfigError for an override that DeepSpeed would not know or that contradicts a key of ours.
    """
    engine = config.engine
    check_engine(engine)
    generated = _generated(engine)
    generated["train_batch_size"] = config.train.micro_batch_size * accumulation_steps * world_size
    generated["train_micro_batch_size_per_gpu"] = config.train.micro_batch_size
    generated["gradient_accumulation_steps"] = accumulation_steps
    # Written even when 0: without the key DeepSpeed clips at 1.0.
    generated["gradient_clipping"] = config.optim.clip_grad_norm
    return _merged(generated, engine.deepspeed_overrides)


def _generated(engine: EngineConfig) -> dict[str, Any]:
    """The keys that follow from the engine section alone."""
    generated: dict[str, Any] = {
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": None,
        "gradient_accumulation_steps": None,
        "gradient_clipping": None,
        "steps_per_print": 10**9,  # the log room speaks
        # One reference optimizer for all stages: torch's AdamW, also where DeepSpeed would like its own.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # DeepSpeed's default is the model's dtype
        "zero_optimization": {"stage": engine.zero_stage},
    }
    if engine.precision == "bf16":
        generated["bf16"]["check_grad_overflow"] = True  # a step with a non-finite norm is not taken
    zero = generated["zero_optimization"]
    if engine.zero_stage >= 1:
        zero["reduce_bucket_size"] = engine.reduce_bucket_size
        zero["overlap_comm"] = engine.overlap_comm
        zero["contiguous_gradients"] = True
        if engine.offload_optimizer != "none":
            zero["offload_optimizer"] = {"device": engine.offload_optimizer}
    if engine.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = engine.reduce_bucket_size
    if engine.zero_stage == 3:
        # DeepSpeed's own linear adds the bias in place: wrong gradients under selective recomputation.
        zero["memory_efficient_linear"] = False
        zero["stage3_prefetch_bucket_size"] = engine.prefetch_bucket_size
        zero["stage3_param_persistence_threshold"] = engine.persistence_threshold
        zero["stage3_max_reuse_distance"] = engine.max_reuse_distance
    return generated


def _check_overrides(engine: EngineConfig) -> None:
    _merged(_generated(engine), engine.deepspeed_overrides)


def _merged(generated: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """generated plus overrides; raises ConfigError for an unknown top-level key and for any key of ours."""
    merged = copy.deepcopy(generated)
    for key, value in overrides.items():
        where = f"engine.deepspeed_overrides.{key}"
        if key in _CLOSED:
            raise ConfigError(f"{where}: {_CLOSED[key]} instead")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "see DeepSpeed's configuration reference"
            raise ConfigError(f"{where} is no key that DeepSpeed reads (it would ignore it silently); {hint}")
        _add(merged, key, value, where)
    return merged


def _add(target: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set target[key] where we wrote nothing; go into sections of both."""
    if key in target and isinstance(target[key], dict) and isinstance(value, dict):
        for inner, inner_value in value.items():
            _add(target[key], str(inner), inner_value, f"{where}.{inner}")
    elif key in target:
        raise ConfigError(
            f"{where} ({value}) contradicts what we generate ({target[key]}); "
            "change the key of engine, train or optim that it comes from"
        )
    else:
        target[key] = copy.deepcopy(value)
