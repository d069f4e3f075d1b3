"""Label images: numbers of classes as the file has them, whatever PNG keeps them in, and nothing else is one."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from swinv2_train.data.sample import SampleError
from swinv2_train.data.transforms.decode import DecodeError
from swinv2_train.data.transforms.label_image import as_png, check_sizes, class_numbers, label_dtype, read_label_image
from tests.support.images import encoded


def png(values: np.ndarray, depth: int, palette: bool = False) -> bytes:
    """A PNG file of grey or palette indices by the standard's own words, (H, W) of 1 to 16 bits, without filters."""
    rows = b""
    for row in values:
        bits = np.unpackbits(row.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 16 - depth :]
        rows += b"\0" + np.packbits(bits.reshape(-1)).tobytes()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(7 * i % 256 for i in range(3 << depth))) if palette else b""
    pieces = chunk(b"IHDR", header) + colours + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + pieces


@pytest.mark.parametrize("width", [1, 7, 16])
@pytest.mark.parametrize(
    ("depth", "palette"), [*((depth, False) for depth in (1, 2, 4, 8, 16)), *((depth, True) for depth in (1, 2, 4, 8))]
)
def test_numbers_are_read_as_they_are_in_every_depth(depth, palette, width):
    values = np.random.default_rng(depth).integers(0, 1 << depth, (5, width)).astype(np.uint16)
    values[0, 0], values[-1, -1] = (1 << depth) - 1, 0
    read = read_label_image(png(values, depth, palette))
    assert read.dtype == (np.uint16 if depth == 16 else np.uint8)
    assert np.array_equal(read, values)


def test_a_palette_with_transparency_and_one_that_pillow_wrote_are_indices_too():
    values = np.arange(20, dtype=np.uint8).reshape(4, 5)
    picture = Image.fromarray(values).convert("P")
    picture.putpalette([5, 6, 7] * 256)  # all of one colour: only indices tell them apart
    assert np.array_equal(read_label_image(encoded(picture, transparency=0)), np.asarray(picture))
    assert len(np.unique(np.asarray(picture))) > 1


def tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "palette"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_the_numbers_of_a_tiff_are_read_as_they_are_stored(dtype, photometric, compression):
    """Programs of maps write label images so; white is zero or a palette of colours changes no number."""
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (7, 5)).astype(dtype)
    colours = {"colormap": np.zeros((3, np.iinfo(dtype).max + 1), np.uint16)} if photometric == "palette" else {}
    data = tiff(values, photometric=photometric, compression=compression, **colours)
    read = read_label_image(data)
    assert read.dtype == dtype and np.array_equal(read, values)
    again = as_png(data)
    assert again[:4] == b"\x89PNG" and np.array_equal(read_label_image(again), values)
    assert as_png(again) is again


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), "a label image of 3 bands, which are no numbers of classes"),
        (np.zeros((4, 4), np.float32), "a label image of float32; save the numbers of the classes as uint8 or uint16"),
        (np.zeros((4, 4), np.int16), "a label image of int16"),
    ],
)
def test_a_tiff_of_anything_else_is_a_damaged_sample(values, message):
    with pytest.raises(DecodeError, match=message):
        read_label_image(tiff(values))
    whole = tiff(np.arange(16, dtype=np.uint8).reshape(4, 4))
    for cut in (9, len(whole) - 8):
        with pytest.raises(DecodeError, match="not a readable .tif image"):
            read_label_image(whole[:cut])
    with pytest.raises(DecodeError, match="4 x 4 pixels, more than the 15"):
        read_label_image(whole, max_pixels=15)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_refused_with_the_remedy(mode):
    with pytest.raises(DecodeError, match=r"colours .*, which are no numbers of classes; save it as grey .* or with a"):
        read_label_image(encoded(Image.new(mode, (4, 4))))


def test_other_formats_damage_and_bombs_are_damaged_samples():
    values = np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8)
    whole = encoded(values)
    with pytest.raises(DecodeError, match="no PNG or TIFF file; save the numbers"):
        read_label_image(encoded(values, "jpg"))
    for cut in (0, 7, 30, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DecodeError):
            read_label_image(whole[:cut])
    for at in (20, 60, len(whole) // 2):
        with pytest.raises(DecodeError):
            read_label_image(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    with pytest.raises(DecodeError, match="64 x 64 pixels, more than the 4095"):
        read_label_image(whole, max_pixels=4095)
    bomb = png(np.zeros((1, 1), np.uint16), 8)
    bomb = bomb[:16] + struct.pack(">II", 60_000, 60_000) + bomb[24:]
    with pytest.raises(DecodeError, match="60000 x 60000 pixels, more than"):
        read_label_image(bomb)
    early = png(np.zeros((2, 8), np.uint16), 8)
    taller = struct.pack(">IIBBBBB", 8, 9, 8, 0, 0, 0, 0)
    early = early[:16] + taller + struct.pack(">I", zlib.crc32(b"IHDR" + taller)) + early[33:]
    with pytest.raises(DecodeError):  # the pixels end before the picture: Pillow alone would go on in class 0
        read_label_image(early)


@pytest.mark.parametrize(("dtype", "ignored"), [(np.uint8, 255), (np.uint16, 65535), (np.uint16, 255)])
def test_zero_is_reduced_once_and_what_was_ignored_stays_so(dtype, ignored):
    values = np.array([[0, 1, 2, 150, ignored]], dtype)
    labels = class_numbers(values, 150, True, ignored)
    assert labels.tolist() == [[ignored, 0, 1, 149, ignored]]
    assert labels.dtype == label_dtype(ignored) == (np.uint8 if ignored == 255 else np.int32)
    assert class_numbers(values[:, [0, 1, 2, 4]], 150, False, ignored).tolist() == [[0, 1, 2, ignored]]


def test_all_254_classes_of_a_byte_are_told_from_what_is_ignored():
    """254 is a class of its own before the reduction and 253 behind it; 255 is the one value that is ignored."""
    assert class_numbers(np.array([[254, 255, 0]], np.uint8), 254, True, 255).tolist() == [[253, 255, 255]]


@pytest.mark.parametrize(
    ("values", "classes", "reduced", "message"),
    [
        ([0, 3, 9, 9], 3, False, r"3 pixels of the values 3, 9; 0 to 2 are classes, 255 is ignored"),
        ([0, 4], 3, True, r"1 pixels of the values 4; 1 to 3 are classes, 0 and 255 are ignored"),
        ([256, 1], 3, False, r"of the values 256;"),
        (range(20), 2, False, r"of the values 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.;"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_class_is_named(values, classes, reduced, message):
    with pytest.raises(SampleError, match=message):
        class_numbers(np.array([list(values)], np.uint16), classes, reduced, 255)


def test_a_label_image_of_another_size_is_a_damaged_sample():
    check_sizes((3, 4), (3, 4))
    with pytest.raises(SampleError, match=r"has 3 x 4 pixels and the image 3 x 5$"):
        check_sizes((3, 4), (3, 5))
    with pytest.raises(SampleError, match=r"4 x 3 \(turned by a quarter"):
        check_sizes((3, 4), (4, 3))
