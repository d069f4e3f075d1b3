"""The gradient norm on the host: read once a step, and that is the one place where a step waits for the device.

The decision not to take a step must be made before any weight moves, so one read cannot be avoided.  DeepSpeed 0.19.8
makes more of them: stages 1 and 2 look through all gradients for what is not finite before they take the norm, which
shows it as well, and again at the norm for each parameter group that they clip.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch


class NormRead:
    """Replaces DeepSpeed's check for an invalid norm; each tensor is read once."""

    def __init__(self) -> None:
        self.value = math.nan
        """The norm that was read last."""
        self._read: torch.Tensor | None = None

    def is_invalid(self, norm: torch.Tensor | float) -> bool:
        """True for a norm that is not finite, or -1, DeepSpeed's sign of one."""
        if not isinstance(norm, torch.Tensor):
            self.value = norm
        elif norm is not self._read:
            self.value, self._read = float(norm), norm
        return not 0 <= self.value < math.inf


@contextlib.contextmanager
def norm_read_once() -> Iterator[NormRead]:
    """Around the step of a DeepSpeed engine of stage 1 to 3."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    read = NormRead()
    modules = (bf16_optimizer, stage3, stage_1_and_2)
    originals = [module.is_invalid_grad_norm for module in modules]
    for module in modules:
        module.is_invalid_grad_norm = read.is_invalid
    try:
        yield read
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.is_invalid_grad_norm = original


def skip_overflow_scan(optimizer: Any) -> None:
    """Leave a stage 1 or 2 optimizer's own search for values that are not finite out; the norm holds them all.

    With offload it is kept: there it is a flag on the host.
    """
    if hasattr(optimizer, "check_grad_overflow") and not optimizer.cpu_offload and optimizer.compute_grad_norm:
        optimizer.check_overflow = lambda partition_gradients=True: None
