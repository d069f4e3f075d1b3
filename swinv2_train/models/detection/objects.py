"""What is known of the objects of a batch of crops: the right answers, of constant shapes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Objects(NamedTuple):
    """The objects of B crops, M places each; places without an object have class -1."""

    boxes: Tensor
    """(B, M, 4) float32: x0, y0, x1, y1 in pixels of the crop."""
    classes: Tensor
    """(B, M) int64, -1 for a place without an object."""
    crowd: Tensor
    """(B, M) bool: regions in which there are more objects than are marked; nothing is learnt there."""
    draw: Tensor
    """(B,) int64: of which the choice of what is learnt from is a function."""
    masks: Tensor | None = None
    """(B, M, H, ceil(W / 8)) uint8: eight pixels a byte, the leftmost in the highest bit; None = boxes alone.

    Without any pixel: the object's mask is not known."""

    @property
    def real(self) -> Tensor:
        """(B, M) bool: whether there is an object to be found."""
        return (self.classes >= 0) & ~self.crowd

    @property
    def ignored(self) -> Tensor:
        """(B, M) bool: whether there is a crowd."""
        return (self.classes >= 0) & self.crowd
