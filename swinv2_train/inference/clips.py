"""Clips as programs hold them: files, bytes, arrays and tensors, as what a transform takes."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.config.pixels import CLIP_EXTENSIONS, FRAMES_EXTENSION
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.data.clips.clip import Clip, HeldClip
from swinv2_train.data.clips.frames_file import SIGNATURE
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.transforms.decode import DecodeError

if TYPE_CHECKING:
    Film = str | PathLike[str] | bytes | np.ndarray | Tensor
    """One clip: a path, a file's bytes, an array (T, H, W, 3), or a tensor (3, T, H, W)."""

_FILE_BYTES = 2**34


Row = dict[str, Any]


def row_of_clip(transform: Callable[[Clip], Row], film: Film) -> Row:
    """What a transform makes of one clip; of a file, only the frames that it sees are decoded.

    Raises ConfigError for a clip that cannot be read, which it names, or that is of another form.
    """
    name = str(film) if isinstance(film, str | PathLike) else f"a clip ({type(film).__name__})"
    try:
        return transform(_opened(film, name))
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}; name a clip that can be read") from error
    except DecodeError as error:
        raise ConfigError(f"{name}: {error}") from error


def _opened(film: Film, name: str) -> Clip:
    if isinstance(film, str | PathLike):
        extension = Path(film).suffix.removeprefix(".").lower()
        if extension not in CLIP_EXTENSIONS:
            raise ConfigError(f"{name} is no clip, and this model takes clips: {', '.join(CLIP_EXTENSIONS)}")
        return open_clip(read_bytes(Path(film).expanduser(), _FILE_BYTES), extension)
    if isinstance(film, bytes):
        return open_clip(film, FRAMES_EXTENSION if film.startswith(SIGNATURE) else "mp4")
    return HeldClip(_frames(film))


def _frames(film: np.ndarray | Tensor) -> Tensor:
    """uint8 (3, T, H, W)"""
    found = film.detach().cpu() if isinstance(film, Tensor) else None
    if isinstance(film, np.ndarray) and film.ndim == 4:
        found = torch.from_numpy(np.array(film)).permute(3, 0, 1, 2)
    if found is None or found.dtype != torch.uint8 or found.ndim != 4 or found.shape[0] != 3 or 0 in found.shape:
        shape = tuple(film.shape) if isinstance(film, np.ndarray | Tensor) else "no shape"
        raise ConfigError(
            f"a clip is {type(film).__name__} of {getattr(film, 'dtype', 'no type')} and {shape}, and this model takes "
            "clips; give a file, or uint8: an array (frames, height, width, 3), or a tensor (3, frames, height, width)"
        )
    return found
