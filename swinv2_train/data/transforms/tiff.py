"""TIFF files whose coded strips end early: libtiff fills in what is missing for two ways of coding, and says nothing.

For all others it reports an error.  A JPEG strip is put together with its tables and looked at as a file of its own.
A fax strip gets more bytes at its end: they change nothing in a whole picture, and go into one where something is
missing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from swinv2_train.data.transforms.jpeg import decode_jpeg, jpeg_size

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

_COMPRESSION, _TABLES = 259, 347
_PLACES = ((273, 279), (324, 325))
"""Tags with the offsets and sizes of strips, and of tiles."""
_FAX, _JPEG = (2, 3, 4), 7
_FILLER = bytes((73 * i + 41) % 255 for i in range(64))
_FILLER_GROUP_3 = b"".join(b"\0\1" + _FILLER[i : i + 4] for i in range(0, 64, 4))
"""With ends of lines, up to the first of which group 3 passes over everything; group 4 has none, and stops at one."""
_GROUP_3 = 3
_LONG = 4
_TILES_MORE = 1 << 24
"""Pixels that tiles may hold beyond the picture's edge."""


def check_tiff(data: bytes, image: TiffImageFile, decode: Callable[[bytes], np.ndarray]) -> None:
    """Raises ValueError where the first page's coded pixels end early in a way that libtiff passes over.

    data: the file; image: the same, opened; decode: from a file's bytes to its pixels.
    """
    tags = image.tag_v2
    compression = tags.get(_COMPRESSION)
    places = next(((tags[where], tags[size]) for where, size in _PLACES if where in tags and size in tags), None)
    if places is None or compression not in (*_FAX, _JPEG):
        return
    if sum(places[1]) > len(data):
        raise ValueError(f"its strips hold {sum(places[1])} bytes, the file {len(data)}")
    strips = [data[where : where + size] for where, size in zip(*places, strict=True)]
    if compression == _JPEG:
        tables = bytes(tags.get(_TABLES, b""))
        left = 4 * image.height * image.width + _TILES_MORE
        for strip in strips:
            whole = tables[:-2] + strip[2:] if tables else strip
            height, width = jpeg_size(whole)
            left -= height * width
            if left < 0:
                raise ValueError("its strips hold more pixels than the picture")
            decode_jpeg(whole, _any_size)
        return
    filler = _FILLER_GROUP_3 if compression == _GROUP_3 else _FILLER
    if not np.array_equal(decode(_with_filler(data, strips, filler)), decode(data)):
        raise ValueError("cut off: a strip holds less than its share of the picture")


def _any_size(height: int, width: int) -> None:
    """The strips' sizes have been looked at."""


def _with_filler(data: bytes, strips: list[bytes], filler: bytes) -> bytes:
    """The file with longer strips, which lie at its end."""
    order = "<" if data[:2] == b"II" else ">"
    table = struct.unpack_from(f"{order}I", data, 4)[0]
    changed, added = bytearray(data), bytearray()
    offsets = []
    for strip in strips:
        offsets.append(len(data) + len(added))
        added += strip + filler
    for entry in range(table + 2, table + 2 + 12 * struct.unpack_from(f"{order}H", data, table)[0], 12):
        tag = struct.unpack_from(f"{order}H", data, entry)[0]
        for where, size in _PLACES:
            if tag in (where, size):
                values = offsets if tag == where else [len(strip) + len(filler) for strip in strips]
                packed = struct.pack(f"{order}{len(values)}I", *values)
                if len(values) > 1:
                    place = len(data) + len(added)
                    added += packed
                    packed = struct.pack(f"{order}I", place)
                changed[entry : entry + 12] = struct.pack(f"{order}HHI", tag, _LONG, len(values)) + packed
    return bytes(changed + added)
