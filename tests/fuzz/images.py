"""Images, read as photographs, as the values of bands, and as the numbers of classes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from swinv2_train.config import ConfigError
from swinv2_train.data.transforms.bands import Bands, decode_bands
from swinv2_train.data.transforms.decode import DecodeError, decode_image
from swinv2_train.data.transforms.label_image import read_label_image
from tests.fuzz.target import Target

_PIXELS = 2**20
"""The most of an image here: what 1 GiB of memory must do for, whatever a header says."""
_PNG = (b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"acTL", b"\x10\x00", b"\x10\x02", b"\x10\x06")


def image_targets() -> list[Target]:
    """All of them; makes their seeds."""
    return [_photographs(), *_bands(), _labels()]


def _refused(read: Callable[[bytes], Any]) -> Callable[[bytes, Path], None]:
    def run(data: bytes, place: Path) -> None:
        try:
            read(data)
        except DecodeError as error:
            raise ConfigError(error) from error

    return run


def _saved(image: Image.Image, form: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def _photographs() -> Target:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    seeds = [
        _saved(Image.fromarray(pixels).convert(mode), form, **more)
        for mode, form, more in (
            ("RGB", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("RGBA", "PNG", {}),
            ("RGB", "JPEG", {"quality": 80}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True}), ("RGB", "WEBP", {}), ("RGB", "BMP", {}), ("RGB", "TIFF", {}),
            ("P", "GIF", {}),
        )
    ]  # fmt: skip

    def read(data: bytes) -> None:
        assert decode_image(data, "png", max_pixels=2**22).shape[0] == 3

    tokens = (b"IHDR", b"IDAT", b"\xff\xd8\xff", b"\xff\xc4", b"RIFF", b"GIF89a", b"BM", b"II*\0")
    return Target("images", seeds, _refused(read), tokens)


# --- the values of bands


def _bands() -> list[Target]:
    draw = np.random.default_rng(1)
    values = {kind: draw.integers(0, 200, (12, 10, 4)).astype(kind) for kind in ("uint8", "uint16", "int16", "float32")}
    values["float16"] = values["float32"].astype("float16")
    return [
        _of_bands("bands: npy", [_npy(each) for each in values.values()] + [_npy(np.asfortranarray(values["int16"]))],
                  (b"'descr'", b"|O", b"<f8", b">i2", b"<u2", b"(", b"True", b"99999999999", b"\x93NUMPY\x02\x00")),
        _of_bands("bands: npz", [_npz(values["uint16"], False), _npz(values["float32"], True)],
                  (b"PK\x01\x02", b"PK\x03\x04", b"|O", b"../", b"(", b"99999999999")),
        _of_bands("bands: PNG", [_png16(values["uint16"]), _saved(Image.fromarray(values["uint8"], "RGBA"), "PNG")],
                  _PNG),
        _of_bands("bands: TIFF", _tiffs(values),
                  (b"II*\0", b"MM\0*", b"II+\0", b"\x00\x01\x03\x00", b"\x01\x01", b"\x11\x01", b"\x17\x01")),
    ]  # fmt: skip


def _of_bands(name: str, seeds: list[bytes], tokens: tuple[bytes, ...]) -> Target:
    return Target(name, seeds, _refused(read_values), tokens)


def read_values(data: bytes) -> None:
    """All four bands, and two of them.  Raises DecodeError."""
    for count, chosen in ((4, None), (2, (3, 0))):
        bands = Bands(count, chosen, layout="hwc", nodata=(float("nan"),), max_nodata_fraction=0.5)
        found = decode_bands(data, "tif", bands, max_pixels=_PIXELS)
        assert found.shape[0] == count and found.dtype.is_floating_point


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _npz(values: np.ndarray, a_band_each: bool) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if a_band_each else zipfile.ZIP_STORED) as archive:
        for number in range(4) if a_band_each else [0]:
            archive.writestr(f"B{number}.npy", _npy(values[..., number] if a_band_each else values))
    return buffer.getvalue()


def _png16(values: np.ndarray) -> bytes:
    import imagecodecs

    encoded: bytes = imagecodecs.png_encode(values)
    return encoded


def _tiffs(values: dict[str, np.ndarray]) -> list[bytes]:
    """Strips and tiles, packed and not, bands as samples, as planes and as pages, both orders of bytes."""
    made = []
    for kind, options in (
        ("uint16", {"photometric": "minisblack"}),
        ("float32", {"photometric": "minisblack", "compression": "zlib", "predictor": True}),
        ("int16", {"photometric": "minisblack", "tile": (16, 16), "compression": "lzw"}),
        ("uint8", {"photometric": "minisblack", "compression": "jpeg"}),
        ("float16", {"photometric": "minisblack", "byteorder": ">", "bigtiff": True}),
    ):
        order, big = options.pop("byteorder", "<"), options.pop("bigtiff", False)
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, byteorder=order, bigtiff=big) as file:  # type: ignore[arg-type]
            if kind in ("float16", "uint8"):
                for band in range(4):
                    file.write(values[kind][..., band], **options)  # type: ignore[arg-type]
            else:
                file.write(values[kind], metadata=None, planarconfig="contig", **options)  # type: ignore[arg-type]
        made.append(buffer.getvalue())
    return made


# --- the numbers of classes


def _labels() -> Target:
    numbers = np.random.default_rng(2).integers(0, 9, (12, 10), np.uint8)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette(bytes(range(48)))
    seeds = [_saved(Image.fromarray(numbers), "PNG"), _saved(palette, "PNG"), _saved(palette, "PNG", bits=4),
             _saved(Image.fromarray(numbers.astype(np.uint16)), "PNG")]  # fmt: skip

    def read(data: bytes) -> None:
        assert read_label_image(data, max_pixels=_PIXELS).ndim == 2

    return Target("label images", seeds, _refused(read), _PNG)
