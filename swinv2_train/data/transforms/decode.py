"""Image bytes to uint8 pixels: simplejpeg (strict) for JPEG, Pillow for everything else.

Strict matters: of the decoders measured only simplejpeg notices zeros inside a scan.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485
"""Largest height x width that is decoded; Pillow's own warning limit (a quarter of a GiB as RGB)."""


class DecodeError(ValueError):
    """The bytes are not a complete image that may be decoded; the message says why."""


def decode_image(data: bytes, extension: str, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode one image file to RGB, whatever its own colours are.

    data: the file's bytes; extension: its name's end, for the error text only (the bytes decide).
    Grey is repeated, CMYK converted, alpha dropped, 16 bit scaled to 8, the palette resolved; EXIF rotation is not
    applied (ImageNet's convention).  Returns uint8 (3, H, W), possibly a channels-last view.  Raises DecodeError.
    """
    from PIL import UnidentifiedImageError

    try:
        pixels = _decode_jpeg(data, max_pixels) if data[:2] == b"\xff\xd8" else None
        if pixels is None:
            pixels = _decode_with_pillow(data, max_pixels)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:  # its own text holds a memory address
        raise DecodeError(f"not a readable .{extension} image (no known format)") from error
    except Exception as error:  # Pillow raises half a dozen types on damaged files; all mean the same to the caller
        raise DecodeError(f"not a readable .{extension} image ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """uint8 (H, W, 3), or None for the colour spaces that libjpeg cannot turn into RGB (CMYK, YCCK)."""
    import simplejpeg

    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(height, width, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return None
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    return pixels


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        _check_pixels(image.height, image.width, max_pixels)
        if image.mode.startswith(("I", "F")):
            return _deep_grey(image)
        if image.mode == "P" and "transparency" in image.info:
            rgb = image.convert("RGBA").convert("RGB")  # straight to RGB warns when the transparency is per entry
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.array(rgb)  # a copy: torch wants writable memory


def _deep_grey(image: Image.Image) -> np.ndarray:
    """16-bit grey: Pillow's own convert("RGB") clips at 255 instead of scaling."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise DecodeError(f"pixels of Pillow mode {image.mode} outside 0..65535 have no defined range")
    return np.repeat((values.astype(np.uint32) >> 8).astype(np.uint8)[..., None], 3, axis=2)


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError(f"{height} x {width} pixels, more than the {max_pixels} that are decoded")
