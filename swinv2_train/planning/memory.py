"""How much memory a rank needs, when it needs most, and whether it has that much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from swinv2_train.config import Config, HardwareConfig
from swinv2_train.data.loading.loader import accumulation_steps
from swinv2_train.data.loading.workers import MOST_WORKERS
from swinv2_train.engine.build import engine_memory
from swinv2_train.engine.memory import GRADIENTS, EngineMemory
from swinv2_train.engine.model_sizes import ModelSizes, layer_sizes
from swinv2_train.models import count_parameters
from swinv2_train.models.batch_norm import BatchNorm
from swinv2_train.planning.hardware import required
from swinv2_train.planning.trace import Peak, Trace, meta_task, trace_step
from swinv2_train.runtime.environment import GIB
from swinv2_train.tasks.task import Task
from swinv2_train.training.param_groups import build_param_groups

FORWARD, BACKWARD, EXCHANGE, STEP = "forward", "backward", "gradient exchange", "step"
LOADER, SAVED_INPUTS, TABLES = "micro-batches", "block inputs in CPU memory", "tables"
PINNED = "page-locked copies of micro-batches"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by part, in each phase of a step."""

    phases: dict[str, dict[str, int]]
    """On the device: forward, backward, gradient exchange, step."""
    host: dict[str, int]
    """In CPU memory; on a CPU the phases hold these too."""
    disk: dict[str, int]
    resident: int
    """On the device between two steps."""
    available: int
    """What the device has for all this."""
    margin: float
    """Share of the available bytes that should stay free."""
    sizes: ModelSizes

    @property
    def peak_phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.peak_phase].values())

    @property
    def free(self) -> int:
        """Bytes that stay free beyond the margin; negative where it does not fit."""
        return int(self.available * (1 - self.margin)) - self.peak

    @property
    def fits(self) -> bool:
        return self.free >= 0


def model_sizes(task: Task, config: Config) -> ModelSizes:
    """What the engine's formulas need of a task's module, on any device."""
    module = task.module
    groups = build_param_groups(module, config.optim)
    numels = [[parameter.numel() for parameter in group["params"]] for group in groups]
    blocks = [list(child.parameters()) for child in module.modules() if isinstance(child, task.block_types)]
    inside = {id(parameter) for block in blocks for parameter in block}
    return ModelSizes(
        parameters=count_parameters(module),
        largest_parameter=max(max(group) for group in numels),
        groups=tuple(sum(group) for group in numels),
        layers=layer_sizes(module, task.block_types),
        blocks=tuple(tuple(parameter.numel() for parameter in block) for block in blocks),
        others=tuple(parameter.numel() for parameter in module.parameters() if id(parameter) not in inside),
        synced_norms=tuple(
            child.weight.numel()
            for child in module.modules()
            if isinstance(child, BatchNorm) and child.total is not None
        ),
    )


def plan_memory(config: Config, hardware: HardwareConfig, world_size: int) -> tuple[MemoryPlan, Trace]:
    """The memory of one rank among world_size, and the trace it was taken from.

    hardware: without null values (planning/hardware.py).  Raises ConfigError where model, batch and ranks do not fit
    together.
    """
    on_cpu = hardware.device == "cpu"
    accumulation = accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    config.task.check_ranks(world_size, accumulation)
    sizes = model_sizes(meta_task(config), config)
    ema = config.optim.ema_decay is not None
    engine = engine_memory(config.engine, sizes, world_size, accumulation, on_cpu, ema)
    trace = trace_step(config, engine.kept_gradient_bytes, on_cpu)
    return memory_by_phase(config, hardware, engine, sizes, trace, world_size), trace


def memory_by_phase(
    config: Config, hardware: HardwareConfig, engine: EngineMemory, sizes: ModelSizes, trace: Trace, world_size: int
) -> MemoryPlan:
    """Engine, activations and loader, phase by phase."""
    accumulation = accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    kept = {GRADIENTS: int(engine.kept_gradient_bytes * sizes.trained), TABLES: trace.backward.tables}
    phases = {
        FORWARD: _highest(
            _sum(engine.resident, engine.in_forward(trace, peak), _activations(peak)) for peak in trace.forward_peaks
        ),
        BACKWARD: _highest(
            _sum(engine.resident, engine.in_backward(trace, peak), _activations(peak)) for peak in trace.backward_peaks
        ),
        EXCHANGE: _sum(engine.resident, engine.exchange, kept),
        STEP: _sum(engine.resident, engine.step, kept),
    }
    loaded = loader_bytes(config, trace, accumulation)
    host = _sum(engine.host, {SAVED_INPUTS: trace.host_bytes, LOADER: loaded})
    if hardware.device == "cpu":
        phases = {phase: _sum(parts, engine.host, {LOADER: loaded}) for phase, parts in phases.items()}
    else:
        if config.data.num_workers:
            host = _sum(host, {PINNED: loaded})
        copied = {LOADER: 2 * trace.batch_bytes}  # the one at work, and the next one (training/prefetch.py)
        phases = {phase: _sum(parts, copied) for phase, parts in phases.items()}
    return MemoryPlan(
        phases=phases,
        host=host,
        disk=engine.disk,
        resident=sum(engine.resident.values()) + trace.backward.tables,
        available=int((required(hardware.memory_gib) - required(hardware.reserved_gib)) * GIB),
        margin=config.plan.margin,
        sizes=sizes,
    )


def extrapolated(few: Trace, more: Trace, times: float) -> Trace:
    """The peaks of `times` as many images as few has, along straight lines through few and more, which has twice as
    many.  No higher than they really are, where a peak is a highest value of straight lines.  Operations are few's.
    """

    def number(one: int, two: int) -> int:
        return max(0, round(one + (two - one) * (times - 1)))

    def parts(one: dict[str, int], two: dict[str, int]) -> dict[str, int]:
        return {part: number(one.get(part, 0), two.get(part, 0)) for part in one | two}

    def peak(one: Peak, two: Peak) -> Peak:
        return replace(
            one,
            kept=parts(one.kept, two.kept),
            workspace=parts(one.workspace, two.workspace),
            tables=number(one.tables, two.tables),
            gradients=number(one.gradients, two.gradients),
        )

    return replace(
        few,
        forward_peaks=list(map(peak, few.forward_peaks, more.forward_peaks)),
        backward_peaks=list(map(peak, few.backward_peaks, more.backward_peaks)),
        host_bytes=number(few.host_bytes, more.host_bytes),
        batch_bytes=number(few.batch_bytes, more.batch_bytes),
    )


def loader_bytes(config: Config, trace: Trace, accumulation_steps: int) -> int:
    """Decoded images in CPU memory: those of the step, and what the workers have prepared."""
    workers = MOST_WORKERS if config.data.num_workers is None else config.data.num_workers
    return trace.batch_bytes * (accumulation_steps + workers * config.data.prefetch_batches)


def _activations(peak: Peak) -> dict[str, int]:
    parts = {f"activations, {part}": nbytes for part, nbytes in sorted(peak.kept.items())}
    workspace = {f"workspace, {kind}": nbytes for kind, nbytes in sorted(peak.workspace.items())}
    return parts | workspace | {TABLES: peak.tables, GRADIENTS: peak.gradients}


def _highest(places: Iterable[dict[str, int]]) -> dict[str, int]:
    """The parts in the place where they are most together."""
    return max(places, key=lambda parts: sum(parts.values()))


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in parts:
        total.update(each)
    return {part: nbytes for part, nbytes in total.items() if nbytes}
