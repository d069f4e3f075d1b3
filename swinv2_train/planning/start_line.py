"""What a run computes with and roughly how long it takes: one line before its first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from swinv2_train.config import Config
from swinv2_train.distributed import World
from swinv2_train.engine.compile import compile_choice
from swinv2_train.models.attention import WindowAttention
from swinv2_train.monitoring.metrics import device_peak_flops
from swinv2_train.planning.table import time_text
from swinv2_train.runtime import arithmetic_record
from swinv2_train.runtime.cpu_speed import CpuSpeed, cpu_speed, slow_bf16
from swinv2_train.tasks.task import Task

SHARE_OF_PEAK = 0.35
"""Of the rate of matrix products alone that a whole step reaches, roughly; the planner looks closer."""


@dataclass(frozen=True)
class Start:
    """What environment.json keeps of a start's device and expectations."""

    device: str
    precision: str
    engine: str
    parameters: int
    attention: str
    """fused, or reference where no stage is."""
    attention_paths: dict[str, str]
    """How each stage attends, and why (training/attention_paths.py)."""
    compile: str
    """blocks or none, and why."""
    step_sec: float | None
    """Expected seconds of a step, by arithmetic alone; None where the device's rate is not known."""
    arithmetic: dict[str, Any]
    """TF32, cuDNN's choices, deterministic operations (runtime/arithmetic.py)."""
    slow_bf16: str | None
    """What is said of bf16 on this processor; None where it is not used or as fast as it should be."""

    def line(self, steps_left: int) -> str:
        """For the console."""
        parts = [
            f"{self.device}, {self.precision}, {self.engine}, {self.parameters / 1e6:,.1f} M parameters",
            f"{self.attention} attention, compiled: {self.compile}",
        ]
        if self.step_sec is not None:
            left = time_text(steps_left * self.step_sec)
            parts.append(f"expected: roughly {time_text(self.step_sec)} a step, {left} for {steps_left:,} steps")
        return "; ".join(parts)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def describe_start(config: Config, world: World, task: Task, attention_paths: dict[str, str]) -> Start:
    """What this start computes with.  task: as it is trained, its attention chosen.

    On a CPU the time follows from the rate that was measured on this machine (runtime/cpu_speed.py).
    """
    speed = cpu_speed() if world.device.type == "cpu" else None
    precision, name = config.engine.precision, config.engine.name
    parameters = sum(int(getattr(each, "ds_numel", each.numel())) for each in task.module.parameters())
    fused = any(each.fused for each in task.module.modules() if isinstance(each, WindowAttention))
    return Start(
        device=_device_text(world),
        precision=precision,
        engine="plain torch" if name == "local" else f"DeepSpeed ZeRO-{config.engine.zero_stage}",
        parameters=parameters,
        attention="fused" if fused else "reference",
        attention_paths=attention_paths,
        compile=str(compile_choice(config, world.device.type)),
        step_sec=_step_sec(config, world, task, speed),
        arithmetic=arithmetic_record(),
        slow_bf16=slow_bf16(speed) if speed is not None and precision == "bf16" else None,
    )


def _device_text(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}" + (" a rank" if world.world_size > 1 else "")


def _step_sec(config: Config, world: World, task: Task, speed: CpuSpeed | None) -> float | None:
    """Three forward passes an image, four where everything is computed again, at a share of the rate of products."""
    if speed is not None:
        rate = speed.bf16_gflops if config.engine.precision == "bf16" else speed.fp32_gflops
        peak: float | None = rate * 1e9 * torch.get_num_threads()
    else:
        peak = device_peak_flops(world.device, config.engine.precision)
    if peak is None:
        return None
    passes = 4 if config.model.recompute.startswith("blocks") else 3
    images = config.train.global_batch_size / world.world_size
    return passes * 2 * task.multiply_adds * images / (SHARE_OF_PEAK * peak)
