"""Image bytes to the values of chosen bands: nothing is squeezed through 8 bit, and nothing is rounded.

Which format it is, the bytes say.  What of a band was not measured (data.nodata) is NaN from here on.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from swinv2_train.config import Config, ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.data.transforms import band_tiff, numpy_files
from swinv2_train.data.transforms.decode import (
    FORMATS,
    MAX_PIXELS,
    DecodeError,
    check_png_rows,
    check_size,
    count_image_frames,
    reading,
)
from swinv2_train.data.transforms.jpeg import decode_jpeg, is_grey
from swinv2_train.data.transforms.numpy_files import Array, CheckShape
from swinv2_train.data.transforms.png import SIGNATURE, Png, read_png

_MOST_NOTES, _LISTED = 20, 16
MAX_VALUES = 1 << 28
"""Largest height x width x bands that is decoded: a GiB of float32."""


@dataclass(frozen=True)
class Bands:
    """How files are read as values.  The fields are keys of the configuration (model.in_chans, data.bands, ...)."""

    count: int
    chosen: tuple[int | str, ...] | None
    layout: str
    nodata: tuple[float, ...]
    max_nodata_fraction: float
    by_list: bool = False
    """Whether a list beside the files said which places the chosen names have."""

    @classmethod
    def of(cls, config: Config) -> Bands | None:
        """None where images are photographs."""
        if not config.reads_values:
            return None
        data = config.data
        chosen = None if data.bands is None else tuple(data.bands)
        nodata = tuple(map(float, data.nodata or ()))
        return cls(config.model.in_chans, chosen, data.array_layout, nodata, data.max_nodata_fraction)

    @property
    def named(self) -> bool:
        """Whether a band is chosen by its name."""
        return any(isinstance(band, str) for band in self.chosen or ())

    def with_names(self, names: Sequence[str] | None, where: str) -> Bands:
        """The same bands by their indices in names; None: the files themselves are to name them.

        Raises ConfigError, which calls the list `where`, for one that it does not have.
        """
        if names is None or self.chosen is None:
            return self
        return replace(self, chosen=tuple(_place(band, names, where) for band in self.chosen), by_list=True)


def _place(band: int | str, names: Sequence[str], where: str) -> int:
    if isinstance(band, int):
        return band
    if band not in names:
        raise ConfigError(f"data.bands: there is no '{band}' in {where}, which has {', '.join(names[:30])}")
    return names.index(band)


def decode_bands(
    data: bytes, extension: str, bands: Bands, max_pixels: int = MAX_PIXELS, notes: set[str] | None = None
) -> torch.Tensor:
    """The chosen bands of one image file, (C, H, W): of the file's own type or float32, and never uint8.

    data, extension, max_pixels, notes: as decode_image's.  With data.nodata it is float32, NaN where nothing was
    measured.  Raises DecodeError for damaged bytes, other bands, values that are not finite, and too much that was not
    measured; ConfigError where a decoder is not installed, MachineError where the machine cannot decode any.
    """
    with reading(data, extension):
        found = _read(data, bands.layout, _shape_check(max_pixels), notes)
        chosen = _chosen(found, bands)
        if notes is not None and len(notes) < _MOST_NOTES:
            notes.update(_not_asked(found, chosen, bands))
        return torch.from_numpy(_measured(chosen, bands)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)


def _not_asked(found: Array, chosen: np.ndarray, bands: Bands) -> Iterator[str]:
    """What a file says of its bands and the configuration does not ask for, so that they may mean something else."""
    if found.names is not None and len(found.names) > 1 and not (bands.named or bands.by_list):
        listed = ", ".join(shown(name, 40) for name in found.names[:_LISTED])
        yield (
            f"some files call their bands {listed}{', ...' if len(found.names) > _LISTED else ''}; data.bands takes "
            "them by their places, whatever their names are: choose by name where orders differ (data.bands=[NAME,...])"
        )
    stored = None if found.nodata is None or found.nodata in bands.nodata else _stored(found.nodata, chosen.dtype)
    if stored is not None and (chosen == stored).any():
        yield (
            f"some TIFF files say that {found.nodata:g} means no data, and data.nodata does not: their pixels of this "
            f"value count as measured; set data.nodata=[{found.nodata:g}]"
        )


def file_values(data: bytes, extension: str, layout: str) -> Array:
    """All that an image file holds.  Arguments and errors as decode_bands'; layout: data.array_layout."""
    with reading(data, extension):
        return _read(data, layout, _shape_check(MAX_PIXELS), None)


def _shape_check(max_pixels: int) -> CheckShape:
    def check_shape(height: int, width: int, count: int) -> None:
        check_size(height, width, max_pixels)
        if height * width * count > MAX_VALUES:
            raise DecodeError(f"{height} x {width} pixels of {count} bands, more than {MAX_VALUES} values")

    return check_shape


def _read(data: bytes, layout: str, check_shape: CheckShape, notes: set[str] | None) -> Array:
    def check_pixels(height: int, width: int) -> None:
        check_shape(height, width, 1)

    if data[:6] == numpy_files.SIGNATURE:
        return numpy_files.read_npy(data, layout, check_shape)
    if data[:4] == numpy_files.ZIP_SIGNATURE:
        return numpy_files.read_npz(data, layout, check_shape)
    if data[:4] in band_tiff.SIGNATURES:
        return band_tiff.read_tiff(data, check_shape)
    if data[:2] == b"\xff\xd8":
        pixels = decode_jpeg(data, check_pixels)
        return Array(pixels[..., :1] if is_grey(data) else pixels)
    if data[:8] == SIGNATURE:
        return Array(_png(read_png(data, check_pixels), notes))
    return Array(_by_pillow(data, check_pixels, notes))


def _png(png: Png, notes: set[str] | None) -> np.ndarray:
    from PIL import Image

    if png.animated and notes is not None:
        notes.add("some PNG files hold several frames; the first of each is used")
    depth, colour = png.data[24], png.data[25]
    if depth == 16 and colour != 0:  # which Pillow makes 8 bit of
        try:
            import imagecodecs
        except ImportError as error:
            raise ConfigError(f"PNG of 16 bit and several bands: {band_tiff.NEEDED}") from error
        values: np.ndarray = imagecodecs.png_decode(png.data)
    else:
        with Image.open(io.BytesIO(png.data), formats=["PNG"]) as image:
            values = _pillow_values(image)
    check_png_rows(png, values[-1])
    return values if values.ndim == 3 else values[..., None]


def _by_pillow(data: bytes, check_pixels: Any, notes: set[str] | None) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_pixels(image.height, image.width)
        if count_image_frames(data, image) > 1 and notes is not None:
            notes.add(f"some {image.format} files hold several frames or pages; the first of each is used")
        values = _pillow_values(image)
    return values if values.ndim == 3 else values[..., None]


def _pillow_values(image: Any) -> np.ndarray:
    """(H, W) or (H, W, C), as many bands as the file has."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "F":
        return np.array(image)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):
        if image.mode.startswith("I"):
            raise ValueError(f"pixels of Pillow's mode {image.mode} are not read")
        image = image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    return np.array(image)


def _chosen(found: Array, bands: Bands) -> np.ndarray:
    """(H, W, count) of what a file has."""
    values, has = found.values, found.values.shape[2]
    if bands.chosen is None:
        if has != bands.count:
            raise DecodeError(
                f"{has} bands of {values.shape[0]} x {values.shape[1]} pixels, but model.in_chans is {bands.count}; "
                f"{_layout_hint(values, bands.count, bands.layout) or 'choose bands by data.bands'}"
            )
        return values
    chosen = [band if isinstance(band, int) else _named(band, found.names) for band in bands.chosen]
    if max(chosen) >= has:
        hint = _layout_hint(values, max(chosen) + 1, bands.layout) or "count from 0"
        raise DecodeError(
            f"{has} bands of {values.shape[0]} x {values.shape[1]} pixels, but data.bands has {max(chosen)}; {hint}"
        )
    if chosen == list(range(has)):
        return values
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    if step > 0 and chosen == list(range(chosen[0], chosen[-1] + 1, step)):
        return values[..., chosen[0] : chosen[-1] + 1 : step]
    return values[..., chosen]


def _layout_hint(values: np.ndarray, wanted: int, layout: str) -> str | None:
    """Where another axis has as many as there should be bands."""
    height, width, count = values.shape  # with chw the stored axes are (count, height, width)
    other, sides, remedy = (height, (width, count), "chw") if layout == "hwc" else (width, (count, height), "hwc")
    return f"set data.array_layout={remedy}" if wanted <= other < min(sides) else None


def _named(band: str, names: tuple[str, ...] | None) -> int:
    if names is None:
        raise DecodeError(
            f"data.bands chooses '{band}' by its name, but neither this file nor a bands.json beside it names bands; "
            "choose them by their indices"
        )
    if band not in names:
        raise DecodeError(f"it has no band '{band}' (data.bands), but {', '.join(names[:30])}")
    if names.count(band) > 1:
        raise DecodeError(f"{names.count(band)} of its bands are called '{band}' (data.bands); choose by indices")
    return names.index(band)


def _measured(values: np.ndarray, bands: Bands) -> np.ndarray:
    """Writable values, NaN for data.nodata.  Raises DecodeError where too few were measured, or some are not finite."""
    missing = np.zeros((), bool)
    for value in bands.nodata:
        if math.isnan(value):
            missing = missing | np.isnan(values) if values.dtype.kind == "f" else missing
        else:
            as_stored = _stored(value, values.dtype)
            missing = missing if as_stored is None else missing | (values == as_stored)
    if missing.ndim and missing.any():
        share = float(missing.mean())
        if share > bands.max_nodata_fraction:
            raise DecodeError(
                f"{100 * share:.1f} % of it is no data, more than data.max_nodata_fraction "
                f"({bands.max_nodata_fraction})"
            )
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values) if not missing.ndim else ~np.isfinite(values) & ~missing
        if bad.any():
            raise DecodeError(
                f"{int(bad.sum())} of its values are not finite; name them by data.nodata=[nan], or mend the file"
            )
    if bands.nodata:
        as_float = values.astype(np.float32)
        if missing.ndim:
            as_float[missing] = np.nan
        return as_float
    if values.dtype == np.uint8:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable or min(values.strides) < 0)


def _stored(value: float, dtype: np.dtype) -> Any:
    """The value as an element of the type has it; None where none has it."""
    if dtype.kind in "ui":
        info = np.iinfo(dtype)
        return dtype.type(int(value)) if value.is_integer() and info.min <= value <= info.max else None
    with np.errstate(over="ignore"):
        return dtype.type(value)
