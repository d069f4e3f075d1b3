"""PNG files piece by piece: whole or not, and without what is no picture.

Pillow reads a file whose compressed pixels end early, with right checksums, as black from there on; it does not look at
the checksums of the pixels, nor whether the file has its end; and it refuses texts and profiles over a megabyte.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 64 << 20
"""What texts and profiles may unpack to; a file that holds more is none to be read (Pillow's own limit)."""
_PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PACKED_TEXT = (b"zTXt", b"iTXt", b"iCCP")
_DEFLATE_AT_MOST = 1032
"""Bytes that a byte of deflate can unpack to."""
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column and row, step of columns and rows."""


@dataclass(frozen=True)
class Png:
    """A PNG file that is whole as far as its pieces tell."""

    data: bytes
    """The same picture without texts, profiles and further frames."""
    height: int
    width: int
    interlaced: bool
    animated: bool


def read_png(data: bytes, check_pixels: Callable[[int, int], None]) -> Png:
    """Take a PNG file apart.  check_pixels: called with height and width before anything else is looked at.

    Raises ValueError where it is cut off, a checksum is wrong, or its texts are a bomb.
    """
    if data[8:16] != b"\0\0\0\rIHDR" or len(data) < 33:
        raise ValueError("it does not begin with a header")
    width, height = struct.unpack(">II", data[16:24])
    check_pixels(height, width)
    view = memoryview(data)
    kept, texts = [view[:8]], list[bytes]()
    at, name, animated, dropped = 8, b"", False, False
    while name != b"IEND":
        if at + 12 > len(data):
            raise ValueError("cut off: there is no end mark")
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            raise ValueError(f"cut off at byte {len(data)}: its {name.decode('latin-1')!r} ends at {end}")
        critical = not name[0] & 0x20
        if critical or name in _PICTURE:
            if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError(f"the checksum of its {name.decode('latin-1')!r} at byte {at} is wrong")
            kept.append(view[at:end])
        else:
            dropped, animated = True, animated or name == b"acTL"
            if name in _PACKED_TEXT:
                texts.append(_packed(name, data[at + 8 : end - 4]))
        at = end
    _check_texts(texts)
    plain = b"".join(kept) if dropped else data
    return Png(plain, height, width, bool(data[28]), animated)


def _packed(name: bytes, content: bytes) -> bytes:
    """What of a text or profile is compressed; nothing where it is not."""
    rest = content[content.find(b"\0") + 1 :]  # behind its keyword
    if name != b"iTXt":
        return rest[1:]  # the method
    language_and_title = rest[2:].split(b"\0", 2)
    return language_and_title[2] if rest[:1] == b"\1" and len(language_and_title) == 3 else b""


def _check_texts(texts: list[bytes]) -> None:
    if sum(map(len, texts)) * _DEFLATE_AT_MOST <= MAX_TEXT_BYTES:
        return
    total = 0
    for text in texts:
        unpack, part = zlib.decompressobj(), text
        with contextlib.suppress(zlib.error):  # damaged text is passed over like any other
            while part and not unpack.eof and total <= MAX_TEXT_BYTES:
                total += len(unpack.decompress(part, 1 << 20))
                part = unpack.unconsumed_tail
    if total > MAX_TEXT_BYTES:
        raise ValueError(f"Decompressed data too large: its texts unpack to more than {MAX_TEXT_BYTES} bytes")


def check_rows(png: Png) -> None:
    """Raises ValueError where the compressed pixels end before the picture does; costs as much as unpacking them."""
    depth, colour = png.data[24], png.data[25]
    bits = depth * _SAMPLES.get(colour, 1)
    wanted = 0
    for left, top, right, down in _PASSES if png.interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(png.width - left) // right), -(-(png.height - top) // down)
        if columns > 0 and rows > 0:
            wanted += rows * (1 + -(-columns * bits // 8))
    found, unpack, at = 0, zlib.decompressobj(), 8
    while at + 12 <= len(png.data) and found < wanted:
        length = int.from_bytes(png.data[at : at + 4], "big")
        if png.data[at + 4 : at + 8] == b"IDAT":
            part = png.data[at + 8 : at + 8 + length]
            while part and not unpack.eof:
                found += len(unpack.decompress(part, 1 << 20))
                part = unpack.unconsumed_tail
        at += 12 + length
    found += len(unpack.flush())
    if found < wanted:
        raise ValueError(f"cut off: its pixels unpack to {found} bytes of {wanted}")
