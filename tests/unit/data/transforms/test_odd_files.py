"""Files as people really have them: exotic but whole ones give Pillow's pixels, and what is not whole is damage."""

from __future__ import annotations

import io
import itertools
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from swinv2_train.data.transforms.decode import DecodeError, decode_image
from tests.support.images import encoded

HEIGHT, WIDTH = 40, 56


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """A photograph-like picture: low frequencies and a little noise; no row is black."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(small).astype(int) + rng.integers(-6, 7, (height, width, 3)), 1, 255).astype(np.uint8)


ARRAY = picture()
RGB = Image.fromarray(ARRAY)
GREY16 = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)


def pixels(data: bytes) -> np.ndarray:
    return decode_image(data, "x").permute(1, 2, 0).numpy()


def pillows(data: bytes) -> np.ndarray:
    """What Pillow makes of it, asked to pass over nothing but size limits of texts."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGBA" if "transparency" in image.info else image.mode).convert("RGB"))


# --------------------------------------------------------------------------------------------------------------------
# Files made by hand


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    rows: bytes, depth: int = 8, colour: int = 2, interlaced: int = 0, before: bytes = b"", end: bytes | None = None
) -> bytes:
    """rows: not yet compressed, with a filter byte before each."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, interlaced))
    tail = chunk(b"IEND", b"") if end is None else end
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows)) + tail


ROWS = b"".join(b"\0" + row.tobytes() for row in ARRAY)
ROW = 1 + 3 * WIDTH
GREY_ROWS = b"".join(b"\0" + row.astype(">u2").tobytes() for row in GREY16)


def interlaced_rows() -> bytes:
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    return b"".join(b"\0" + row.tobytes() for left, top, right, down in passes for row in ARRAY[top::down, left::right])


def tiff(samples: bytes, bits: list[int], photometric: int, **tags: list[int]) -> bytes:
    """An uncompressed TIFF of one strip.  tags: by number, with a t before it."""
    entries = {256: [WIDTH], 257: [HEIGHT], 258: bits, 259: [1], 262: [photometric], 273: [0], 277: [len(bits)]}
    entries |= {278: [HEIGHT], 279: [len(samples)], **{int(name[1:]): value for name, value in tags.items()}}
    begin = 8 + 2 + 12 * len(entries) + 4
    extra, table = b"", b""
    for number, values in sorted(entries.items()):
        if number == 273:
            table += struct.pack("<HHI", 273, 4, 1) + b"STRP"
            continue
        packed = struct.pack(f"<{len(values)}{'I' if number in (256, 257, 278, 279) else 'H'}", *values)
        kind = 4 if number in (256, 257, 278, 279) else 3
        if len(packed) > 4:
            table += struct.pack("<HHII", number, kind, len(values), begin + len(extra))
            extra += packed
        else:
            table += struct.pack("<HHI", number, kind, len(values)) + packed.ljust(4, b"\0")
    table = table.replace(b"STRP", struct.pack("<I", begin + len(extra)))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + extra + samples


def bits12(values: np.ndarray) -> bytes:
    flat = values.ravel().tolist()
    return b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(flat[::2], flat[1::2], strict=True)
    )


def jpeg(**options) -> bytes:
    return encoded(RGB, "JPEG", **{"quality": 90, **options})


def with_bytes(data: bytes, place: bytes, inserted: bytes) -> bytes:
    at = data.rindex(place)
    return data[:at] + inserted + data[at:]


def jfif_version_2() -> bytes:
    data = bytearray(jpeg())
    data[data.index(b"JFIF\0") + 5] = 2
    return bytes(data)


def adobe(data: bytes, transform: int | None) -> bytes:
    """The file with another kind of colour in Adobe's segment, or without that."""
    at = data.index(b"Adobe")
    return (
        data[: at - 4] + data[at + 12 :]
        if transform is None
        else data[: at + 11] + bytes([transform]) + data[at + 12 :]
    )


def sampled(factors: tuple[int, int, int]) -> bytes:
    """A grey-in-colour JPEG of one MCU's worth of DC values; factors: h << 4 | v of each component."""
    data = bytearray(encoded(RGB.resize((32, 32)), "JPEG", quality=90, subsampling=0))
    at = data.index(b"\xff\xc0") + 11
    for number, factor in enumerate(factors):
        data[at + 3 * number] = factor
    return bytes(data)


def frames(kind: str, **options) -> bytes:
    others = [Image.fromarray(picture(seed=seed)) for seed in (1, 2)]
    return encoded(RGB, kind, save_all=True, append_images=others, **options)


# --------------------------------------------------------------------------------------------------------------------

WHOLE: dict[str, bytes] = {
    "jpeg baseline": jpeg(),
    "jpeg progressive": jpeg(progressive=True),
    "jpeg optimised": jpeg(optimize=True),
    "jpeg 4:2:2": jpeg(subsampling=1),
    "jpeg 4:1:1": jpeg(subsampling="4:1:1"),
    "jpeg with restarts": jpeg(restart_marker_blocks=3),
    "jpeg grey": encoded(RGB.convert("L"), "JPEG"),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "jpeg cmyk progressive": encoded(RGB.convert("CMYK"), "JPEG", quality=95, progressive=True),
    "jpeg ycck": adobe(encoded(RGB.convert("CMYK"), "JPEG", quality=95), 2),
    "jpeg cmyk without Adobe's segment": adobe(encoded(RGB.convert("CMYK"), "JPEG", quality=95), None),
    "jpeg cmyk, unknown kind of colour": adobe(encoded(RGB.convert("CMYK"), "JPEG", quality=95), 5),
    "jpeg, unknown kind of colour": adobe(jpeg(keep_rgb=True), 9),
    "jpeg rgb": jpeg(keep_rgb=True),
    "jpeg with exif and profile": jpeg(exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(200_000)),
    "jpeg with a comment": jpeg(comment=b"x" * 65_000),
    "jpeg, JFIF of version 2": jfif_version_2(),
    "jpeg, bytes between segments": with_bytes(jpeg(), b"\xff\xc4", b"abc" * 200),
    "jpeg, bytes before its end": with_bytes(jpeg(), b"\xff\xd9", b"\x01\x02\x03"),
    "jpeg, filled up before its end": with_bytes(jpeg(), b"\xff\xd9", bytes(32)),
    "jpeg, bytes before a restart": with_bytes(jpeg(restart_marker_blocks=3), b"\xff\xd2", b"\x01\x02"),
    "jpeg, bytes after its end": jpeg() + b"thumbnail" * 1000,
    "jpeg progressive, bytes before its end": with_bytes(jpeg(progressive=True), b"\xff\xd9", b"\x07" * 9),
    "jpeg cmyk, bytes between segments": with_bytes(encoded(RGB.convert("CMYK"), "JPEG"), b"\xff\xc4", b"xyz"),
    "jpeg of several pictures": encoded(RGB, "MPO", save_all=True, append_images=[RGB.rotate(90)]),
    "png": encoded(RGB, "PNG"),
    "png grey": encoded(RGB.convert("L"), "PNG"),
    "png 1 bit": encoded(RGB.convert("1"), "PNG"),
    "png palette": encoded(RGB.quantize(200), "PNG"),
    "png palette of 4 colours": encoded(RGB.quantize(4), "PNG", bits=2),
    "png palette, transparent": encoded(RGB.quantize(64), "PNG", transparency=bytes(range(64))),
    "png rgba": encoded(RGB.convert("RGBA"), "PNG"),
    "png la": encoded(RGB.convert("LA"), "PNG"),
    "png interlaced": png(interlaced_rows(), interlaced=1),
    "png in many pieces": png(ROWS).replace(
        chunk(b"IDAT", zlib.compress(ROWS)),
        b"".join(chunk(b"IDAT", zlib.compress(ROWS)[i : i + 100]) for i in range(0, len(zlib.compress(ROWS)), 100)),
    ),
    "png black at the bottom": encoded(Image.fromarray(np.concatenate([ARRAY[:20], np.zeros_like(ARRAY[:20])])), "PNG"),
    "png all black": encoded(Image.new("RGB", (9, 9)), "PNG"),
    "png transparent at the bottom": encoded(Image.new("RGBA", (9, 9)), "PNG"),
    "png with more than its pixels": png(ROWS + ROWS),
    "png, bytes after its end": encoded(RGB, "PNG") + b"junk",
    "png animated": frames("PNG"),
    "webp": encoded(RGB, "WEBP"),
    "webp lossless": encoded(RGB, "WEBP", lossless=True),
    "webp with alpha": encoded(RGB.convert("RGBA"), "WEBP"),
    "webp with profile and exif": encoded(RGB, "WEBP", icc_profile=bytes(3_000_000), exif=b"Exif\0\0" + bytes(3000)),
    "webp animated": frames("WEBP", lossless=True),
    "gif": encoded(RGB.quantize(128), "GIF"),
    "gif interlaced": encoded(RGB.quantize(128), "GIF", interlace=1),
    "gif grey": encoded(RGB.convert("L"), "GIF"),
    "gif animated": frames("GIF"),
    "gif with a comment": encoded(RGB.quantize(16), "GIF", comment=b"x" * 10_000),
    "bmp": encoded(RGB, "BMP"),
    "bmp palette": encoded(RGB.quantize(256), "BMP"),
    "bmp 1 bit": encoded(RGB.convert("1"), "BMP"),
    "bmp 32 bit": encoded(RGB.convert("RGBA"), "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff lzw": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "tiff deflate": encoded(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "tiff packbits": encoded(RGB, "TIFF", compression="packbits"),
    "tiff jpeg": encoded(RGB, "TIFF", compression="jpeg"),
    "tiff cmyk": encoded(RGB.convert("CMYK"), "TIFF"),
    "tiff 1 bit": encoded(RGB.convert("1"), "TIFF", compression="group4"),
    "tiff 1 bit, group 3": encoded(RGB.convert("1"), "TIFF", compression="group3"),
    "tiff jpeg grey": encoded(RGB.convert("L"), "TIFF", compression="jpeg"),
    "tiff jpeg of many strips": encoded(Image.fromarray(picture(200, 300)), "TIFF", compression="jpeg"),
    "tiff 1 bit of many strips": encoded(Image.fromarray(picture(800, 900)).convert("1"), "TIFF", compression="group4"),
    "tiff rgba": encoded(RGB.convert("RGBA"), "TIFF"),
    "tiff of several pages": frames("TIFF"),
    "tiff 16 bit rgb": tiff(np.repeat(GREY16[..., None], 3, 2).astype("<u2").tobytes(), [16, 16, 16], 2),
    "tiff white is zero": tiff(ARRAY[..., 0].tobytes(), [8], 0),
    "tiff turned": tiff(ARRAY[..., 0].tobytes(), [8], 1, t274=[6]),
    "avif": encoded(RGB, "AVIF"),
    "jpeg 2000": encoded(RGB, "JPEG2000"),
    "ppm": encoded(RGB, "PPM"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_give_pillows_pixels(name):
    ours, theirs = pixels(WHOLE[name]), pillows(WHOLE[name])
    assert ours.shape == theirs.shape
    tolerance = 4 if name.startswith("jpeg") else 0  # two builds of libjpeg-turbo; measured worst 0
    assert np.abs(ours.astype(int) - theirs).max() <= tolerance


@pytest.mark.parametrize(
    "factors", [(0x41, 0x21, 0x21), (0x31, 0x11, 0x11), (0x11, 0x21, 0x21), (0x42, 0x11, 0x11), (0x22, 0x21, 0x12)]
)
def test_sampling_factors_without_a_name_give_pillows_pixels_and_their_damage_is_noticed(factors):
    """TurboJPEG refuses them, Pillow fills what is missing with grey.  The picture means nothing: its blocks were
    written for other factors, so there are too many for these.
    """
    data = sampled(factors)
    at = data.index(b"\xff\xda") + 14
    coded = data[at:-2]

    def whole(extra: bytes) -> bool:
        """Whether Pillow decodes the same of it with more behind it."""
        return np.array_equal(pillows(data[:at] + extra + data[-2:]), pillows(data[:at] + coded + data[-2:]))

    need = next(length for length in range(0, len(coded), 8) if whole(coded[:length]))  # what the picture takes
    exact = data[:at] + coded[:need] + data[-2:]
    assert np.array_equal(pixels(exact), pillows(exact))
    for short in (need - 24, need // 2, 10):
        with pytest.raises(DecodeError, match="premature end of data segment"):
            decode_image(data[:at] + coded[:short] + data[-2:], "jpg")
    for cut in (exact[: at + need // 2], exact[:-2]):
        with pytest.raises(DecodeError, match="truncated|Premature end"):
            decode_image(cut, "jpg")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("png 16 bit grey", encoded(Image.fromarray(GREY16), "PNG"), GREY16 >> 8),
        ("tiff 16 bit", encoded(Image.fromarray(GREY16), "TIFF"), GREY16 >> 8),
        ("tiff 16 bit, other end first", tiff(GREY16.astype("<u2").tobytes(), [16], 1), GREY16 >> 8),
        ("tiff 16 bit, white is zero", tiff(GREY16.astype("<u2").tobytes(), [16], 0), 255 - (GREY16 >> 8)),
        ("tiff 12 bit", tiff(bits12(GREY16 >> 4), [12], 1), GREY16 >> 8),
        ("pgm 16 bit", b"P5 %d %d 65535 " % (WIDTH, HEIGHT) + GREY16.astype(">u2").tobytes(), GREY16 >> 8),
        ("tiff 8 bit, white is zero", tiff(ARRAY[..., 0].tobytes(), [8], 0), 255 - ARRAY[..., 0]),
    ],
)  # fmt: skip
def test_deep_grey_is_scaled_whatever_stands_for_white(name, data, expected):
    """Pillow's convert("RGB") clips 16 bits to white, and its 12 bits were taken for 16: nearly black."""
    ours = pixels(data)
    assert np.array_equal(ours[..., 0], expected.astype(np.uint8)) and np.array_equal(ours[..., 0], ours[..., 2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(np.arange(HEIGHT * WIDTH, dtype="<u4").tobytes(), [32], 1, t339=[1]), "32 bits .Pillow's mode I. have"),
        (tiff(np.arange(HEIGHT * WIDTH, dtype="<i4").tobytes(), [32], 1, t339=[2]), "signed samples"),
        (tiff((GREY16 // 2).astype("<i2").tobytes(), [16], 1, t339=[2]), "signed samples"),
        (tiff(ARRAY[..., 0].tobytes(), [8], 1, t339=[2]), "signed samples"),
        (tiff(np.ones((HEIGHT, WIDTH), "<f4").tobytes(), [32], 1, t339=[3]), "32 bits .Pillow's mode F. have no"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),
        (b"\0\0\x02" + bytes(9) + struct.pack("<HH", 2, 2) + b"\x18\0" + bytes(12), "no known format"),
    ],
)  # fmt: skip
def test_what_has_no_defined_pixels_is_refused_by_name(data, message):
    """32-bit counts from 0 to 2,000 were scaled as if white were 65,535; some formats run programs, or miss an end."""
    with pytest.raises(DecodeError, match=f"not a readable .x image .*{message}"):
        pixels(data)


# --------------------------------------------------------------------------------------------------------------------
# Not whole


@pytest.mark.parametrize("rows", [HEIGHT - 1, HEIGHT // 2, 1, 0])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_png_that_ends_early_with_right_checksums_is_damage(rows, pieces):
    """It was black from there on, and no error anywhere."""
    packed = zlib.compress(ROWS[: rows * ROW])
    size = -(-len(packed) // pieces)
    body = b"".join(chunk(b"IDAT", packed[i : i + size]) for i in range(0, len(packed), size))
    data = png(ROWS).replace(chunk(b"IDAT", zlib.compress(ROWS)), body)
    with pytest.raises(DecodeError, match="not a readable .x image .*(its pixels unpack to|truncated)"):
        pixels(data)


@pytest.mark.parametrize("missing", [1, 3 * WIDTH, 5000])
def test_an_interlaced_png_that_ends_early_is_damage(missing):
    """Its last pass alone is missing: every second row is black in part."""
    with pytest.raises(DecodeError, match="its pixels unpack to|truncated"):
        pixels(png(interlaced_rows()[:-missing], interlaced=1))


def test_every_depth_and_colour_of_png_is_counted_right():
    """Rows of fewer bits than a byte are filled up; a wrong count would refuse black pictures, or take short ones."""
    for mode, options in (
        ("1", {}),
        ("L", {}),
        ("P", {"bits": 1}),
        ("P", {"bits": 2}),
        ("P", {"bits": 4}),
        ("RGB", {}),
        ("LA", {}),
        ("RGBA", {}),
    ):
        for size in ((1, 1), (7, 3), (9, 2), (16, 5)):
            data = encoded(Image.new(mode, size), "PNG", **options)
            assert pixels(data).max() == 0, (mode, size)
            at = data.index(b"IDAT")
            rows = zlib.decompress(data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")])
            short = (
                data[: at - 4]
                + chunk(b"IDAT", zlib.compress(rows[: len(rows) // size[1] * (size[1] - 1)]))
                + chunk(b"IEND", b"")
            )
            with pytest.raises(DecodeError):
                pixels(short)


PIXELS_REMAIN = (
    "after its end",
    "pictures",
    "pages",
    "bmp 1 bit",
    "tiff 1 bit",
    "group 3",
    "tiff 1 bit of many strips",
)
"""What is cut off here at first is not of the picture: other pictures, and bytes that fill up a row."""


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.endswith(PIXELS_REMAIN)])
def test_a_file_that_is_cut_off_is_damage_in_every_format(name):
    """The last bytes alone, or nearly all: what is not whole is not trained on, whichever decoder is at work."""
    data = WHOLE[name]
    for left in (len(data) - 1, len(data) - 9, len(data) * 9 // 10, len(data) // 2, 20):
        with warnings.catch_warnings(), pytest.raises(DecodeError):
            warnings.simplefilter("ignore")
            pixels(data[:left])


def shortened_strip(data: bytes, part: float, end: bytes) -> bytes:
    """A TIFF of one strip of which a part remains, with the right size."""
    with Image.open(io.BytesIO(data)) as image:
        (at,), (size,) = image.tag_v2[273], image.tag_v2[279]
    strip = data[at : at + int(size * part)] + end
    entry = next(place for number in (3, 4) if (place := data.find(struct.pack("<HHI", 279, number, 1))) > 0)
    data = data[: entry + 8] + struct.pack("<I", len(strip)) + data[entry + 12 :]
    return data[:at] + strip + data[at + len(strip) :]


def shortened() -> Iterator[tuple[str, bytes]]:
    """Files whose coded pixels end early, and whose every size and checksum is right for that."""
    for name, options in (("webp", {}), ("webp lossless", {"lossless": True})):
        data = encoded(RGB, "WEBP", **options)
        body = data[20 : 20 + int.from_bytes(data[16:20], "little")]
        for part in (0.9, 0.5, 0.1):
            kept = body[: int(len(body) * part) // 2 * 2]
            inner = data[8:16] + struct.pack("<I", len(kept)) + kept
            yield f"{name} {part}", b"RIFF" + struct.pack("<I", len(inner)) + inner
    half = encoded(RGB.crop((0, 0, WIDTH, HEIGHT // 2)).quantize(128), "GIF")
    at = half.index(b"\x2c\0\0\0\0") + 7
    tall = struct.pack("<H", HEIGHT)
    yield "gif", half[:8] + tall + half[10:at] + tall + half[at + 2 :]
    for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        short = encoded(RGB.crop((0, 0, WIDTH, HEIGHT - 1)), "TIFF", compression=kind)
        for tag, number in itertools.product((257, 278), (3, 4)):
            field = struct.pack("<HHI", tag, number, 1)
            short = short.replace(field + struct.pack("<I", HEIGHT - 1), field + struct.pack("<I", HEIGHT))
        yield f"tiff {kind}", short
    for kind, mode, end in (
        ("jpeg", "RGB", b"\xff\xd9"),
        ("jpeg", "L", b"\xff\xd9"),
        ("group3", "1", b""),
        ("group4", "1", b""),
    ):
        for part in (0.9, 0.5):
            yield (
                f"tiff {kind} {mode} {part}",
                shortened_strip(encoded(RGB.convert(mode), "TIFF", compression=kind), part, end),
            )
    data = jpeg()
    for left in (0.95, 0.5, 0.1):
        begin = data.index(b"\xff\xda")
        yield f"jpeg {left}", data[: begin + int((len(data) - begin) * left)].rstrip(b"\xff") + b"\xff\xd9"
    cmyk = encoded(RGB.convert("CMYK"), "JPEG")
    yield "jpeg cmyk", cmyk[:-40] + b"\xff\xd9"


@pytest.mark.parametrize(("name", "data"), list(shortened()), ids=lambda value: value if isinstance(value, str) else "")
def test_pixels_that_end_early_in_a_file_that_does_not_are_damage(name, data):
    with warnings.catch_warnings(), pytest.raises(DecodeError):
        warnings.simplefilter("ignore")
        pixels(data)


@pytest.mark.parametrize(
    ("times", "message"), [(2, "its strips hold .* bytes, the file"), (1, "more pixels than the picture")]
)
def test_a_tiff_of_strips_that_hold_more_than_it_costs_neither_memory_nor_time(times, message):
    """One megabyte that every strip names, or strips of 65,500 x 65,500 pixels."""
    data = bytearray(encoded(RGB.convert("L"), "TIFF", compression="jpeg"))
    with Image.open(io.BytesIO(bytes(data))) as image:
        (at,) = image.tag_v2[273]
    if times == 2:
        entry = next(place for number in (3, 4) if (place := data.find(struct.pack("<HHI", 279, number, 1))) > 0)
        data[entry : entry + 12] = struct.pack("<HHII", 279, 4, 1, 1 << 30)
    else:
        frame = data.index(b"\xff\xc0", at)
        data[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    with warnings.catch_warnings(), pytest.raises(DecodeError, match=message):
        warnings.simplefilter("ignore")
        pixels(bytes(data))


@pytest.mark.parametrize("name", ["png", "png palette", "png interlaced", "png in many pieces"])
def test_no_flipped_bit_of_a_png_goes_unnoticed(name):
    """Every piece has a checksum, at which Pillow does not look where it decodes pixels."""
    data = WHOLE[name]
    begin = data.index(b"IDAT")
    for at in [*range(begin, len(data), max(1, (len(data) - begin) // 150)), begin + 1, len(data) - 14]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(DecodeError):
            pixels(bytes(damaged))


@pytest.mark.parametrize("length", [300, 1000, 4096])
def test_zeros_in_a_jpeg_scan_are_noticed_on_every_way_through(length):
    """A lenient decoder takes them for pixels: also where the strict one has something harmless to say first."""
    whole = encoded(Image.fromarray(picture(300, 400)), "JPEG", quality=88)
    begin = whole.index(b"\xff\xda") + 20
    noticed = 0
    for at in range(begin, len(whole) - length - 2, 3001):
        zeroed = bytearray(whole)
        zeroed[at : at + length] = bytes(length)
        for version in (1, 2):
            zeroed[zeroed.index(b"JFIF\0") + 5] = version
            try:
                decode_image(bytes(zeroed), "jpg")
            except DecodeError:
                noticed += 1
    assert noticed >= 0.9 * 2 * len(range(begin, len(whole) - length - 2, 3001))  # measured: 0.93 and more


# --------------------------------------------------------------------------------------------------------------------
# Metadata


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"eXIf"])
def test_megabytes_of_text_and_profile_in_a_png_are_passed_over(kind):
    """Pillow refuses more than one; the pixels do not depend on them."""
    packed = zlib.compress(bytes(5 << 20))
    text = {
        b"zTXt": b"k\0\0" + packed, b"iTXt": b"k\0\1\0\0\0" + packed, b"iCCP": b"p\0\0" + packed,
        b"tEXt": b"k\0" + b"x" * (5 << 20), b"eXIf": bytes(5 << 20),
    }[kind]  # fmt: skip
    assert np.array_equal(pixels(png(ROWS, before=chunk(kind, text))), ARRAY)
    assert np.array_equal(pixels(png(ROWS, before=chunk(kind, b"damaged"))), ARRAY)


@pytest.mark.parametrize("prefix", [b"k\0\0", b"k\0\1\0\0\0", b"k\0\1\0en\0title\0"])
def test_a_text_that_unpacks_to_a_memory_full_is_a_bomb(prefix):
    kind = b"zTXt" if prefix == b"k\0\0" else b"iTXt"
    bomb = chunk(kind, prefix + zlib.compress(bytes(80 << 20)))
    with pytest.raises(DecodeError, match="Decompressed data too large"):
        pixels(png(ROWS, before=bomb))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_used_and_said(kind):
    notes: set[str] = set()
    data = frames(kind, **({"lossless": True} if kind == "WEBP" else {}))
    decode_image(data, "x", notes=notes)
    assert notes == {f"some {kind} files hold several frames or pages; the first of each is used"}
    decode_image(encoded(RGB, kind), "x", notes=notes)
    assert len(notes) == 1


@pytest.mark.parametrize("seed", range(4))
def test_no_change_to_a_file_is_anything_but_an_image_or_damage(seed):
    """A lack of memory, a crash or a hang would end a run that data.on_bad_sample=replace is to carry on."""
    rng = np.random.default_rng(seed)
    small = [data for data in WHOLE.values() if len(data) < 30_000]
    for number in range(250):
        data = bytearray(small[(250 * seed + number) % len(small)])
        for _ in range(rng.integers(1, 5)):
            at = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 100)))
            kind = rng.integers(4)
            if kind == 0:
                data[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[at : at + 4] = bytes(4) if rng.random() < 0.5 else b"\x7f\xff\xff\xff"
            elif kind == 2:
                data[at : at + int(rng.integers(1, 40))] = b""
            else:
                data[at:at] = rng.bytes(8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert pixels(bytes(data)).shape[2] == 3
            except DecodeError as error:
                assert "\n" not in str(error) or len(str(error)) < 500
