"""Bytes that an engine holds on one rank, by part; each engine has its formula beside it, and the planner asks.

The formulas are read from the engines' code and torch's AdamW, and were checked allocation by allocation
(benchmarks/planner_memory_cpu_202611.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from swinv2_train.engine.model_sizes import ModelSizes

WEIGHTS, MASTERS, MOMENTS, GRADIENTS = "weights", "fp32 masters", "AdamW's averages", "gradients"
EMA = "averaged weights"
BUCKETS, LIVE, COPIES = "ZeRO buckets", "ZeRO-3 live weights", "gradient copies"


class PlacePeak(Protocol):
    """What formulas ask of the moment at which most is alive in one place of the model (planning/trace.py)."""

    @property
    def place(self) -> str:
        """Where in the model the pass is then."""
        ...

    @property
    def held_weights(self) -> int:
        """Bytes of weights of which autograd has saved a view and not yet used it."""
        ...


class StepTrace(Protocol):
    """What formulas ask of a micro-batch's forward and backward pass (planning/trace.py)."""

    @property
    def gradients(self) -> list[tuple[str, int]]:
        """The place in which each parameter's gradient is made and its elements, in the order of their making."""
        ...

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in the precision in which the model computes."""
        ...


@dataclass
class EngineMemory:
    """Bytes by part on one rank."""

    resident: dict[str, int] = field(default_factory=dict)
    """Always there."""
    backward: dict[str, int] = field(default_factory=dict)
    """On top, while the backward pass runs."""
    exchange: dict[str, int] = field(default_factory=dict)
    """On top, when the backward pass is over and gradients are exchanged."""
    step: dict[str, int] = field(default_factory=dict)
    """On top, while the optimizer makes its step."""
    host: dict[str, int] = field(default_factory=dict)
    """In CPU memory, always there."""
    disk: dict[str, int] = field(default_factory=dict)
    """In engine.nvme_dir."""
    kept_gradient_bytes: float = 0.0
    """What a gradient element leaves behind from its making to the step, besides what is resident."""

    def in_forward(self, trace: StepTrace, peak: PlacePeak) -> dict[str, int]:
        """On top of what is resident, in the forward pass's place of peak."""
        return {}

    def in_backward(self, trace: StepTrace, peak: PlacePeak) -> dict[str, int]:
        """On top of what is resident, in the backward pass's place of peak."""
        return self.backward

    def keep_earlier_gradients(self, trained: int, accumulation_steps: int) -> None:
        """Count the gradients of a step's earlier micro-batches, which are there all the time."""
        if accumulation_steps > 1 and self.kept_gradient_bytes:
            self.resident[GRADIENTS] = self.resident.get(GRADIENTS, 0) + int(self.kept_gradient_bytes * trained)
            self.kept_gradient_bytes = 0.0


def replicated_memory(sizes: ModelSizes, ema: bool) -> EngineMemory:
    """Where every rank has the whole model in fp32: 4N weights, 8T of AdamW, 4T gradients, made one by one.

    N: the parameters, T: those of them that are trained.  ema: averages are kept, 4T more (optim.ema_decay).
    AdamW is fused and takes no temporaries.
    """
    memory = EngineMemory(resident={WEIGHTS: 4 * sizes.parameters, MOMENTS: 8 * sizes.trained}, kept_gradient_bytes=4)
    if ema:
        memory.resident[EMA] = 4 * sizes.trained
    return memory
