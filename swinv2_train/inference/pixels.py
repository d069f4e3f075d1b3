"""Images as programs hold them: files, bytes, Pillow's images, arrays and tensors, as what a transform takes."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.data.transforms.bands import Bands, decode_bands
from swinv2_train.data.transforms.decode import DecodeError, decode_image

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
    """One image: a path, a file's bytes, an image of Pillow's, an array (H, W, C), or a tensor (C, H, W)."""

_FILE_BYTES = 2**31


def pixels(image: Picture, bands: Bands | None) -> Tensor:
    """One image as a transform takes it: uint8 (3, H, W) of a photograph, or the values of bands, (C, H, W).

    Arrays and tensors of photographs are uint8, grey ones may lack the channels; those of values are of any type that
    files may have, arrays laid out as data.array_layout says, and all of their bands are given, for data.bands chooses.
    Raises ConfigError for an image that cannot be read, which it names, or that is of another form.
    """
    name = str(image) if isinstance(image, str | PathLike) else f"an image ({type(image).__name__})"
    try:
        if isinstance(image, str | PathLike):
            image = read_bytes(Path(image).expanduser(), _FILE_BYTES)
        if isinstance(image, bytes):
            return _decoded(image, Path(name).suffix, bands)
        if bands is not None:
            return _decoded(_npy(image, bands), "npy", bands)
        return _photograph(image)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}; name an image that can be read") from error
    except DecodeError as error:
        raise ConfigError(f"{name}: {error}") from error


def _decoded(data: bytes, extension: str, bands: Bands | None) -> Tensor:
    return decode_image(data, extension) if bands is None else decode_bands(data, extension, bands)


def _npy(image: Any, bands: Bands) -> bytes:
    """What a file of these values would hold, so that they are looked at as a file's are."""
    if isinstance(image, Tensor):  # (C, H, W)
        values = image.detach().cpu().numpy()
        if values.ndim == 3 and bands.layout == "hwc":
            values = values.transpose(1, 2, 0)
    else:
        values = np.asarray(image)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values), allow_pickle=False)
    return file.getvalue()


def _eight_bit(image: Any) -> Any:
    """An image of Pillow's in RGB.  Its own conversion would clip 16 bits, which files are scaled from."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise ConfigError(f"an image is a path, bytes, an image of Pillow's, an array or a tensor, not {type(image)}")
    if image.mode.startswith("I;16"):
        file = io.BytesIO()
        image.save(file, "PNG")
        return decode_image(file.getvalue(), "png").permute(1, 2, 0).numpy()
    if image.mode in ("I", "F"):
        raise ConfigError(
            f"an image of Pillow's mode {image.mode} has no defined black and white; convert it to RGB or L"
        )
    return image.convert("RGB")


def _photograph(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        found = image.detach().cpu()
        if found.ndim == 2:
            found = found.unsqueeze(0)
    else:
        values = np.array(image if isinstance(image, np.ndarray) else _eight_bit(image))
        if values.ndim == 2:
            values = values[..., None]
        found = torch.from_numpy(values)
        if found.ndim == 3:
            found = found.permute(2, 0, 1)
    if found.dtype != torch.uint8 or found.ndim != 3 or found.shape[0] not in (1, 3) or 0 in found.shape:
        raise ConfigError(
            f"an image is {found.dtype} of shape {tuple(image.shape)}; a photograph is uint8, an array (H, W, 3) or a "
            "tensor (3, H, W), its pixels in 0..255"
        )
    return found.expand(3, -1, -1)
