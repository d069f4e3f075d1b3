"""What the numbers of an image file mean: photographs of 3 x 8 bits, or values of any number of bands.

A photograph is decoded to 8-bit RGB.  Values keep the file's own numbers, whatever its element type, and are scaled and
normalised on the device in float32.
"""

from __future__ import annotations

import math
from typing import Any

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.schema import Config, DataConfig

VALUE_FILES = ("npy", "npz", "tif", "tiff", "png", "jpg", "jpeg", "webp", "jfif", "bmp", "gif")
"""What a member that data.image_member names may end in."""
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
"""Files of a video decoder (data/clips/video.py), in order of preference."""
FRAMES_EXTENSION = "frames"
"""The JPEG files of a clip's frames (data/clips/frames_file.py)."""
CLIP_EXTENSIONS = (*VIDEO_EXTENSIONS, FRAMES_EXTENSION)
"""What samples of many frames end in."""
_PHOTOGRAPHS = {((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}
"""Statistics that conf/data/ has for pixels in 0..1."""


def per_band(value: Any, count: int, default: float) -> list[float]:
    """A key that holds a number for all bands, or one for each; null is the default."""
    if value is None:
        return [default] * count
    return [float(each) for each in value] if isinstance(value, list | tuple) else [float(value)] * count


def check_bands(config: Config) -> None:
    """Everything that is given per band is given for model.in_chans bands.  Raises ConfigError."""
    data, count = config.data, config.model.in_chans
    one_each = f"one for each of the {count} bands (model.in_chans)"
    for name in ("mean", "std"):
        found = getattr(data, name)
        if len(found) != count:
            raise ConfigError(f"data.{name} ({found}) must hold {count} numbers, {one_each}")
    for name in ("factor", "offset"):
        value = getattr(data.scale, name)
        if isinstance(value, list) and len(value) != count:
            raise ConfigError(f"data.scale.{name} ({value}) must be a number, or hold {count}, {one_each}")
    clip = data.scale.clip
    if clip is not None and (len(clip) != 2 or not clip[0] < clip[1] or not all(map(math.isfinite, clip))):
        raise ConfigError(f"data.scale.clip ({clip}) must be [low, high] with low < high, or null")
    if data.bands is not None and len(data.bands) != count:
        raise ConfigError(
            f"data.bands ({data.bands}) chooses {len(data.bands)} bands, but model.in_chans is {count}; set "
            f"model.in_chans={len(data.bands)}, or choose {count}"
        )
    _check_pictures(data, count)
    if data.image_member is not None:
        _check_member(data.image_member)
    if config.reads_values:
        _check_units(data)


def _check_pictures(data: DataConfig, count: int) -> None:
    chosen = data.picture_bands
    if chosen is not None and (len(chosen) not in (1, 3) or any(not 0 <= band < count for band in chosen)):
        raise ConfigError(
            f"data.picture_bands ({chosen}) must be three, or one, of the model's bands 0..{count - 1} "
            "(places in data.bands), or null"
        )


def _check_member(member: str) -> None:
    ending = member.rpartition(".")[2]
    endings = (*VALUE_FILES, *CLIP_EXTENSIONS)
    if member.startswith(".") or "/" in member or member != member.lower() or ending not in endings:
        raise ConfigError(
            f"data.image_member ({member}) must be what follows KEY. in the member's name, in small letters, and end "
            f"in {', '.join(endings)}: input.npy for KEY.input.npy"
        )


def _check_units(data: DataConfig) -> None:
    """The shipped statistics are of pixels in 0..1: of the files' own numbers they would be wrong without a word."""
    if data.scale.factor is None and (tuple(data.mean), tuple(data.std)) in _PHOTOGRAPHS:
        raise ConfigError(
            f"data.mean ({data.mean}) and data.std are the default's, of pixels in 0..1, but images are read as the "
            "files' own numbers; set both to the bands' own, or data.scale.factor to what brings these to 0..1 (8 bit: "
            "0.00392156862745098, values in 0..1: 1)"
        )
