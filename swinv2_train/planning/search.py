"""The fastest setting that fits: ZeRO stage, recomputation, sequential stages, micro-batch and accumulation."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from swinv2_train.config import Config, ConfigError, HardwareConfig
from swinv2_train.engine.build import engine_memory
from swinv2_train.planning.memory import MemoryPlan, memory_by_phase, model_sizes, plan_memory, scale
from swinv2_train.planning.speed import SpeedPlan, pass_seconds, plan_speed
from swinv2_train.planning.start_warning import describe_shortfall
from swinv2_train.planning.table import memory_table, verdict
from swinv2_train.planning.trace import meta_task, trace_step
from swinv2_train.runtime.environment import GIB

POLICIES = ("none", "attention", "every:2", "every:4", "every:8", "blocks", "blocks@cpu")
"""Values of model.recompute that are tried; the config's own is too."""


@dataclass(frozen=True)
class Setting:
    """What is chosen."""

    zero_stage: int
    recompute: str
    sequential_stages: tuple[int, ...]
    micro_batch_size: int


@dataclass(frozen=True)
class Candidate:
    setting: Setting
    memory: MemoryPlan
    speed: SpeedPlan


def recommend(config: Config, hardware: HardwareConfig, num_gpus: int, arguments: list[str]) -> str:
    """The fastest setting that fits with plan.margin, as text with the whole command; or what is missing.

    arguments: of the command, before what is recommended.  The global batch stays as it is configured.
    Each policy is traced once with one image; what a larger micro-batch takes is scaled from that, and the winner is
    traced as it is before it is named.
    """
    found = sorted(candidates(config, hardware, num_gpus), key=lambda each: each.speed.step_sec)
    for candidate in (each for each in found if each.memory.fits):
        chosen = apply(config, candidate.setting)
        memory, trace = plan_memory(chosen, hardware, num_gpus)
        if memory.fits:
            speed = plan_speed(chosen, hardware, memory.sizes, pass_seconds(hardware, trace), num_gpus)
            return _recommended(Candidate(candidate.setting, memory, speed), config, hardware, num_gpus, arguments)
    if not found:
        pairs, least = (" in pairs, as mixup needs", "2 x ") if config.task.mixes else ("", "")
        raise ConfigError(
            f"train.global_batch_size ({config.train.global_batch_size}) cannot be divided among {num_gpus} ranks"
            f"{pairs}; set it to a multiple of {least}plan.num_gpus"
        )
    nearest = min(found, key=lambda each: each.memory.peak)
    return (
        f"nothing fits on {num_gpus} x {hardware.name}; nearest is {' '.join(_overrides(nearest.setting, config))}:\n"
        f"{describe_shortfall(nearest.memory)}\n{memory_table(nearest.memory)}\n{_remedy(nearest, config)}"
    )


def candidates(config: Config, hardware: HardwareConfig, num_gpus: int) -> Iterator[Candidate]:
    """Every setting, with its memory and speed estimated from traces of one image."""
    on_cpu, ema = hardware.device == "cpu", config.optim.ema_decay is not None
    sizes = model_sizes(meta_task(config), config)
    for recompute, stages in _policies(config):
        trace = trace_step(apply(config, Setting(config.engine.zero_stage, recompute, stages, 1)), 0, on_cpu)
        passes = pass_seconds(hardware, trace)
        for zero_stage in _zero_stages(config):
            for size in micro_batch_sizes(config.train.global_batch_size, num_gpus):
                if size % 2 and config.task.mixes:
                    continue
                setting = Setting(zero_stage, recompute, stages, size)
                chosen = apply(config, setting)
                accumulation = config.train.global_batch_size // (size * num_gpus)
                engine = engine_memory(chosen.engine, sizes, num_gpus, accumulation, on_cpu, ema)
                scaled = scale(trace, size, int(engine.kept_gradient_bytes * sizes.parameters))
                memory = memory_by_phase(chosen, hardware, engine, sizes, scaled, num_gpus)
                speed = plan_speed(chosen, hardware, sizes, passes.times(size), num_gpus)
                yield Candidate(setting, memory, speed)


def apply(config: Config, setting: Setting) -> Config:
    """The configuration with a setting's values."""
    chosen = copy.deepcopy(config)
    chosen.engine.zero_stage = setting.zero_stage
    chosen.model.recompute = setting.recompute
    chosen.model.sequential_stages = list(setting.sequential_stages)
    chosen.train.micro_batch_size = setting.micro_batch_size
    return chosen


def micro_batch_sizes(global_batch_size: int, num_gpus: int) -> list[int]:
    """Powers of two, and the whole share of a rank, that divide a rank's images of a step."""
    share, rest = divmod(global_batch_size, num_gpus)
    if rest:
        return []
    return sorted({size for size in (2**k for k in range(12)) if share % size == 0} | {share})


def _policies(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    num_stages = len(config.model.pretrained_window_sizes)
    sequential = {(), tuple(range(1, min(2, num_stages) + 1)), tuple(config.model.sequential_stages)}
    for recompute in dict.fromkeys((*POLICIES, config.model.recompute)):
        for stages in sorted(sequential):
            yield recompute, stages


def _zero_stages(config: Config) -> list[int]:
    if config.engine.name == "local":
        return [config.engine.zero_stage]
    if config.engine.offload_param != "none" or config.engine.offload_optimizer == "nvme":
        return [3]
    if config.engine.offload_optimizer != "none":
        return [1, 2, 3]
    if config.engine.optimizer_states == "bf16":
        return [2, 3]
    return [0, 1, 2, 3] if config.engine.precision == "fp32" else [1, 2, 3]


def _overrides(setting: Setting, config: Config) -> list[str]:
    engine = [] if config.engine.name == "local" else [f"engine.zero_stage={setting.zero_stage}"]
    return [
        *engine,
        f"model.recompute={setting.recompute}",
        f"model.sequential_stages=[{','.join(map(str, setting.sequential_stages))}]",
        f"train.micro_batch_size={setting.micro_batch_size}",
    ]


def _recommended(best: Candidate, config: Config, hardware: HardwareConfig, num_gpus: int, arguments: list[str]) -> str:
    accumulation = config.train.global_batch_size // (best.setting.micro_batch_size * num_gpus)
    own = [each for each in arguments if not each.startswith(("hardware=", "hardware."))]
    overrides = _overrides(best.setting, config)
    keys = {each.partition("=")[0] for each in overrides}
    kept = [each for each in own if each.partition("=")[0] not in keys]
    nodes = -(-num_gpus // (hardware.gpus_per_node or num_gpus))
    launch = f"torchrun --nnodes {nodes} --nproc-per-node {num_gpus // nodes} -m swinv2_train.train"
    command = shlex.join([*kept, *overrides])
    return (
        f"{verdict(best.memory, hardware, num_gpus)}\n"
        f"{best.speed.step_sec:.3g} s a step of {config.train.global_batch_size} images in {accumulation} micro-batches"
        f" of {best.setting.micro_batch_size}, {best.speed.images_per_sec:.3g} images/s\n\n{launch} {command}"
    )


def _remedy(nearest: Candidate, config: Config) -> str:
    parts = nearest.memory.phases[nearest.memory.peak_phase]
    held = sum(n for name, n in parts.items() if not name.startswith(("activations", "workspace"))) / GIB
    rest = nearest.memory.peak / GIB - held
    if held > rest:
        return f"weights, gradients and optimizer take {held:.1f} GiB: more ranks, or engine=zero3_offload"
    return (
        f"one image's activations take {rest:.1f} GiB: a smaller model.img_size or model.window_size, or more of "
        "model.sequential_stages"
    )
