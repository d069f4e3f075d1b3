"""Garments for the demos that compose scenes of them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from scripts import compose_scenes


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Four garments a split: white squares of 20 pixels on black."""
    pictures = np.zeros((4, 28, 28), np.uint8)
    pictures[:, 4:24, 4:24] = 255
    for split in ("train", "test"):
        for names, content in (
            (compose_scenes.FASHION, struct.pack(">IIII", 0x803, 4, 28, 28) + pictures.tobytes()),
            (compose_scenes.FASHION_CLASSES, struct.pack(">II", 0x801, 4) + bytes([0, 3, 7, 9])),
        ):
            (tmp_path / names[split]).write_bytes(gzip.compress(content))
    return tmp_path
