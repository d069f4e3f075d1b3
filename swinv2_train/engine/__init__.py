"""The one protocol behind which training runs: DeepSpeed's ZeRO stages, or plain torch as the numerical reference.

deepspeed and fairscale are known to this folder alone, and imported only when an engine is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from swinv2_train.config import Config
from swinv2_train.distributed import World
from swinv2_train.engine.checks import NonFiniteError
from swinv2_train.engine.compile import compile_blocks
from swinv2_train.engine.construct import Values
from swinv2_train.engine.deepspeed_config import check_engine
from swinv2_train.engine.recompute import apply_recompute
from swinv2_train.engine.shards import Snapshot


class Engine(Protocol):
    """What the loop and the checkpoints need from an engine.  One optimizer step is

        for micro_batch in micro_batches:           # accumulation_steps of them
            outputs = engine.forward(**micro_batch)
            engine.backward(outputs["loss"])
        grad_norm = engine.step(lr)

    All methods are collective: every rank calls them in the same order.
    """

    module: nn.Module
    """The trained module with official parameter names.  Under ZeRO-3 its parameters are empty outside of forward."""

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The module's outputs in training mode.  inputs: float32 or integer tensors on any device; moved here."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss / accumulation_steps.  loss: () mean over this rank's micro-batch."""
        ...

    def step(self, lr: float) -> float:
        """Clip and update with lr x lr_scale in each group, then clear the gradients.

        Returns the global gradient norm before clipping (of the mean over ranks and micro-batches).
        Raises NonFiniteError on every rank, weights and optimizer state untouched, when that norm is not finite.
        """
        ...

    def evaluate(self, **inputs: Tensor | bool) -> dict[str, Tensor]:
        """The module's outputs in evaluation mode without gradients.  Ranks must make equally many calls.

        inputs: as forward's, and flags that the module knows.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the weights are their averages, for evaluate() and full_tensors(); then they are as before, bit for
        bit.  Between steps, and with optim.ema_decay, only.  Takes no second copy of the weights.
        """
        ...

    def snapshot(self, copy: bool) -> Snapshot:
        """This rank's part of weights, masters and optimizer state, which it can write without the engine.

        copy: the part is copied to CPU memory by a thread, and training may go on at once: step(), load() and
        load_full() wait for the copy.  The memory is kept for the next such snapshot.  Else the part is a view.
        """
        ...

    def load(self, directory: Path) -> None:
        """Restore what any engine's snapshots wrote: masters, averages and step counts unrounded, bit for bit.

        The number of ranks, stage, precision and parameter groups may be others.  Weights' averages begin at the
        weights where none were kept.  Raises ConfigError on every rank for another model's state before anything is
        changed, and for a missing or damaged file.
        """
        ...

    def initialise(self, values: Values) -> None:
        """Start from values, before the first step: each rank makes those of its own share, float32 masters unrounded.

        So a seed's weights are the same bit for bit in every engine, stage, precision and number of ranks.
        """
        ...

    def full_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """The float32 masters, then the persistent buffers, by official name; on rank 0 in its CPU memory, None
        on other ranks.  Each step of the iteration gathers one, so every rank iterates to the end."""
        ...

    def load_full(self, state: Mapping[str, Tensor] | None) -> None:
        """Put whole tensors into weights and masters, unrounded; parameters and buffers without one keep their values.

        Weights' averages begin anew at the weights.
        state: on rank 0 the tensors by official name (any dtype and device; from LazyTensors one is read at a time),
        None on other ranks.  Raises ConfigError on every rank: for unexpected or misshapen names before anything is
        changed; for a tensor that cannot be read half-way, and then the weights are a mixture of old and new.
        """
        ...


def build_engine(
    module: nn.Module,
    param_groups: list[dict[str, Any]],
    config: Config,
    world: World,
    accumulation_steps: int,
) -> Engine:
    """The engine that config.engine names, holding the module on world.device.

    module: without values (models/initial.py), and then Engine.initialise or load must follow: under ZeRO-3 no rank
    ever holds it whole.  Or constructed plainly, in float32, on the CPU; rank 0's values are given to all ranks.
    param_groups: from optim.build_param_groups.  accumulation_steps: backward passes per optimizer step.
    The process group must be up.  Raises ConfigError for a combination that cannot be computed right.
    """
    check_engine(config.engine)
    assert accumulation_steps >= 1, accumulation_steps
    apply_recompute(module, config.model.recompute)
    if config.model.compile == "blocks":
        compile_blocks(module)
    if config.engine.name == "local":
        from swinv2_train.engine.local import LocalEngine

        return LocalEngine(module, param_groups, config, world, accumulation_steps)
    from swinv2_train.engine.zero import ZeroEngine

    return ZeroEngine(module, param_groups, config, world, accumulation_steps)


__all__ = ["Engine", "NonFiniteError", "apply_recompute", "build_engine", "check_engine"]
