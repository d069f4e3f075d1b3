"""DeepSpeed's own configuration, generated from ours by one pure function.

Nothing is left to DeepSpeed's defaults that changes what is computed; reference: DeepSpeed 0.19.8.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

from swinv2_train.config import Config, ConfigError, EngineConfig, did_you_mean
from swinv2_train.engine.deepspeed.buckets import Buckets, buckets_of
from swinv2_train.engine.model_sizes import LayerSizes

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

RESERVED_KEYS = {
    "optimizer": "the optimizer is built from the optim section; set optim.*",
    "scheduler": "the learning rate comes from optim.schedule; set optim.schedule.*",
    "fp16": "set engine.precision=bf16 or fp32",
    "torch_autocast": "set engine.precision=bf16 or fp32",
    "wandb": "set log.wandb",
    "train_batch_size": "set train.global_batch_size",
    "activation_checkpointing": "DeepSpeed's engine ignores it; set model.recompute",
    "managed_gradient_accumulation": "the engine counts the accumulation steps itself",
}
"""Keys that we do not write but whose meaning is ours, and the key to set instead."""


NVME_BUFFERS = 16
"""Buffers for weights on disk: twice the 4 matrices of a block, and as much again for what is read ahead."""

OFFLOAD_STAGES: dict[str, tuple[int, ...]] = {
    "none": (),
    "cpu": (1, 2, 3),
    "nvme": (3,),
}
"""For each place to which the optimizer's state can be offloaded, the ZeRO stages that can do so."""


def check_engine(config: EngineConfig) -> None:
    """Raise ConfigError for what DeepSpeed accepts but computes wrongly, or cannot do.

    Called by every command that uses the engine before any process group is touched; each key alone is checked already.
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
    _check_offload(config)
    _check_states(config)
    zero = config.deepspeed_overrides.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("round_robin_gradients"):
        raise ConfigError(
            "engine.deepspeed_overrides.zero_optimization.round_robin_gradients: DeepSpeed then takes another "
            "parameter's master for a parameter's own when weights are read or loaded; leave it out"
        )
    if isinstance(zero, dict) and zero.get("compute_grad_norm") is False:
        raise ConfigError(
            "engine.deepspeed_overrides.zero_optimization.compute_grad_norm (false): gradients that are not finite "
            "would then move the weights; leave it out"
        )
    _check_overrides(config)


def _check_offload(config: EngineConfig) -> None:
    stages = OFFLOAD_STAGES[config.offload_optimizer]
    if stages and config.zero_stage not in stages:
        raise ConfigError(
            f"engine.offload_optimizer ({config.offload_optimizer}) needs engine.zero_stage "
            f"{', '.join(map(str, stages))}, not {config.zero_stage}"
        )
    if config.offload_param != "none" and config.zero_stage != 3:
        raise ConfigError(
            f"engine.offload_param ({config.offload_param}) needs engine.zero_stage 3, not {config.zero_stage}: "
            "only there a rank holds a share of the weights"
        )
    if config.offload_param != "none" and config.offload_optimizer == "none":
        raise ConfigError(
            f"engine.offload_param ({config.offload_param}) with engine.offload_optimizer (none): DeepSpeed moves the "
            "weights only together with the optimizer's state; set engine.offload_optimizer=cpu or nvme"
        )
    if "nvme" in (config.offload_param, config.offload_optimizer) and config.nvme_dir is None:
        raise ConfigError("engine.nvme_dir has no value; set it to a folder on a fast local disk")
    if "nvme" in (config.offload_param, config.offload_optimizer):
        _check_async_io()


def nvme_path(config: Config) -> str:
    """Where a run's ranks keep what is offloaded to disk: DeepSpeed empties it, so no two runs may share it."""
    name = hashlib.sha256(str(Path(config.run_dir).absolute()).encode()).hexdigest()[:12]
    return str(Path(str(config.engine.nvme_dir)) / f"swinv2_train-{name}")


def _check_async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "engine.offload_param or engine.offload_optimizer (nvme): DeepSpeed's async_io needs libaio's headers and "
            "library, which are not here; install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora), or use cpu"
        )


def _check_states(config: EngineConfig) -> None:
    if config.optimizer_states == "fp32":
        return
    if config.precision != "bf16" or config.zero_stage not in (2, 3):
        raise ConfigError(
            f"engine.optimizer_states (bf16) with engine.zero_stage ({config.zero_stage}) and engine.precision "
            f"({config.precision}): DeepSpeed's stage 1 keeps fp32 states all the same; set engine.zero_stage=2 or 3 "
            "and engine.precision=bf16"
        )
    if config.offload_optimizer != "none":
        raise ConfigError(
            f"engine.optimizer_states (bf16) with engine.offload_optimizer ({config.offload_optimizer}): DeepSpeed has "
            "this for its own CPU optimizer only; set engine.optimizer_states=fp32 or engine.offload_optimizer=none"
        )


def deepspeed_json(
    config: Config, world_size: int, accumulation_steps: int, sizes: LayerSizes, pin_memory: bool = False
) -> dict[str, Any]:
    """The dictionary that deepspeed.initialize gets.

    world_size: ranks; accumulation_steps: backward passes per optimizer step; sizes: of the model's layers;
    pin_memory: what is offloaded lies in page-locked memory, which an accelerator can read while it computes.
    Raises ConfigError for an override that DeepSpeed would not know or that contradicts a key of ours.
    """
    engine = config.engine
    check_engine(engine)
    generated = _generated(engine, buckets_of(engine, sizes))
    zero = generated["zero_optimization"]
    share = -(-sizes.largest_block // world_size)  # of a block, and so of its largest parameter at least
    for key in ("offload_optimizer", "offload_param"):
        if key in zero:
            zero[key]["pin_memory"] = pin_memory
            if zero[key]["device"] == "nvme":
                zero[key]["nvme_path"] = nvme_path(config)
    if engine.offload_param == "nvme":
        zero["offload_param"] |= {"max_in_cpu": 0, "buffer_size": share, "buffer_count": NVME_BUFFERS}
    if engine.offload_optimizer == "nvme":
        zero["sub_group_size"] = share  # what is read, stepped and written at a time
    generated["train_batch_size"] = config.train.micro_batch_size * accumulation_steps * world_size
    generated["train_micro_batch_size_per_gpu"] = config.train.micro_batch_size
    generated["gradient_accumulation_steps"] = accumulation_steps
    # Written even when 0: without the key DeepSpeed clips at 1.0.
    generated["gradient_clipping"] = config.optim.clip_grad_norm
    return _merged(generated, engine.deepspeed_overrides)


def _generated(engine: EngineConfig, buckets: Buckets) -> dict[str, Any]:
    """The keys that follow from the engine section and the model's layers."""
    generated: dict[str, Any] = {
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": None,
        "gradient_accumulation_steps": None,
        "gradient_clipping": None,
        "steps_per_print": 10**9,  # we log ourselves
        # One reference optimizer for all stages: torch's AdamW, also where DeepSpeed would like its own.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # DeepSpeed's default is the model's dtype
        "zero_optimization": {"stage": engine.zero_stage},
    }
    if engine.precision == "bf16":
        generated["bf16"]["check_grad_overflow"] = True  # a step with a non-finite norm is not taken
        generated["bf16"]["bf16_master_weights_and_grads"] = engine.optimizer_states == "bf16"
        generated["bf16"]["bf16_optimizer_states"] = engine.optimizer_states == "bf16"
    if engine.communication_data_type is not None:
        generated["communication_data_type"] = engine.communication_data_type
    zero = generated["zero_optimization"]
    if engine.zero_stage >= 1:
        zero["reduce_bucket_size"] = buckets.reduce_bucket_size
        zero["overlap_comm"] = engine.overlap_comm
        zero["contiguous_gradients"] = True
        if engine.offload_optimizer != "none":
            zero["offload_optimizer"] = {"device": engine.offload_optimizer}
    if engine.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = buckets.reduce_bucket_size
    if engine.zero_stage == 3:
        # DeepSpeed's own linear adds the bias in place: wrong gradients under selective recomputation.
        zero["memory_efficient_linear"] = False
        zero["stage3_prefetch_bucket_size"] = buckets.prefetch_bucket_size
        zero["stage3_param_persistence_threshold"] = buckets.persistence_threshold
        zero["stage3_max_reuse_distance"] = buckets.max_reuse_distance
        zero["stage3_max_live_parameters"] = buckets.max_live_parameters
        if engine.offload_param != "none":
            zero["offload_param"] = {"device": engine.offload_param}
    return generated


def _check_overrides(engine: EngineConfig) -> None:
    unknown = LayerSizes(0, 0, 0)  # the model's are not known yet; only which keys are ours counts here
    _merged(_generated(engine, buckets_of(engine, unknown)), engine.deepspeed_overrides)


def _merged(generated: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """generated plus overrides; raises ConfigError for an unknown top-level key and for any key of ours."""
    merged = copy.deepcopy(generated)
    for key, value in overrides.items():
        where = f"engine.deepspeed_overrides.{key}"
        if key in RESERVED_KEYS:
            raise ConfigError(f"{where}: {RESERVED_KEYS[key]} instead")
        if key not in KNOWN_KEYS:
            hint = did_you_mean(key, KNOWN_KEYS, otherwise="see DeepSpeed's configuration reference")
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
