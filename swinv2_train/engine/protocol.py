"""What the training loop and the checkpoints need from an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from swinv2_train.engine.materialize import Initializer
from swinv2_train.engine.state.files import Snapshot
from swinv2_train.runtime import StopRequest


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

    def ema_weights(self) -> AbstractContextManager[None]:
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

    def load(self, directory: Path, stop: StopRequest | None = None) -> None:
        """Restore what any engine's snapshots wrote: masters, moments and step counts unrounded, bit for bit.

        The number of ranks, stage, precision and parameter groups may be others.  Weights' averages begin at the
        weights where none were kept.  Raises ConfigError on every rank for another model's state before anything is
        changed, and for a missing or damaged file.  stop: may come meanwhile; StopNow on every rank, and then the state
        is a mixture.
        """
        ...

    def initialise(self, values: Initializer, stop: StopRequest | None = None) -> None:
        """Start from values, before the first step: each rank makes those of its own share, float32 masters unrounded.

        So a seed's weights are the same bit for bit in every engine, stage, precision and number of ranks.  stop: as
        load's.
        """
        ...

    def full_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """The float32 masters, then the persistent buffers, by official name; on rank 0 in its CPU memory, None
        on other ranks.  Each step of the iteration gathers one, so every rank iterates to the end."""
        ...

    def load_full(self, state: Mapping[str, Tensor] | None, stop: StopRequest | None = None) -> None:
        """Put whole tensors into weights and masters, unrounded; parameters and buffers without one keep their values.

        Weights' averages begin anew at the weights.
        state: on rank 0 the tensors by official name (any dtype and device; from LazyTensors one is read at a time),
        None on other ranks.  Raises ConfigError on every rank: for unexpected or misshapen names before anything is
        changed; for a tensor that cannot be read half-way, and then the weights are a mixture of old and new.  stop: as
        load's, while rank 0 reads.
        """
        ...
