"""An exponential moving average of the trained weights (optim.ema_decay), float32, sharded as the masters are.

After each step that is taken: average = decay x average + (1 - decay) x master.  The decay is the same from the first
step on, as in timm's ModelEmaV3 without its warm-up.  What is not trained (buffers, frozen parameters) has no average:
its own value is one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

EMA_KIND = "ema"
"""The kind of a piece's tensor (engine/state/pieces.py) that is an average."""

SWAPPED_TOGETHER = 2**22
"""Elements; all the memory that a swap takes besides."""


class WeightEMA:
    """One average beside each master, of its shape and on its device; none at all where decay is None.

    masters: float32 tensors that an engine's steps change in place, each a rank's share or whole.
    """

    def __init__(self, masters: Iterable[Tensor], decay: float | None) -> None:
        self.decay = decay
        self._masters = [] if decay is None else list(masters)
        assert all(master.dtype == torch.float32 for master in self._masters), "averages are of float32 masters"
        self._averages = [torch.empty_like(master, requires_grad=False) for master in self._masters]
        self._of = dict(zip(self._masters, self._averages, strict=True))
        self._swapped = False
        self.restart()

    def state_for(self, master: Tensor) -> dict[str, Tensor]:
        """The average of a master under its kind, or nothing."""
        assert not self._swapped, "the averages are in use as weights"
        return {EMA_KIND: self._of[master]} if self._of else {}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at what the weights are now."""
        for average, master in zip(self._averages, self._masters, strict=True):
            average.copy_(master)

    @torch.no_grad()
    def update(self) -> None:
        """A step was taken.  Nothing waits for the device."""
        assert not self._swapped, "no step while the averages are in use as weights"
        if self.decay is not None and self._averages:
            torch._foreach_lerp_(self._averages, self._masters, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and masters, bit for bit; the second call puts them back."""
        assert self.decay is not None, "optim.ema_decay is null: there are no averages"
        for average, master in zip(self._averages, self._masters, strict=True):
            portions = (torch.split(tensor.view(-1), SWAPPED_TOGETHER) for tensor in (average, master))
            for one, other in zip(*portions, strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
        self._swapped = not self._swapped
