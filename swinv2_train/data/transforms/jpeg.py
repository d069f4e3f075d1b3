"""JPEG to RGB: libjpeg-turbo's strict decoder for nearly all, a lenient one, watched, for what only makes it grumble.

A strict decoder takes every warning for an error, and some files are whole though they cause one: bytes between two
segments, an unknown version, sampling factors that TurboJPEG has no name for.  A lenient decoder reads those, and would
fill a scan that ends early with grey.  So it decodes twice: the second time there are more bytes at the end of each
scan, which change nothing in a whole image, and go into the picture where something is missing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator

import numpy as np

MAX_EXTRANEOUS = 64
"""Bytes that a scan may hold too many; a block of zeros in a scan of this size leaves more over (measured: 43 to 8,304
for 300 to 4,096 zeros, most of them noticed otherwise)."""
_SOI, _EOI, _SOS, _DHT, _DQT, _DRI = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8}
_ARITHMETIC = {*range(0xC9, 0xD0)}
"""An arithmetic coder may leave out zeros at the end of a scan, so bytes put there would count."""
_KEPT = {*range(0xC0, 0xD0), _DQT, _DRI, 0xE0, 0xEE}
"""Segments that the pixels depend on, the first one of JFIF and the one of Adobe (kinds of colour) among them."""
_MARKER = re.compile(rb"\xff+[^\x00\xff]")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")
_NO_NAME = ("Could not determine subsampling",)
_HARMLESS = (
    "unknown JFIF revision",
    "Unknown Adobe color transform",
    "Invalid SOS parameters",
    "Inconsistent progression sequence",
    "extraneous bytes",
)
_FILLER = bytes((73 * i + 41) % 255 for i in range(48))

Decoder = Callable[[bytes], np.ndarray]


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width.  Raises ValueError where the header says none."""
    for marker, start, end in _segments(data):
        if marker in _FRAMES and end - start >= 9:
            return int.from_bytes(data[start + 5 : start + 7], "big"), int.from_bytes(
                data[start + 7 : start + 9], "big"
            )
    raise ValueError("no frame header before the pixels")


def is_grey(data: bytes) -> bool:
    """Whether the file has one component.  Raises ValueError where the header says nothing."""
    frames = (start for marker, start, end in _segments(data) if marker in _FRAMES and end - start >= 10)
    return any(data[start + 9] == 1 for start in frames)


def decode_jpeg(data: bytes, check_pixels: Callable[[int, int], None]) -> np.ndarray:
    """uint8 (H, W, 3).  check_pixels: called with height and width before anything is decoded.

    Raises ValueError for what is damaged or not whole.
    """
    try:
        return _strict(data, check_pixels)
    except ValueError as error:
        problem = str(error)
    plain = _without_metadata(data)
    check_pixels(*jpeg_size(plain))
    if plain != data:
        try:
            return _strict(plain, check_pixels)
        except ValueError as error:
            problem = str(error)
    extraneous = _EXTRANEOUS.search(problem)
    if any(text in problem for text in _NO_NAME):
        return _watched(plain, _by_pillow)
    if not any(text in problem for text in _HARMLESS) or (extraneous and int(extraneous[1]) > MAX_EXTRANEOUS):
        raise ValueError(problem)
    return _watched(plain, _lenient)


def _strict(data: bytes, check_pixels: Callable[[int, int], None]) -> np.ndarray:
    import simplejpeg

    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    check_pixels(height, width)
    if colorspace in ("CMYK", "YCCK"):  # libjpeg cannot turn them into RGB
        return _from_cmyk(simplejpeg.decode_jpeg(data, "CMYK", strict=True))
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    return pixels


def _lenient(data: bytes) -> np.ndarray:
    import simplejpeg

    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", strict=False)
    except ValueError:  # CMYK, and what its header causes a warning for, in which simplejpeg is strict all the same
        return _by_pillow(data)
    return pixels


def _from_cmyk(inverted: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 4) as the file has it, inverted as all programs since Photoshop write it, to RGB by Pillow."""
    from PIL import Image

    return np.array(Image.fromarray(255 - inverted, "CMYK").convert("RGB"))


def _by_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _watched(data: bytes, decode: Decoder) -> np.ndarray:
    """The pixels of a whole image.  Raises ValueError where a scan holds less than its share of it."""
    pixels = decode(data)
    frame = next((marker for marker, _, _ in _segments(data) if marker in _FRAMES), 0)
    if frame in _ARITHMETIC:
        raise ValueError("arithmetic coding of a kind in which an early end would not be noticed")
    if not np.array_equal(decode(_with_filler(data)), pixels):
        raise ValueError("Corrupt JPEG data: premature end of data segment")
    return pixels


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each segment up to the first scan's header; bytes between them are passed over.

    Raises ValueError where they end without one.
    """
    at = 2
    while match := _MARKER.search(data, at):
        marker, start = data[match.end() - 1], match.end() - 2
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if end > len(data) or end < start + 4:
            break
        yield marker, start, end
        if marker == _SOS:
            return
        at = end
    raise ValueError("cut off before the pixels")


def _without_metadata(data: bytes) -> bytes:
    """The same picture with the segments alone that it depends on."""
    kept = [data[:2]]
    for marker, start, end in _segments(data):
        segment = data[start:end]
        if marker == 0xE0 and segment[4:9] == b"JFIF\0":
            kept.append(segment[:9] + b"\x01" + segment[10:])  # the only version there is
        elif marker == _SOS:
            kept.append(data[start:])
        elif marker in _KEPT and marker != 0xE0:
            kept.append(segment)
    return b"".join(kept)


def _with_filler(data: bytes) -> bytes:
    """The file with more bytes at the end of each run of coded pixels, before the marker that ends it."""
    pieces: list[bytes] = []
    *_, (_, _, at) = _segments(data)  # the first scan's coded pixels begin
    begin, coded = 0, True
    while match := _MARKER.search(data, at):
        marker = data[match.end() - 1]
        if coded:
            pieces += [data[begin : match.start()], _FILLER]
            begin = match.start()
        at = match.end()
        if marker == _EOI:
            return b"".join([*pieces, data[begin:]])
        if not 0xD0 <= marker <= 0xD7:  # a restart goes on with coded pixels; other segments have a length
            at += int.from_bytes(data[at : at + 2], "big")
            coded = marker == _SOS
    raise ValueError("Premature end of JPEG file")
