"""TIFF files of any number of bands and pages, by tifffile: the numbers as they are, nothing converted.

Pages of one size and type are bands of one image, after the samples of their pixels; overviews and masks are passed
over.  Only this file's own bytes are read, whatever its metadata names.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.data.transforms.jpeg import decode_jpeg
from swinv2_train.data.transforms.numpy_files import Array, CheckShape, check_type

if TYPE_CHECKING:
    from tifffile import TiffPage

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NEEDED = (
    "these images need tifffile and imagecodecs, which are not installed: pip install tifffile imagecodecs (in the "
    "checkout pip install -e '.[images]')"
)
_MOST_PAGES = 4096
_WHITE_IS_ZERO, _PALETTE = 0, 3
_JPEG = 7
_GDAL_METADATA, _GDAL_NODATA = 42112, 42113
_ORIENTATION, _TABLES = 274, 347
_MORE_VALUES = 1 << 24
"""That a tile may hold beyond the picture's edge."""
_METADATA_CHARACTERS = 2**18
_BAND_NAME = re.compile(r'<Item name="DESCRIPTION" sample="(\d{1,4})"[^<>]*>([^<>]{1,200})</Item>')
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
"""How the stored rows become the picture, by the value of the tag Orientation; 1 is as stored."""


def tifffile_module() -> Any:
    """tifffile.  Raises ConfigError, which says what to install."""
    try:
        import imagecodecs  # noqa: F401
        import tifffile
    except ImportError as error:
        raise ConfigError(f"TIFF: {NEEDED}") from error
    return tifffile


def read_tiff(data: bytes, check_shape: CheckShape, stored: bool = False) -> Array:
    """All bands of the first size of image in the file.  stored: its numbers are no colours: those of a palette stay,
    and none is inverted.  Raises ValueError for what is damaged or not whole."""
    with tifffile_module().TiffFile(io.BytesIO(data), is_ome=False) as file:
        first = file.pages[0]
        pages = [first]
        for number in range(1, _MOST_PAGES + 1):
            try:
                page = file.pages[number]
            except IndexError:
                break
            if number == _MOST_PAGES:
                raise ValueError(f"more than {_MOST_PAGES} pages")
            page = page.aspage()
            if page.is_reduced or page.is_mask:
                continue
            if page.shape != first.shape or page.dtype != first.dtype or page.axes != first.axes:
                raise ValueError(
                    f"its pages differ: {first.shape} {first.dtype} and {page.shape} {page.dtype}; pages must be the "
                    "bands of one image"
                )
            pages.append(page)
        _check_page(first, stored)
        height, width = (first.shape[first.axes.index(axis)] for axis in "YX")
        check_shape(height, width, len(pages) * first.samplesperpixel)
        bands = [_values(page, data, stored) for page in pages]
        names = _band_names(first, sum(band.shape[2] for band in bands))
        nodata = _nodata(first)
        turn = _TURNS.get(int(first.tags.valueof(_ORIENTATION, 1)))
    values = bands[0] if len(bands) == 1 else np.concatenate(bands, axis=2)
    return Array(values if turn is None else turn(values), names, nodata)


def _check_page(page: TiffPage, stored: bool) -> None:
    if page.dtype is None:
        raise ValueError(f"{page.bitspersample} bits a sample are not read")
    check_type(np.dtype(page.dtype))
    if page.axes not in ("YX", "YXS", "SYX") or 0 in page.shape:
        raise ValueError(f"its axes are {page.axes} {page.shape}, not rows, columns and samples")
    if not stored and int(page.photometric) == _PALETTE:
        raise ValueError("its pixels are entries of a palette; save their colours, or grey")


def _values(page: TiffPage, data: bytes, stored: bool) -> np.ndarray:
    """(H, W, samples)"""
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) != int(np.prod(page.chunked, dtype=object)) and not page.is_contiguous:
        raise ValueError(f"cut off: {len(offsets)} strips or tiles")
    height, width = (page.shape[page.axes.index(axis)] for axis in "YX")
    if math.prod(page.chunks) > 4 * height * width * page.samplesperpixel + _MORE_VALUES:
        raise ValueError(f"its strips or tiles ({page.chunks}) hold more pixels than the picture ({height} x {width})")
    sparse = _GDAL_NODATA in page.tags
    for offset, count in zip(offsets, counts, strict=True):
        if not (offset and count) and not sparse:
            raise ValueError("a strip or tile is missing, and nothing says what stands for it")
        if offset + count > len(data):
            raise ValueError(f"cut off at byte {len(data)}: a strip or tile ends at {offset + count}")
    if page.compression == _JPEG:
        _check_jpeg_strips(page, data)
    values: np.ndarray = page.asarray(maxworkers=1)
    inverted = not stored and page.photometric is not None and int(page.photometric) == _WHITE_IS_ZERO
    if inverted and values.dtype.kind == "u":
        values = (2**page.bitspersample - 1) - values
    if page.axes == "SYX":
        return np.moveaxis(values, 0, 2)
    return values[..., None] if page.axes == "YX" else values


def _check_jpeg_strips(page: TiffPage, data: bytes) -> None:
    """The lenient decoder fills in what a strip lacks."""
    tables, left = bytes(page.tags.valueof(_TABLES, b"")), 4 * int(np.prod(page.shape[:2])) + _MORE_VALUES

    def check_pixels(height: int, width: int) -> None:
        nonlocal left
        left -= height * width
        if left < 0:
            raise ValueError("its strips hold more pixels than the picture")

    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        strip = data[offset : offset + count]
        if strip:
            decode_jpeg(tables[:-2] + strip[2:] if tables else strip, check_pixels)


def _nodata(page: TiffPage) -> float | None:
    """GDAL's number for what was not measured, where there is one."""
    try:
        return float(str(page.tags.valueof(_GDAL_NODATA, "")).strip("\0 "))
    except ValueError:
        return None


def _band_names(page: TiffPage, count: int) -> tuple[str, ...] | None:
    """GDAL's descriptions of the bands, where each has one."""
    text = page.tags.valueof(_GDAL_METADATA, "")
    if not isinstance(text, str) or len(text) > _METADATA_CHARACTERS:
        return None
    found = {int(sample): name.strip() for sample, name in _BAND_NAME.findall(text)}
    return tuple(found[band] for band in range(count)) if set(range(count)) <= found.keys() else None
