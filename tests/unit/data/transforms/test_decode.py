"""Decoding and crops: every colour form becomes RGB, damage is noticed, the resize agrees with Pillow."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_train.data.transforms.crop import centre_crop, random_box, random_flip, random_resized_crop, resize
from swinv2_train.data.transforms.decode import DecodeError, decode_image
from tests.support.images import encoded


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A photograph-like picture: low frequencies and a little noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(small).astype(int) + rng.integers(-6, 7, (height, width, 3)), 0, 255).astype(np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def pixels(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats_come_back_exactly(kind):
    array = smooth(33, 47)
    data = encoded(Image.fromarray(array), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pixels(decode_image(data, kind.lower())), array)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_equals_pillows_decoder(options):
    data = encoded(Image.fromarray(smooth(65, 50)), "JPEG", **options)
    difference = pixels(decode_image(data, "jpg")).astype(int) - np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(difference).max() <= 3  # two builds of libjpeg-turbo


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_is_repeated(kind):
    data = encoded(Image.fromarray(smooth(20, 30)).convert("L"), kind)
    array = pixels(decode_image(data, kind.lower()))
    assert np.array_equal(array[..., 0], array[..., 2]) and np.array_equal(
        array[..., 0], np.asarray(Image.open(io.BytesIO(data)))
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1"])
def test_alpha_and_palettes_become_rgb_without_a_warning(mode):
    image = Image.fromarray(smooth(20, 30)).convert("RGB").convert(mode)
    options = {"transparency": bytes(range(64)) + bytes(192)} if mode == "P" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = pixels(decode_image(encoded(image, "PNG", **options), "png"))
    assert np.array_equal(array, np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_becomes_the_same_rgb_as_pillows():
    """ImageNet has some; libjpeg alone cannot convert them."""
    data = encoded(Image.fromarray(smooth(40, 40)).convert("CMYK"), "JPEG")
    array = pixels(decode_image(data, "jpg"))
    assert np.array_equal(array, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped():
    deep = np.linspace(0, 65535, 30 * 20).astype(np.uint16).reshape(20, 30)
    array = pixels(decode_image(encoded(Image.fromarray(deep), "PNG"), "png"))
    assert np.array_equal(array[..., 1], (deep >> 8).astype(np.uint8))


def test_the_bytes_decide_not_the_name():
    array = smooth(10, 10)
    assert np.array_equal(pixels(decode_image(encoded(Image.fromarray(array), "PNG"), "jpg")), array)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("damage", ["half", "garbage", "empty"])
def test_damaged_files_are_errors(kind, damage):
    data = encoded(Image.fromarray(smooth(120, 120)), kind)
    broken = {"half": data[: len(data) // 2], "garbage": bytes(range(256)) * 4, "empty": b""}[damage]
    with pytest.raises(DecodeError, match=f"not a readable .{kind.lower()} image"):
        decode_image(broken, kind.lower())


def test_zeros_inside_a_jpeg_scan_are_noticed():
    """Only the strict decoder notices; the picture would be half grey."""
    data = bytearray(encoded(Image.fromarray(smooth(200, 200)), "JPEG", quality=75))
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    with pytest.raises(DecodeError, match="not a readable .jpg image"):
        decode_image(bytes(data), "jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_with_too_many_pixels_are_refused_before_decoding(kind):
    data = encoded(Image.new("RGB", (300, 200)), kind)
    assert decode_image(data, "png", max_pixels=60_000).shape == (3, 200, 300)
    with pytest.raises(DecodeError, match="200 x 300 pixels, more than the 59999"):
        decode_image(data, "png", max_pixels=59_999)


def test_a_decompression_bomb_costs_neither_memory_nor_time():
    """20,000 x 20,000 pixels of one colour are 1.2 GB from 1.2 MB; the header tells, nothing is unpacked."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    jpeg = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    for data in (bomb, bytes(jpeg)):
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DecodeError, match="more than the 89478485 that|could be decompression bomb"):
                decode_image(data, "png")
        assert time.process_time() - started < 1.0  # measured 1 ms
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))
    small = encoded(Image.new("RGB", (4, 4)), "PNG")
    small = small[:33] + text + small[33:]
    with pytest.raises(DecodeError, match="not a readable .png image .ValueError: Decompressed data too large"):
        decode_image(small, "png")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 20_000), (20_000, 1), (3, 20_000), (400, 20_000)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_tiny_and_huge_images_become_crops_of_the_size(height, width, kind):
    """One pixel is enough for a picture, and 20,000 in a row are legal below the limit on all pixels."""
    data = encoded(Image.new("RGB", (width, height), (200, 30, 60)), kind)
    image = decode_image(data, kind.lower())
    assert image.shape == (3, height, width)
    crop = random_resized_crop(image, (16, 16), (0.67, 1.0), (0.75, 4 / 3), "bicubic", np.random.default_rng(0))
    assert crop.shape == (3, 16, 16) and (crop.float().mean((1, 2)) - torch.tensor([200.0, 30, 60])).abs().max() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_not_applied_by_any_decoder(kind):
    """ImageNet's convention, and the same pixels whichever decoder is at work."""
    array = smooth(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    options = {"lossless": True} if kind == "WEBP" else {}
    turned = decode_image(encoded(Image.fromarray(array), kind, exif=exif, **options), kind.lower())
    plain = decode_image(encoded(Image.fromarray(array), kind, **options), kind.lower())
    assert turned.shape == (3, 20, 30) and torch.equal(turned, plain)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_16_bit_colour_keeps_its_high_bytes(mode):
    """Pillow cannot write it, so the file is made by hand."""
    channels, colour = {"RGB": (3, 2), "RGBA": (4, 6), "LA": (2, 4)}[mode]
    deep = np.random.default_rng(0).integers(0, 2**16, (5, 7, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 7, 5, 16, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    array = pixels(decode_image(b"\x89PNG\r\n\x1a\n" + data, "png"))
    expected = (deep >> 8).astype(np.uint8)[..., :3] if mode != "LA" else np.repeat((deep >> 8)[..., :1], 3, axis=2)
    assert np.array_equal(array, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(3, 5, 100, 80), (0, 0, 20, 30), (50, 40, 60, 61)])
def test_resize_agrees_with_pillow(interpolation, box):
    top, left, height, width = box
    array = smooth(120, 140)
    image = torch.from_numpy(array).permute(2, 0, 1)
    ours = pixels(resize(image[:, top : top + height, left : left + width], (48, 40), interpolation)).astype(int)
    crop = Image.fromarray(array).crop((left, top, left + width, top + height))
    theirs = np.asarray(crop.resize((40, 48), {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]))
    assert np.abs(ours - theirs).max() <= 2  # measured worst 1 here; another filter gives 20 and more
    assert np.abs(ours - theirs).mean() < 0.1


def test_random_boxes_keep_their_bounds_and_cover_the_image():
    rng = np.random.default_rng(0)
    hits = np.zeros((40, 60))
    for _ in range(3000):
        top, left, height, width = random_box(40, 60, (0.2, 1.0), (0.75, 4 / 3), rng)
        assert 0 <= top <= top + height <= 40 and 0 <= left <= left + width <= 60
        assert 0.17 < height * width / 2400 <= 1.0 and 0.7 < width / height < 1.42  # rounding to whole pixels
        hits[top : top + height, left : left + width] += 1
    assert hits.min() > 15  # the corners are covered least


def test_a_box_that_never_fits_falls_back_to_the_centre():
    assert random_box(10, 100, (1.0, 1.0), (0.75, 4 / 3), np.random.default_rng(0)) == (0, 43, 10, 13)


def test_random_resized_crop_follows_the_generator_and_gives_the_size():
    image = torch.from_numpy(smooth(50, 70)).permute(2, 0, 1)
    arguments = (image, (32, 24), (0.67, 1.0), (0.75, 4 / 3), "bicubic")
    first = random_resized_crop(*arguments, np.random.default_rng(1))
    assert first.shape == (3, 32, 24) and first.dtype == torch.uint8
    assert torch.equal(first, random_resized_crop(*arguments, np.random.default_rng(1)))
    assert not torch.equal(first, random_resized_crop(*arguments, np.random.default_rng(2)))


def test_a_crop_of_the_right_size_is_not_resampled():
    image = torch.from_numpy(smooth(32, 32)).permute(2, 0, 1)
    assert torch.equal(
        random_resized_crop(image, (32, 32), (1.0, 1.0), (1.0, 1.0), "bicubic", np.random.default_rng(0)), image
    )
    assert torch.equal(centre_crop(image, (32, 32), 1.0, "bicubic"), image)


def test_flips_are_mirrors_at_the_given_rate():
    image = torch.arange(3 * 2 * 4, dtype=torch.uint8).view(3, 2, 4)
    rng = np.random.default_rng(0)
    flipped = sum(torch.equal(random_flip(image, 0.3, rng), image.flip(-1)) for _ in range(2000))
    assert 0.25 < flipped / 2000 < 0.35
    assert torch.equal(random_flip(image, 0.0, rng), image) and torch.equal(random_flip(image, 1.0, rng), image.flip(2))


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (256, 292)])
@pytest.mark.parametrize("shape", [(375, 500), (500, 334), (300, 300)])
def test_centre_crop_is_the_official_one(size, resized, shape):
    """TEST.CROP True: Resize(int(256 / 224 * size)), CenterCrop(size) of torchvision, longer side truncated."""
    array = smooth(*shape)
    height, width = (resized if side == min(shape) else int(resized * side / min(shape)) for side in shape)
    picture = Image.fromarray(array).resize((width, height), Image.BICUBIC)
    top, left = int(round((height - size) / 2)), int(round((width - size) / 2))
    official = np.asarray(picture.crop((left, top, left + size, top + size)))
    ours = pixels(centre_crop(torch.from_numpy(array).permute(2, 0, 1), (size, size), 0.875, "bicubic")).astype(int)
    assert np.abs(ours - official).max() <= 2  # measured worst 1; one pixel more on the longer side gives 10 to 18


def test_centre_crop_of_another_shape_covers_it():
    assert centre_crop(torch.zeros(3, 30, 90, dtype=torch.uint8), (32, 48), 1.0, "bilinear").shape == (3, 32, 48)
    assert centre_crop(torch.zeros(3, 30, 30, dtype=torch.uint8), (32, 48), 0.03, "bilinear").shape == (3, 32, 48)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (2, 3_000)])
def test_a_strip_is_cropped_without_being_resized_whole(shape, monkeypatch):
    """One pixel by 20,000 would be 224 x 4,480,000 on the way; what is kept is the same as of its middle alone."""
    from swinv2_train.data.transforms import crop

    largest = [0]
    plain = crop.resize

    def watched(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
        largest[0] = max(largest[0], size[0] * size[1])
        return plain(image, size, interpolation)

    monkeypatch.setattr(crop, "resize", watched)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
    ours = centre_crop(image, (224, 224), 0.875, "bicubic")
    assert ours.shape == (3, 224, 224) and largest[0] < 4e6
    middle = [slice(max(0, (n - 60) // 2), (n + 60) // 2) for n in shape]
    other = centre_crop(image[:, middle[0], middle[1]], (224, 224), 0.875, "bicubic")
    assert (ours.int() - other.int()).abs().max() <= 1
