"""Arrays of .npy and .npz files: their headers are bounded and compared with the bytes before anything is allocated.

No object is ever unpickled.  An .npz may hold one array, or one (H, W) array for each band, named by it.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

SIGNATURE = b"\x93NUMPY"
ZIP_SIGNATURE = b"PK\x03\x04"
ELEMENT_TYPES = ("uint8", "uint16", "int16", "float16", "float32")
"""What float32, in which the device computes, holds exactly."""
_MOST_MEMBERS = 4096
_HEADER_BYTES = 2**16

CheckShape = Callable[[int, int, int], None]
"""Is given height, width and bands before anything is allocated.  Raises ValueError for more than are decoded."""


class Array(NamedTuple):
    """An image as a file holds it."""

    values: np.ndarray
    """(H, W, C)"""
    names: tuple[str, ...] | None = None
    """Of the bands, where the file gives them."""
    nodata: float | None = None
    """The number that the file itself says means that nothing was measured."""


def check_type(dtype: np.dtype, hint: str = "save it as one of them") -> None:
    """Raises ValueError for element types that would be rounded, or are no numbers."""
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are not read: unpacking them runs code")
    if dtype.name not in ELEMENT_TYPES:
        raise ValueError(f"its elements are {dtype.name:.50}, not one of {', '.join(ELEMENT_TYPES)}; {hint}")


def read_npy(data: bytes, layout: str, check_shape: CheckShape) -> Array:
    """The array of a .npy file, without a copy.  layout: hwc or chw.  Raises ValueError."""
    dtype, shape, fortran, start = _header(data)
    check_shape(*_hwc_sides(shape, layout))
    _check_bytes(dtype, shape, len(data) - start)
    return Array(_hwc(_array(data[start:] if start % dtype.itemsize else data, dtype, shape, fortran, start), layout))


def read_npz(data: bytes, layout: str, check_shape: CheckShape) -> Array:
    """The one array of a .npz file, or its (H, W) arrays as named bands, in their order.  Raises ValueError."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if not 1 <= len(members) <= _MOST_MEMBERS:
            raise ValueError(f"it holds {len(members)} arrays")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two of its arrays have the same name")
        arrays = [_member(archive, member, layout, len(members), check_shape) for member in members]
    if len(arrays) == 1:
        return Array(_hwc(arrays[0], layout))
    first = arrays[0]
    if any(each.ndim != 2 or each.shape != first.shape or each.dtype != first.dtype for each in arrays):
        found = ", ".join(f"{m.filename:.40} {a.shape}" for m, a in zip(members[:8], arrays[:8], strict=True))
        raise ValueError(f"several arrays must be bands of one size and type, (H, W) each; it holds {found}")
    return Array(np.stack(arrays, axis=2), tuple(member.filename.removesuffix(".npy") for member in members))


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, layout: str, of: int, check_shape: CheckShape
) -> np.ndarray:
    """Unpacks no more than the array's own header says, and that is bounded."""
    with archive.open(member) as file:
        begin = file.read(_HEADER_BYTES)
        dtype, shape, fortran, start = _header(begin)
        height, width, bands = _hwc_sides(shape, layout)
        check_shape(height, width, of * bands)
        wanted = start + dtype.itemsize * int(np.prod(shape, dtype=object))
        content = begin + file.read(max(0, wanted - len(begin)))
        more = bool(file.read(1))  # to the end, where the checksum is compared
    _check_bytes(dtype, shape, len(content) - start + more)
    return _array(content[start:], dtype, shape, fortran, 0)


def _header(data: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """Element type, shape, whether columns come first, and where the elements begin."""
    file = io.BytesIO(data[:_HEADER_BYTES])
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format is not read")
    shape, fortran, dtype = readers[version](file)
    check_type(dtype)
    if any(not isinstance(side, int) or side < 1 for side in shape) or len(shape) not in (2, 3):
        raise ValueError(f"its shape is {str(shape):.100}, not (height, width) or three positive sizes")
    return dtype, shape, fortran, file.tell()


def _check_bytes(dtype: np.dtype, shape: Sequence[int], found: int) -> None:
    wanted = dtype.itemsize * int(np.prod(shape, dtype=object))
    if found != wanted:
        raise ValueError(f"{found} bytes of elements, but {tuple(shape)} {dtype.name} take {wanted}")


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], fortran: bool, start: int) -> np.ndarray:
    offset = start if start % dtype.itemsize == 0 else 0
    flat = np.frombuffer(data, dtype, offset=offset)
    return flat.reshape(shape, order="F" if fortran else "C")


def _hwc_sides(shape: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """Height, width and bands."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    return (shape[1], shape[2], shape[0]) if layout == "chw" else (shape[0], shape[1], shape[2])


def _hwc(array: np.ndarray, layout: str) -> np.ndarray:
    if array.ndim == 2:
        return array[..., None]
    return np.moveaxis(array, 0, 2) if layout == "chw" else array
