"""Which way every stage attends: tried on every rank before the states are made, the same on all, and told.

Legend: fused = by the kernels of models/kernels/, which hold no N x N scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from swinv2_train.config import Config
from swinv2_train.distributed import World, gather_objects
from swinv2_train.distributed.interruptible import unless_stopped
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.kernels import cpu_attention, failures
from swinv2_train.models.kernels.dispatch import fused_problem, tried, unknown
from swinv2_train.models.kernels.failures import Case, case_of
from swinv2_train.models.swin_v2 import Stage, SwinBlock
from swinv2_train.models.windows import Axes, window_grid
from swinv2_train.runtime import StopRequest

KERNELS = {"cuda": "Triton fused", "cpu": "C++ fused"}


class _Stage(NamedTuple):
    number: int
    blocks: list[SwinBlock]
    cases: list[Case]
    unknown: str | None
    """What the kernels do not know of it."""


class AttentionPaths:
    """The stages' ways to attend.  All methods are collective."""

    def __init__(
        self,
        config: Config,
        world: World,
        encoder: SwinTransformerV2,
        say: Callable[[str], None],
        changed: Callable[[dict[str, str]], None],
        stop: StopRequest | None = None,
    ) -> None:
        """Try the kernels on what the stages will ask of them; where any rank fails at a stage, none uses them there,
        or their numbers would differ.

        encoder: at the image size that is trained; it may be without values.  say: prints a line, on rank 0.
        changed: called on every rank with record(), whenever it is another than it was at the start.  stop: may come
        while kernels are compiled and tried; StopNow on every rank.
        """
        self._world, self._say, self._changed = world, say, changed
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._stages = [
            _stage(number, stage, size, dtype, world.device)
            for number, (stage, size) in enumerate(zip(encoder.layers, encoder.sizes, strict=True), start=1)
        ]
        self._why: dict[int, str] = {}
        if config.model.attention != "fused":
            self._why = {stage.number: f"model.attention={config.model.attention}" for stage in self._stages}
        else:
            compile_kernel(world, say, stop)
            self._stop_using(gather_objects(unless_stopped(stop, self._found)))

    def record(self) -> dict[str, str]:
        """{"stage 1": "Triton fused" | "C++ fused" | "sequential: WHY" | "reference: WHY", ...}"""
        paths = {}
        for number, blocks, _, _ in self._stages:
            slow = "sequential" if blocks[0].attn.chunks is not None else "reference"
            fused = KERNELS.get(self._world.device.type, "fused")
            paths[f"stage {number}"] = f"{slow}: {self._why[number]}" if number in self._why else fused
        return paths

    def fell_back(self) -> bool:
        """Whether a kernel has failed on any rank since the last call; if so no rank uses it any more at its stages."""
        everyone = gather_objects(failures.pending())
        failures.agreed()
        found = [self._affected(pending) for pending in everyone]
        if any(found):
            self._stop_using(found, "the step is taken again")
            self._changed(self.record())
        return any(found)

    def _found(self) -> dict[int, str]:
        """What is wrong on this rank, by stage."""
        if (problem := fused_problem(self._world.device)) is not None:
            return {stage.number: problem for stage in self._stages}
        found = {stage.number: stage.unknown for stage in self._stages if stage.unknown is not None}
        problems = tried(
            [case for stage in self._stages if stage.unknown is None for case in stage.cases], self._world.device
        )
        return self._affected(problems) | found

    def _affected(self, problems: Mapping[Case, str]) -> dict[int, str]:
        """The stages of these cases, and what is wrong there; all of them where a case is no stage's at this size."""
        affected: dict[int, str] = {}
        for case, problem in problems.items():
            of_case = [stage for stage in self._stages if case in stage.cases] or self._stages
            for stage in of_case:
                affected.setdefault(stage.number, f"the kernels failed ({case}): {problem}")
        return affected

    def _stop_using(self, everyone: list[dict[int, str]], then: str = "") -> None:
        """Let no rank use the kernels where any says why not, and say so once for all stages of one cause."""
        stages_by_cause: dict[str, list[int]] = {}
        for number, blocks, _, _ in self._stages:
            causes = {rank: found[number] for rank, found in enumerate(everyone) if number in found}
            if not causes or number in self._why:
                continue
            rank, cause = next(iter(causes.items()))
            if len(causes) < self._world.world_size:
                others = f" and {len(causes) - 1} more" if len(causes) > 1 else ""
                cause = f"rank {rank}{others}: {cause}"
            self._why[number] = cause
            stages_by_cause.setdefault(cause, []).append(number)
            for block in blocks:
                block.attn.fused = False
        for cause, stages in stages_by_cause.items():
            where = "" if len(stages) == len(self._stages) else f" in stage {', '.join(map(str, stages))}"
            serves = self.record()[f"stage {stages[0]}"].partition(":")[0]
            again = f"; {then}" if then else ""
            self._say(
                f"warning: model.attention (fused) is not used{where}: {cause}; the {serves} path serves, which is "
                f"several times slower{again}"
            )


def compile_kernel(world: World, say: Callable[[str], None], stop: StopRequest | None = None) -> None:
    """Have the C++ kernel compiled where ranks compute on CPUs and no earlier start has: on each host by one rank, and
    the others load what it made.  Collective.

    say: is told before, on rank 0, as it may take minutes.  stop: may come meanwhile; StopNow on every rank.
    """
    if world.device.type != "cpu":
        return
    compiles = gather_objects(world.local_rank == 0 and cpu_attention.will_compile())
    if not any(compiles):
        return
    if world.is_main:
        say("note: compiling the attention kernel for this processor, once: 10 s to some minutes")
    unless_stopped(stop, lambda: cpu_attention.problem() if compiles[world.rank] else None)


def _stage(number: int, stage: object, size: Axes, dtype: torch.dtype, device: torch.device) -> _Stage:
    """What a stage asks of the kernels at this map."""
    assert isinstance(stage, Stage)
    blocks = [block for block in stage.modules() if isinstance(block, SwinBlock)]
    cases, problem = [], None
    for block in blocks:
        grid = window_grid(size, block.window_size, block.shifted, block.clamp_to_shorter_side)
        heads = block.attn.num_heads
        dim = block.attn.proj.in_features // heads
        problem = problem or unknown(device, dtype, grid, heads, dim)
        cases.append(case_of(dtype, grid, dim))
    return _Stage(number, blocks, list(dict.fromkeys(cases)), problem)
