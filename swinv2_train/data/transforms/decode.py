"""Image bytes to uint8 RGB: libjpeg-turbo for JPEG (jpeg.py), Pillow for everything else.  Other values: bands.py.

What is not whole is damage, whichever decoder is at work; what the machine lacks is none.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from swinv2_train.config import ConfigError, MachineError
from swinv2_train.data.sample import lacking
from swinv2_train.data.transforms import numpy_files
from swinv2_train.data.transforms.gif import count_frames
from swinv2_train.data.transforms.jpeg import decode_jpeg
from swinv2_train.data.transforms.png import SIGNATURE, Png, check_rows, read_png
from swinv2_train.data.transforms.tiff import check_tiff

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485
"""Largest height x width that is decoded; Pillow's own warning limit (a quarter of a GiB as RGB)."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of what it may be asked for: of the others some run programs, and some do not miss their own end."""
_NO_PHOTOGRAPH = (
    "an array is no photograph; set model.in_chans to its bands, or data.bands=[0,1,2] where there are three, and "
    "data.mean, data.std or data.scale to what its numbers are"
)
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""TIFF tags."""
_WHITE_IS_ZERO, _SIGNED = 0, 2


class DecodeError(ValueError):
    """The bytes are not a complete image that may be decoded; the message says why."""


def decode_image(
    data: bytes, extension: str, max_pixels: int = MAX_PIXELS, notes: set[str] | None = None
) -> torch.Tensor:
    """Decode one image file to RGB, whatever its own colours are.

    data: the file's bytes; extension: its name's end, for the error text only (the bytes decide).  notes: receives what
    is worth saying once of such files.  Grey is repeated, CMYK converted, alpha dropped, 12 and 16 bit scaled to 8, the
    palette resolved; EXIF rotation is not applied (ImageNet's convention; a TIFF's own is, as part of its format).  Of
    several frames the first is decoded.  Returns uint8 (3, H, W), possibly a channels-last view.
    Raises DecodeError for damaged bytes, MachineError where the machine cannot decode any.
    """
    check_pixels = partial(check_size, max_pixels=max_pixels)
    with reading(data, extension):
        if data[:2] == b"\xff\xd8":
            pixels = decode_jpeg(data, check_pixels)
        elif data[:8] == SIGNATURE:
            pixels = _decode_png(read_png(data, check_pixels), notes)
        elif data[:6] == numpy_files.SIGNATURE or data[:4] == numpy_files.ZIP_SIGNATURE:
            raise DecodeError(_NO_PHOTOGRAPH)
        else:
            pixels = _decode_with_pillow(data, max_pixels, notes)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


@contextmanager
def reading(data: bytes, extension: str) -> Iterator[None]:
    """What a decoder raises on damaged bytes is a DecodeError; MachineError where the machine was the reason."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except (DecodeError, ConfigError):
        raise
    except Exception as error:  # Pillow raises half a dozen types on damaged files; all mean the same to the caller
        fault = lacking(error) or (lacking(MemoryError()) if _short_of_memory(data) else None)
        if fault is not None:
            raise MachineError(f"an image of {len(data)} bytes cannot be decoded: {fault}") from error
        if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
            raise DecodeError(f"not a readable .{extension} image (no known format)") from error
        raise DecodeError(f"not a readable .{extension} image ({type(error).__name__}: {str(error)[:300]})") from error


def _short_of_memory(data: bytes) -> bool:
    """Whether there is no room to decode the image in: some decoders say the same of that and of damage."""
    from PIL import Image

    try:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = min(image.height * image.width, MAX_PIXELS)
        except Exception as error:  # noqa: BLE001  damaged, most likely; the room for a small one is looked for
            if lacking(error) is not None:
                return True
            pixels = 0
        np.empty(8 * pixels + 2 * len(data) + (16 << 20), np.uint8)  # asked for and not touched
    except MemoryError:
        return True
    return False


def _decode_png(png: Png, notes: set[str] | None) -> np.ndarray:
    from PIL import Image

    if png.animated:
        _note(notes, "PNG")
    with Image.open(io.BytesIO(png.data), formats=["PNG"]) as image:
        image.load()
        check_png_rows(png, np.asarray(image.crop((0, png.height - 1, png.width, png.height))))
        if png.data[24] > 8 and notes is not None:
            notes.add(
                "some PNG files have 16 bits, of which a photograph keeps 8; data.bands=[0,1,2] with data.scale, or "
                "model.in_chans=1 for grey, reads them as they are"
            )
        return _rgb(image)


def check_png_rows(png: Png, last_row: np.ndarray) -> None:
    """Raises ValueError where the compressed pixels may end, and do, before the picture does."""
    if png.interlaced or not last_row.any():  # as black as what never came
        check_rows(png)


def _decode_with_pillow(data: bytes, max_pixels: int, notes: set[str] | None) -> np.ndarray:
    from PIL import Image
    from PIL.TiffImagePlugin import TiffImageFile

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(image.height, image.width, max_pixels)
        if count_image_frames(data, image) > 1:
            _note(notes, str(image.format))
        if isinstance(image, TiffImageFile):
            if _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ()):
                raise ValueError("signed samples have no defined black and white")
            check_tiff(data, image, _first_page)
        return _rgb(image)


def count_image_frames(data: bytes, image: Image.Image) -> int:
    """Frames or pages of a file that Pillow has opened.  Raises ValueError where a GIF is cut off."""
    return count_frames(data) if image.format == "GIF" else int(getattr(image, "n_frames", 1))


def _first_page(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
        return np.array(image)


def _note(notes: set[str] | None, kind: str) -> None:
    if notes is not None:
        notes.add(f"some {kind} files hold several frames or pages; the first of each is used")


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3)"""
    if image.mode.startswith(("I", "F")):
        return _deep_grey(image)
    if image.mode == "P" and "transparency" in image.info:
        rgb = image.convert("RGBA").convert("RGB")  # straight to RGB warns when the transparency is per entry
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.array(rgb)  # a copy: torch wants writable memory


def _deep_grey(image: Image.Image) -> np.ndarray:
    """12- and 16-bit grey: Pillow's own convert("RGB") clips at 255 instead of scaling, and leaves white-is-zero so."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        raise ValueError(f"pixels of {bits} bits (Pillow's mode {image.mode}) have no defined black and white")
    values = np.asarray(image).astype(np.uint32) >> (bits - 8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 255 - values
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raises DecodeError for more pixels than are decoded."""
    if height * width > max_pixels:
        raise DecodeError(f"{height} x {width} pixels, more than the {max_pixels} that are decoded")
