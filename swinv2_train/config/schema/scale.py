"""data.scale: from the numbers of a file to values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from swinv2_train.config.rules import number_or_each


@dataclass
class ScaleConfig:
    factor: Annotated[Any, number_or_each()]
    """Value = factor x number of the file + offset: one, or a list of one per band; null = 1 (photographs 1/255)"""
    offset: Annotated[Any, number_or_each()]
    """Added after factor, as CF's add_offset and GDAL's offset: one number, or a list of one per band."""
    clip: list[float] | None
    """[low, high] of scaled values; null = not clipped."""
