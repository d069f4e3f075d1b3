"""Label images: PNG or TIFF files whose pixels are the numbers of classes, read as they are and never as colours."""

from __future__ import annotations

import io
from functools import partial

import numpy as np

from swinv2_train.data.sample import SampleError
from swinv2_train.data.transforms.band_tiff import SIGNATURES as TIFF_SIGNATURES
from swinv2_train.data.transforms.band_tiff import read_tiff
from swinv2_train.data.transforms.decode import MAX_PIXELS, DecodeError, check_png_rows, check_size, reading
from swinv2_train.data.transforms.png import SIGNATURE, Png, read_png

_GREY, _PALETTE = 0, 3
"""PNG's numbers of its kinds of colour."""
_COLOURS = {2: "RGB", 4: "grey with transparency", 6: "RGB with transparency"}
_LISTED = 8


def read_label_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers in a label image: of a palette its indices, of grey its values, of 1 to 16 bits.

    data: the bytes of a PNG or TIFF file.  Returns uint8 (H, W), or uint16 where the file has 16 bits.  Raises
    DecodeError for damaged bytes, more pixels than max_pixels, and colours, which are no numbers of classes;
    MachineError where the machine cannot decode any.
    """
    if data.startswith(TIFF_SIGNATURES):
        return _read_tiff(data, max_pixels)
    with reading(data, "png"):
        if data[:8] != SIGNATURE:
            raise DecodeError(
                "a label image that is no PNG or TIFF file; save the numbers of the classes as PNG (JPEG changes them)"
            )
        png = read_png(data, partial(check_size, max_pixels=max_pixels))
        colour = png.data[25]
        if colour in _COLOURS:
            raise DecodeError(
                f"a label image of colours ({_COLOURS[colour]}), which are no numbers of classes; save it as grey "
                "(Pillow's mode L or I;16) or with a palette (P): a number for each colour"
            )
        values = _values(png)
        check_png_rows(png, values[-1])
        return values


def _read_tiff(data: bytes, max_pixels: int) -> np.ndarray:
    def check(height: int, width: int, bands: int) -> None:
        check_size(height, width, max_pixels)
        if bands != 1:
            raise DecodeError(f"a label image of {bands} bands, which are no numbers of classes; save one of them")

    with reading(data, "tif"):
        values = read_tiff(data, check, stored=True).values[..., 0]
        if values.dtype not in (np.uint8, np.uint16):
            raise DecodeError(f"a label image of {values.dtype}; save the numbers of the classes as uint8 or uint16")
        return np.ascontiguousarray(values)


def as_png(data: bytes) -> bytes:
    """A label image as a PNG file, which it is as a rule; raises what read_label_image raises."""
    if not data.startswith(TIFF_SIGNATURES):
        return data
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(read_label_image(data)).save(file, "PNG")
    return file.getvalue()


def _values(png: Png) -> np.ndarray:
    from PIL import Image

    depth, colour = png.data[24], png.data[25]
    with Image.open(io.BytesIO(png.data), formats=["PNG"]) as image:
        values = np.array(image)
    if depth == 16:
        return values.astype(np.uint16)
    values = values.astype(np.uint8)
    if colour == _GREY and depth in (2, 4):  # Pillow spreads them over 0 to 255
        values //= 255 // ((1 << depth) - 1)
    return values


def class_numbers(
    values: np.ndarray,
    num_classes: int,
    reduce_zero_label: bool,
    ignore_index: int,
    keys: str = "task.num_classes, task.reduce_zero_label, task.ignore_index",
) -> np.ndarray:
    """The class of each pixel, 0 to num_classes - 1, or ignore_index.

    values: of read_label_image.  reduce_zero_label: 0 is ignored and k is class k - 1, as ADE20K counts; what is
    ignore_index in the file stays ignored.  It is done here and nowhere else.  keys: what errors call the settings.
    Returns (H, W), of the type that label_dtype names.  Raises SampleError for a value that is none of these.
    """
    labels = values.astype(np.int32)
    if reduce_zero_label:
        labels = np.where((labels == 0) | (labels == ignore_index), ignore_index, labels - 1)
    wrong = (labels >= num_classes) & (labels != ignore_index)
    if wrong.any():
        found = _out_of_range(values, wrong, num_classes, reduce_zero_label, ignore_index)
        raise SampleError(f"{found} ({keys})")
    return labels.astype(label_dtype(ignore_index))


def label_dtype(ignore_index: int) -> type[np.uint8] | type[np.int32]:
    """What labels are kept in: a byte a pixel where that holds all of them."""
    return np.uint8 if ignore_index < 256 else np.int32


def _out_of_range(
    values: np.ndarray, wrong: np.ndarray, num_classes: int, reduce_zero_label: bool, ignore_index: int
) -> str:
    found = np.unique(values[wrong]).tolist()
    listed = ", ".join(map(str, found[:_LISTED])) + (", ..." if len(found) > _LISTED else "")
    if reduce_zero_label:
        allowed = f"1 to {num_classes} are classes, 0 and {ignore_index} are"
    else:
        allowed = f"0 to {num_classes - 1} are classes, {ignore_index} is"
    return f"its label image has {int(wrong.sum())} pixels of the values {listed}; {allowed} ignored"


def check_sizes(labels: tuple[int, int], image: tuple[int, int]) -> None:
    """Raises SampleError where a label image and its image have other sides, (height, width)."""
    if labels != image:
        turned = " (turned by a quarter: the camera's rotation was applied to one of them alone)"
        raise SampleError(
            f"its label image has {labels[0]} x {labels[1]} pixels and the image {image[0]} x {image[1]}"
            f"{turned if labels == image[::-1] else ''}"
        )
