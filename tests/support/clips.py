"""Clips for tests: every frame tells its number by its brightness, and by its pattern which way up it is."""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swinv2_train.data.clips.frames_file import pack_frames

STEP = 8
"""Levels of grey from one frame to the next."""


def numbered(number: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """uint8 (H, W, 3): 20 + STEP x number (0 to 23), but for a brighter corner at the upper left."""
    frame = np.full((*size, 3), 20 + STEP * number, np.uint8)
    frame[: size[0] // 4, : size[1] // 4] += 40
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number of a frame of numbered(), (3, H, W), by its lower right quarter, whatever was cut off above."""
    height, width = frame.shape[1:]
    return round((float(frame[:, height // 2 :, width // 2 :].mean()) - 20) / STEP)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def frames_file(count: int, size: tuple[int, int] = (32, 48), first: int = 0) -> bytes:
    """KEY.frames of numbered frames."""
    return pack_frames([jpeg(numbered(first + number, size)) for number in range(count)])


def video(
    frames: list[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: list[int] | None = None,
    rotation: int | None = None,
    audio: bool = False,
    header_first: bool = False,
    **options: str,
) -> bytes:
    """A video file of these frames, uint8 (H, W, 3) each, at 10 a second, or at `times` in hundredths of a second.

    rotation: a display matrix of so many degrees.  audio: with a track of silence.  header_first: of an mp4.
    options: of the codec, as FFmpeg calls them (g: frames from one key frame to the next).
    """
    import av

    unit = Fraction(1, 10) if container == "avi" else Fraction(1, 100)  # an avi has a place for every unit
    with (
        tempfile.NamedTemporaryFile() as file,  # which is read again to put the header first
        av.open(file.name, "w", container, options={"movflags": "faststart"} if header_first else {}) as output,
    ):
        stream: Any = output.add_stream(codec, rate=10, options={"g": "6", **options})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.time_base = pixels, unit
        stream.codec_context.time_base = unit
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound: Any = output.add_stream("aac", rate=44100) if audio else None
        for number, pixels_of in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of, format="rgb24").reformat(format=pixels, threads=1)
            frame.pts, frame.time_base = (number * unit.denominator // 10 if times is None else times[number]), unit
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            _silence(output, sound)
        output.close()
        return Path(file.name).read_bytes()


def sound_alone() -> bytes:
    """An mp4 of half a second of silence, without any picture."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        _silence(output, output.add_stream("aac", rate=44100))
    return file.getvalue()


def _silence(output: Any, stream: Any) -> None:
    import av

    for number in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 1024 * number
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
