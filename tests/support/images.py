"""Image files for the tests: anything encoded, and small ones of noise."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options: Any) -> bytes:
    """A file of that kind (a file ending or Pillow's name); options: as Pillow's save takes them."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, {"jpg": "JPEG"}.get(kind.lower(), kind.upper()), **options)
    return buffer.getvalue()


def image_bytes(seed: int, kind: str = "png", size: tuple[int, int] = (8, 8)) -> bytes:
    """An image file of noise.  size: (height, width)."""
    return encoded(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8), kind)


def npy(array: np.ndarray, **options: Any) -> bytes:
    """A .npy file; options: as numpy.save takes them."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    """An .npz file of arrays by their names."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    """A TIFF file of (H, W) or (H, W, C); options: as tifffile.imwrite takes them."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "minisblack", "planarconfig": "contig", **options})
    return buffer.getvalue()
