"""Files read as values: every element type unrounded, bands by index and name, and no damage passes."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
import tifffile
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.transforms.bands import Bands, decode_bands
from swinv2_train.data.transforms.decode import DecodeError, decode_image
from tests.support.images import encoded, npy, npz, tiff

TYPES = {"uint8": np.uint8, "uint16": np.uint16, "int16": np.int16, "float16": np.float16, "float32": np.float32}


def bands(count: int, chosen: tuple[int | str, ...] | None = None, layout: str = "hwc", nodata=(), most=1.0) -> Bands:
    return Bands(count, chosen, layout, tuple(nodata), most)


def values(dtype: str, shape: tuple[int, ...] = (6, 9, 5), seed: int = 0) -> np.ndarray:
    """Over the whole range of the type, its ends among them."""
    kind, rng = np.dtype(TYPES[dtype]), np.random.default_rng(seed)
    if kind.kind == "f":
        found = rng.normal(0, 300, shape).astype(kind)
    else:
        info = np.iinfo(kind)
        found = rng.integers(info.min, info.max + 1, shape).astype(kind)
        found.flat[0], found.flat[1] = info.min, info.max
    return found


def assert_holds(tensor: torch.Tensor, expected: np.ndarray) -> None:
    """The same values, whatever the type; expected: (H, W, C)."""
    assert tensor.dtype != torch.uint8, "photographs alone are uint8"
    got = tensor.permute(1, 2, 0).float().numpy()
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def refused(data: bytes, read: Bands, match: str, **options) -> None:
    with pytest.raises(DecodeError, match=match):
        decode_bands(data, "x", read, **options)


# --------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", ["C", "F", "big-endian", "chw"])
def test_npy_and_npz_of_every_type_and_layout_keep_their_values(dtype, order):
    array = values(dtype)
    stored = {"F": np.asfortranarray(array), "big-endian": array.astype(array.dtype.newbyteorder(">")),
              "chw": np.moveaxis(array, 2, 0)}.get(order, array)  # fmt: skip
    layout = "chw" if order == "chw" else "hwc"
    for data in (npy(stored), npz(x=stored), npz(True, x=stored)):
        assert_holds(decode_bands(data, "npy", bands(5, layout=layout)), array)
        assert_holds(decode_bands(data, "npy", bands(2, (4, 1), layout)), array[..., [4, 1]])
    flat = values(dtype, (6, 9))
    assert_holds(decode_bands(npy(flat), "npy", bands(1)), flat[..., None])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("coding", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("form", ["contig", "planar", "pages", "tiles", "big-endian BigTIFF"])
def test_tiffs_of_every_type_coding_and_form_keep_their_values(dtype, coding, form):
    array = values(dtype, (20, 33, 5))
    options = {"compression": coding, "predictor": coding is not None and dtype != "float16"}
    if form == "contig":
        data = tiff(array, rowsperstrip=7, **options)
    elif form == "planar":
        data = tiff(np.moveaxis(array, 2, 0), planarconfig="separate", **options)
    elif form == "pages":
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as writer:
            for band in range(5):
                writer.write(array[..., band], photometric="minisblack", metadata=None, **options)
        data = buffer.getvalue()
    elif form == "tiles":
        data = tiff(array, tile=(16, 16), **options)
    else:
        data = tiff(array, bigtiff=True, byteorder=">", **options)
    assert_holds(decode_bands(data, "tif", bands(5)), array)
    assert_holds(decode_bands(data, "tif", bands(3, (3, 0, 2))), array[..., [3, 0, 2]])


def test_png_of_16_bit_in_grey_colour_and_alpha_keeps_its_values():
    imagecodecs = pytest.importorskip("imagecodecs")
    for channels in (1, 2, 3, 4):
        array = values("uint16", (7, 9, channels))
        data = imagecodecs.png_encode(array if channels > 1 else array[..., 0])
        assert_holds(decode_bands(data, "png", bands(channels)), array)
    array[-3:] = 0  # black at its end, and whole
    assert_holds(decode_bands(imagecodecs.png_encode(array), "png", bands(4)), array)
    for cut in range(40, 200, 13):
        refused(imagecodecs.png_encode(array)[:cut], bands(4), "cut off")


def test_photographs_formats_give_the_bands_they_have():
    rgb = values("uint8", (16, 16, 3))
    assert_holds(decode_bands(encoded(rgb), "png", bands(3)), rgb)
    assert_holds(decode_bands(encoded(rgb), "png", bands(3, (2, 1, 0))), rgb[..., ::-1])
    rgba = values("uint8", (8, 8, 4))
    assert_holds(decode_bands(encoded(rgba), "png", bands(4)), rgba)
    assert_holds(decode_bands(encoded(rgb, "webp", lossless=True), "webp", bands(3)), rgb)
    jpeg = encoded(rgb, "jpg", quality=95)
    assert_holds(decode_bands(jpeg, "jpg", bands(3)), decode_image(jpeg, "jpg").permute(1, 2, 0).numpy())
    grey = encoded(rgb[..., 0], "jpg", quality=95)
    assert_holds(decode_bands(grey, "jpg", bands(1)), decode_image(grey, "jpg")[:1].permute(1, 2, 0).numpy())


def test_white_is_zero_and_orientation_are_part_of_a_tiff():
    array = values("uint16", (4, 6))
    inverted = tiff(65535 - array, photometric="miniswhite")
    assert_holds(decode_bands(inverted, "tif", bands(1)), array[..., None])
    stored = {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1],
              5: array.T, 6: array.T[::-1], 7: array.T[::-1, ::-1], 8: array.T[:, ::-1]}  # fmt: skip
    for orientation, rows in stored.items():
        data = tiff(np.ascontiguousarray(rows), extratags=[(274, "H", 1, orientation, True)])
        assert_holds(decode_bands(data, "tif", bands(1)), array[..., None])


def test_bands_are_chosen_by_the_names_that_files_give_them():
    array = values("uint16", (4, 6, 3))
    named = npz(B02=array[..., 0], B03=array[..., 1], B04=array[..., 2])
    assert_holds(decode_bands(named, "npz", bands(2, ("B04", "B02"))), array[..., [2, 0]])
    gdal = "<GDALMetadata>" + "".join(
        f'<Item name="DESCRIPTION" sample="{i}" role="description">B0{i + 2}</Item>' for i in range(3)
    )
    data = tiff(array, extratags=[(42112, "s", 0, gdal + "</GDALMetadata>", True)])
    assert_holds(decode_bands(data, "tif", bands(2, ("B04", 0))), array[..., [2, 0]])
    refused(data, bands(1, ("B8A",)), r"no band 'B8A' \(data.bands\), but B02, B03, B04")
    refused(npy(array), bands(1, ("B04",)), "neither this file nor a bands.json")
    by_list = bands(2, ("B04", 0)).with_names(["B02", "B03", "B04"], "bands.json")
    assert_holds(decode_bands(npy(array), "npy", by_list), array[..., [2, 0]])
    with pytest.raises(ConfigError, match="no 'B04' in bands.json, which has B1, B2"):
        bands(1, ("B04",)).with_names(["B1", "B2"], "bands.json")


def test_what_a_file_says_of_its_bands_and_nobody_asked_for_is_noted():
    """Rasters of GDAL: pixels of its no-data number counted as measured, and bands lay in any order, without a word."""
    array = values("int16", (4, 6, 2))
    array[0, 0] = -9999
    data = tiff(array, extratags=[(42113, "s", 0, "-9999", True)])

    def noted(data: bytes, extension: str, wanted: Bands) -> str:
        notes: set[str] = set()
        decode_bands(data, extension, wanted, notes=notes)
        return " ".join(notes)

    assert "some TIFF files say that -9999 means no data" in noted(data, "tif", bands(2))
    assert noted(data, "tif", bands(2, nodata=(-9999.0,))) == ""
    array[0, 0] = 5
    assert noted(tiff(array, extratags=[(42113, "s", 0, "-9999", True)]), "tif", bands(2)) == ""
    for odd in ("nan", "1e400", "no number", "-9999"):
        assert noted(tiff(values("uint8", (4, 6, 2)), extratags=[(42113, "s", 0, odd, True)]), "tif", bands(2)) == ""
    named = npz(B02=array[..., 0], B03=array[..., 1])
    assert "call their bands B02, B03; data.bands takes them by their places" in noted(named, "npz", bands(2))
    assert noted(named, "npz", bands(1, ("B03",)).with_names(["B02", "B03"], "bands.json")) == ""
    assert noted(named, "npz", bands(2, ("B02", "B03"))) == ""


def test_bands_of_one_name_are_refused():
    array = values("uint16", (4, 6, 2))
    gdal = "".join(f'<Item name="DESCRIPTION" sample="{i}" role="description">B02</Item>' for i in range(2))
    data = tiff(array, extratags=[(42112, "s", 0, f"<GDALMetadata>{gdal}</GDALMetadata>", True)])
    refused(data, bands(1, ("B02",)), r"2 of its bands are called 'B02' \(data.bands\)")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for band in range(2):
            archive.writestr("B02.npy", npy(array[..., band]))
    refused(buffer.getvalue(), bands(2), "two of its arrays have the same name")


def test_overviews_and_masks_are_no_bands():
    array = values("uint16", (32, 32, 3))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(array, photometric="minisblack", planarconfig="contig", subifds=0, metadata=None)
        writer.write(array[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1, metadata=None)
    assert_holds(decode_bands(buffer.getvalue(), "tif", bands(3)), array)


# --------------------------------------------------------------------------------------------------------------------
# No data


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_no_data_values_are_nan_and_others_stay(dtype):
    array = values(dtype, (5, 6, 2))
    array[0, 0, 0], array[1, 2, 1] = 0, 7
    tensor = decode_bands(npy(array), "npy", bands(2, nodata=(0.0, 7.0, -1.5)))
    expected = array.astype(np.float32)
    expected[(array == 0) | (array == 7)] = np.nan
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), expected)


def test_a_value_that_is_not_finite_is_damage_unless_it_is_no_data():
    array = values("float32", (4, 4, 2))
    array[1, 1, 0] = np.nan
    refused(npy(array), bands(2), r"1 of its values are not finite; name them by data.nodata=\[nan\]")
    refused(npy(array), bands(2, nodata=(0.0,)), "1 of its values are not finite")
    assert int(decode_bands(npy(array), "npy", bands(2, nodata=(np.nan,))).isnan().sum()) == 1
    array[0, 0, 0] = np.inf
    refused(npy(array), bands(2, nodata=(np.nan,)), "not finite")


def test_too_much_no_data_is_damage():
    array = values("float32", (4, 4, 1))
    array[:2] = -9999
    assert int(decode_bands(npy(array), "npy", bands(1, nodata=(-9999.0,), most=0.5)).isnan().sum()) == 8
    refused(npy(array), bands(1, nodata=(-9999.0,), most=0.4), r"50.0 % of it is no data.*max_nodata_fraction \(0.4\)")


# --------------------------------------------------------------------------------------------------------------------
# What is refused


class Trap:
    """Unpickled, it would say so."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_pickled_arrays_are_refused_and_never_unpickled():
    trap = np.array([[Trap(), 1]], dtype=object)
    for data in (npy(trap, allow_pickle=True), npz(x=trap)):
        refused(data, bands(1), "pickled objects")
    assert not Trap.sprung
    refused(pickle.dumps([1]), bands(1), "no known format")


def test_types_that_would_be_rounded_are_refused_by_name():
    for dtype in ("float64", "int32", "uint32", "int64", "complex64", "bool", "S4"):
        refused(npy(np.zeros((4, 4, 1), dtype)), bands(1), "its elements are .*not one of uint8, uint16, int16")
    refused(npy(np.zeros((4, 4), [("a", "f4")])), bands(1), "its elements are")
    refused(tiff(np.zeros((4, 4), np.float64)), bands(1), "its elements are float64")
    refused(tiff(np.zeros((4, 4), np.uint32)), bands(1), "its elements are uint32")


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (header("(4, 4, 1)") + b"\0" * 63, "63 bytes of elements, but .* take 64"),
        (header("(4, 4, 1)") + b"\0" * 65, "65 bytes of elements"),
        (header("(100000, 100000, 1)") + b"\0" * 64, "100000 x 100000 pixels, more than"),
        (header("(1000, 1000, 100000)") + b"\0" * 64, "more than 268435456 values"),
        (header("(4, -4, 1)"), "its shape is"),
        (header("(4, 0, 1)"), "its shape is"),
        (header("(16,)") + b"\0" * 64, "its shape is"),
        (header("(1, 4, 4, 1)") + b"\0" * 64, "its shape is"),
        (header("(4, 4, 1)", "|O") + b"\0" * 64, "pickled objects"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "not a readable"),
        (b"\x93NUMPY\x09\x00" + b"\0" * 90, "not a readable"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 8) + b"__import", "not a readable"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused_before_anything_is_allocated(data, match):
    refused(data, bands(1), match)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
    refused(buffer.getvalue(), bands(1), match)


def test_an_npz_bomb_is_not_unpacked():
    """A member unpacks to 4 GiB of zeros behind a small header; no more than the header's own size is read."""
    import resource

    packer, zeros = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20)
    packed = packer.compress(header("(4, 4, 1)")) + b"".join(packer.compress(zeros) for _ in range(256))
    packed += packer.flush()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", b"")
    size = len(header("(4, 4, 1)")) + (256 << 20)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(packed), size, 5, 0) + b"x.npy"
    central = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(packed), size, 5, 0, 0, 0, 0, 0, 0)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central) + 5, len(local) + len(packed), 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(local + packed + central + b"x.npy" + end, bands(1), "bytes of elements|not a readable")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("coding", [None, "zlib", "lzw", "zstd", "packbits"])
def test_a_tiff_that_is_cut_off_anywhere_is_damage(coding):
    array = values("uint16", (40, 40, 3))
    whole = tiff(array, compression=coding, rowsperstrip=8)
    for cut in range(8, len(whole) - 1, max(1, len(whole) // 40)):
        with pytest.raises(DecodeError):
            decode_bands(whole[:cut], "tif", bands(3))


@pytest.mark.parametrize("coding", ["zlib", "lzw", "zstd", "packbits", "jpeg"])
def test_a_strip_that_holds_less_than_its_share_is_damage(coding):
    """The sizes of strips are shortened in the directory, the file itself is whole."""
    array = values("uint8" if coding == "jpeg" else "uint16", (40, 40, 1 if coding == "jpeg" else 3)).squeeze()
    whole = bytearray(tiff(array, compression=coding, rowsperstrip=16))
    read = bands(1 if coding == "jpeg" else 3)
    decode_bands(bytes(whole), "tif", read)
    with tifffile.TiffFile(io.BytesIO(bytes(whole))) as file:
        tag = file.pages[0].tags[279]
        counts, where = tag.value, tag.valueoffset
        code = {3: "H", 4: "I"}[int(tag.dtype)]
    whole[where : where + struct.calcsize(code)] = struct.pack(f"<{code}", counts[0] * 2 // 3)
    with pytest.raises(DecodeError):
        decode_bands(bytes(whole), "tif", read)


def test_a_tiff_header_that_promises_too_much_allocates_nothing():
    whole = tiff(values("float32", (8, 8, 2)), rowsperstrip=8)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        places = {tag: file.pages[0].tags[tag].valueoffset for tag in (256, 257)}
    for width, height in ((60_000, 60_000), (2**31, 1), (8, 9)):
        changed = bytearray(whole)
        for tag, side in ((256, width), (257, height)):
            changed[places[tag] - 8 : places[tag] + 4] = struct.pack("<HHII", tag, 4, 1, side)
        with pytest.raises(DecodeError):
            decode_bands(bytes(changed), "tif", bands(2))


@pytest.mark.parametrize("coding", ["lzw", "zlib", "zstd", None])
def test_a_tile_that_is_far_larger_than_the_picture_allocates_nothing(coding):
    """A file of 1 kB asked for gigabytes, and the machine was said to be short of memory."""
    whole = bytearray(tiff(values("int16", (12, 10, 4)), tile=(16, 16), compression=coding))
    with tifffile.TiffFile(io.BytesIO(bytes(whole))) as file:
        where = file.pages[0].tags[322].valueoffset
    whole[where - 8 : where + 4] = struct.pack("<HHII", 322, 4, 1, 2**27)
    refused(bytes(whole), bands(4), "hold more pixels than the picture")


def test_pages_of_other_sizes_palettes_and_other_bands_are_named():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(values("uint16", (8, 8)), metadata=None)
        writer.write(values("uint16", (8, 9)), metadata=None)
    refused(buffer.getvalue(), bands(2), "its pages differ")
    refused(encoded(values("uint8", (8, 8)), "tiff")[:4] + b"\0" * 60, bands(1), "not a readable")
    refused(npy(values("uint16")), bands(4), "5 bands of 6 x 9 pixels, but model.in_chans is 4; choose bands by data.b")
    refused(npy(values("uint16", (3, 60, 50))), bands(3), "50 bands of 3 x 60 pixels.*set data.array_layout=chw")
    refused(npy(values("uint16", (60, 50, 3))), bands(3, layout="chw"), "60 bands of 50 x 3 p.*array_layout=hwc")
    refused(npy(values("uint16")), bands(2, (0, 5)), "5 bands of 6 x 9 pixels, but data.bands has 5; count from 0")


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_what_is_not_installed_is_said_and_is_no_damage(missing, monkeypatch):
    data = tiff(values("uint16"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"TIFF: .*tifffile and imagecodecs, which are not installed: pip") as error:
        decode_bands(data, "tif", bands(5))
    assert not isinstance(error.value, DecodeError)


def test_png_of_16_bits_and_colours_says_what_it_needs_and_grey_needs_nothing(monkeypatch):
    imagecodecs = pytest.importorskip("imagecodecs")
    colour, grey = (imagecodecs.png_encode(values("uint16", shape)) for shape in ((7, 9, 3), (7, 9)))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ConfigError, match="PNG of 16 bit and several bands: .*not installed: pip install"):
        decode_bands(colour, "png", bands(3))
    assert_holds(decode_bands(grey, "png", bands(1)), values("uint16", (7, 9, 1)))


def test_photographs_say_what_an_array_and_16_bits_need():
    with pytest.raises(DecodeError, match=r"set model.in_chans to its bands, or data.bands=\[0,1,2\]"):
        decode_image(npy(values("uint8", (8, 8, 3))), "npy")
    notes: set[str] = set()
    decode_image(encoded(values("uint16", (8, 8))), "png", notes=notes)
    assert "of which a photograph keeps 8" in notes.pop()
