"""The fastest setting that fits: ZeRO stage, recomputation, sequential stages, micro-batch and accumulation."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from swinv2_train.config import Config, ConfigError, HardwareConfig
from swinv2_train.engine.build import engine_memory
from swinv2_train.engine.compile import compile_choice
from swinv2_train.engine.memory import EngineMemory
from swinv2_train.monitoring.console import counted
from swinv2_train.planning.memory import MemoryPlan, extrapolated, memory_by_phase, model_sizes
from swinv2_train.planning.speed import PassSeconds, SpeedPlan, extrapolated_pass, pass_seconds, plan_speed
from swinv2_train.planning.start_warning import describe_shortfall
from swinv2_train.planning.table import host_line, length_line, memory_table, verdict
from swinv2_train.planning.trace import Trace, meta_task, trace_step
from swinv2_train.runtime.environment import GIB

POLICIES = ("none", "attention", "every:2", "every:4", "every:8", "blocks", "blocks@cpu")
"""Values of model.recompute that are tried; the config's own is too."""
FEW = 2
"""Images of the smaller trace.  One is special: much that is copied of several is a view of one."""
SLACK = 0.02
"""Share by which an estimate may exceed what is real: allocations are rounded up to whole units, and the time of a
single image is up to 1 % less than the others say."""


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


def recommend(config: Config, hardware: HardwareConfig, num_gpus: int, arguments: list[str], steps: int | None) -> str:
    """The fastest setting that fits with plan.margin, as text with the whole command; or what is missing.

    arguments: of the command, before what is recommended.  steps: of the run, where they are known.  The global batch
    stays as it is configured.
    """
    search = Search(config, hardware, num_gpus, partial(print, file=sys.stderr, flush=True))
    best = search.fastest()
    if best is not None:
        return _recommended(best, config, hardware, num_gpus, arguments, steps)
    if not search.estimates:
        config.task.check_ranks(num_gpus, accumulation_steps=1)
        pairs, least = (" in pairs, as mixup needs", "2 x ") if config.task.mixes else ("", "")
        raise ConfigError(
            f"train.global_batch_size ({config.train.global_batch_size}) cannot be divided among {num_gpus} ranks"
            f"{pairs}; set it to a multiple of {least}plan.num_gpus"
        )
    nearest = search.exact(min(search.estimates, key=lambda each: each.memory.peak).setting)
    changed = " ".join(_overrides(nearest.setting, config)) or "the setting as it is"
    return (
        f"nothing fits on {num_gpus} x {hardware.name}; nearest is {changed}:\n"
        f"{describe_shortfall(nearest.memory)}\n{memory_table(nearest.memory)}\n{_remedy(nearest, config)}"
    )


class Search:
    """Settings in the order of what they take at least, until none that is left can be faster than one that fits.

    Each policy is traced with a FEW images and with twice as many; what other micro-batches take is drawn out in
    straight lines, which says exactly how long operations take, and of the memory's peaks what they are at least (a
    highest value of straight lines bends upwards only).  What may win is traced as it is.
    """

    def __init__(
        self, config: Config, hardware: HardwareConfig, num_gpus: int, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """say: told every few seconds how far the search is."""
        self.config, self.hardware, self.num_gpus = config, hardware, num_gpus
        self.on_cpu = hardware.device == "cpu"
        self.sizes = model_sizes(meta_task(config), config)
        self._say = say
        self._traces: dict[tuple[str, tuple[int, ...], int, float], Trace] = {}
        self.estimates = list(self._estimates())
        """Every setting, taking no more memory and time than it really does."""

    def fastest(self) -> Candidate | None:
        """The fastest setting that fits; of equally fast ones the simplest.  None where none fits."""
        best: Candidate | None = None
        for estimate in sorted(self.estimates, key=self.preference):
            if best is not None and self.preference(best) <= self.preference(estimate):
                break
            if estimate.memory.free < -SLACK * estimate.memory.peak:
                continue
            candidate = self.exact(estimate.setting)
            if candidate.memory.fits and (best is None or self.preference(candidate) < self.preference(best)):
                best = candidate
        return best

    def exact(self, setting: Setting) -> Candidate:
        """A setting with the memory and speed that the plan of it says."""
        engine = self._engine(setting)
        trace = self._trace(setting, engine.kept_gradient_bytes)
        trace = trace.compiled() if self._compiles(setting) else trace
        return self._candidate(setting, engine, trace, pass_seconds(self.hardware, trace))

    def preference(self, candidate: Candidate) -> tuple[float, int, bool, bool, int, int]:
        """The smallest is the best: the fastest, and without what changes nothing."""
        setting = candidate.setting
        return (
            float(f"{candidate.speed.step_sec:.9g}"),
            len(setting.sequential_stages),
            setting.recompute != "none",
            setting.zero_stage != self.config.engine.zero_stage,
            setting.zero_stage,
            setting.micro_batch_size,
        )

    def _estimates(self) -> Iterator[Candidate]:
        sizes = micro_batch_sizes(self.config.train.global_batch_size, self.num_gpus)
        if self.config.task.mixes:  # in pairs
            sizes = [size for size in sizes if size % 2 == 0]
        sizes = [size for size in sizes if self._allowed(size)]
        if not sizes:
            return
        stage = self.config.engine.zero_stage
        self._trace(Setting(stage, "none", (), FEW), 0)  # which makes the tables that all the others find made
        self._traces.clear()
        policies = list(_policies(self.config))
        for recompute, all_stages in counted(policies, len(policies), "tracing model.recompute", self._say):
            known: list[Trace] = []
            for stages in all_stages:
                one = self._trace(Setting(stage, recompute, stages, FEW), 0)
                if one in known:  # a kernel that never holds the scores has no use for sequential stages
                    continue
                known.append(one)
                two = self._trace(Setting(stage, recompute, stages, 2 * FEW), 0)
                for size in sizes:
                    trace = extrapolated(one, two, size / FEW)
                    passes: dict[bool, PassSeconds] = {}
                    for zero_stage in _zero_stages(self.config):
                        setting = Setting(zero_stage, recompute, stages, size)
                        compiles = self._compiles(setting)
                        if compiles not in passes:
                            pair = (one.compiled(), two.compiled()) if compiles else (one, two)
                            seconds = extrapolated_pass(self.hardware, *pair, size / FEW)
                            passes[compiles] = seconds.times(1 - SLACK) if size == 1 else seconds
                        yield self._candidate(setting, self._engine(setting), trace, passes[compiles])

    def _allowed(self, micro_batch_size: int) -> bool:
        """Whether the run itself would take it."""
        try:
            self.config.task.check_ranks(self.num_gpus, self._accumulation(micro_batch_size))
        except ConfigError:
            return False
        return True

    def _accumulation(self, micro_batch_size: int) -> int:
        return self.config.train.global_batch_size // (micro_batch_size * self.num_gpus)

    def _candidate(self, setting: Setting, engine: EngineMemory, trace: Trace, passes: PassSeconds) -> Candidate:
        chosen = apply(self.config, setting)
        memory = memory_by_phase(chosen, self.hardware, engine, self.sizes, trace, self.num_gpus)
        return Candidate(setting, memory, plan_speed(chosen, self.hardware, self.sizes, passes, self.num_gpus))

    def _engine(self, setting: Setting) -> EngineMemory:
        accumulation = self._accumulation(setting.micro_batch_size)
        ema = self.config.optim.ema_decay is not None
        engine = apply(self.config, setting).engine
        return engine_memory(engine, self.sizes, self.num_gpus, accumulation, self.on_cpu, ema)

    def _compiles(self, setting: Setting) -> bool:
        return compile_choice(apply(self.config, setting), str(self.hardware.device), here=False).blocks

    def _trace(self, setting: Setting, kept_gradient_bytes: float) -> Trace:
        key = (setting.recompute, setting.sequential_stages, setting.micro_batch_size, kept_gradient_bytes)
        if key not in self._traces:
            config = apply(self.config, setting)
            config = replace(config, model=replace(config.model, compile="none"))  # which follows from the stage too
            self._traces[key] = trace_step(config, kept_gradient_bytes, self.on_cpu)
        return self._traces[key]


def apply(config: Config, setting: Setting) -> Config:
    """The configuration with a setting's values."""
    chosen = copy.deepcopy(config)
    chosen.engine.zero_stage = setting.zero_stage
    chosen.model.recompute = setting.recompute
    chosen.model.sequential_stages = list(setting.sequential_stages)
    chosen.train.micro_batch_size = setting.micro_batch_size
    return chosen


def micro_batch_sizes(global_batch_size: int, num_gpus: int) -> list[int]:
    """All that divide a rank's images of a step."""
    share, rest = divmod(global_batch_size, num_gpus)
    return [] if rest else [size for size in range(1, share + 1) if share % size == 0]


def _policies(config: Config) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Values of model.recompute, each with those of model.sequential_stages, none of them first."""
    num_stages = len(config.model.pretrained_window_sizes)
    sequential = {(), tuple(range(1, min(2, num_stages) + 1)), tuple(config.model.sequential_stages)}
    for recompute in dict.fromkeys((*POLICIES, config.model.recompute)):
        yield recompute, sorted(sequential, key=lambda stages: (len(stages), stages))


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
    """What of a setting is not the configuration's own."""
    own = Setting(
        config.engine.zero_stage,
        config.model.recompute,
        tuple(config.model.sequential_stages),
        config.train.micro_batch_size,
    )
    keys = {
        f"engine.zero_stage={setting.zero_stage}": setting.zero_stage != own.zero_stage,
        f"model.recompute={setting.recompute}": setting.recompute != own.recompute,
        f"model.sequential_stages=[{','.join(map(str, setting.sequential_stages))}]": setting.sequential_stages
        != own.sequential_stages,
        f"train.micro_batch_size={setting.micro_batch_size}": setting.micro_batch_size != own.micro_batch_size,
    }
    return [override for override, differs in keys.items() if differs]


def _recommended(
    best: Candidate,
    config: Config,
    hardware: HardwareConfig,
    num_gpus: int,
    arguments: list[str],
    steps: int | None,
) -> str:
    accumulation = config.train.global_batch_size // (best.setting.micro_batch_size * num_gpus)
    own = [each for each in arguments if not each.startswith(("hardware=", "hardware."))]
    overrides = _overrides(best.setting, config)
    keys = {each.partition("=")[0] for each in overrides}
    kept = [each for each in own if each.partition("=")[0] not in keys]
    nodes = -(-num_gpus // (hardware.gpus_per_node or num_gpus))
    launch = f"torchrun --nnodes {nodes} --nproc-per-node {num_gpus // nodes} -m swinv2_train.train"
    command = shlex.join([*kept, *overrides])
    return (
        f"{verdict(best.memory, hardware, num_gpus)}\n{host_line(best.memory, hardware, num_gpus)}\n"
        f"{best.speed.step_sec:.3g} s a step of {config.train.global_batch_size} images in {accumulation} micro-batches"
        f" of {best.setting.micro_batch_size}, {best.speed.images_per_sec:.3g} images/s\n"
        f"{length_line(steps, best.speed.step_sec, num_gpus)}\n\n{launch} {command}"
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
