"""KEY.frames: the JPEG files of a clip's frames in one file, to be read without a video decoder.

Eight bytes that say what it is, the number of frames, the size of each frame's file (both little-endian, 32 bits), and
then these files, one after the other, with nothing between or behind them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate

SIGNATURE = b"\x89JPEGs1\n"
_COUNT = struct.Struct("<I")
_JPEG = b"\xff\xd8"


def pack_frames(frames: Sequence[bytes]) -> bytes:
    """The file of a clip whose frames are these JPEG files, in the order in which they are shown.

    Raises ValueError where there is none, and for one that is no JPEG file.
    """
    if not frames:
        raise ValueError("a clip has at least one frame")
    for number, frame in enumerate(frames):
        if frame[:2] != _JPEG:
            raise ValueError(f"frame {number} is no JPEG file")
    sizes = struct.pack(f"<{len(frames)}I", *map(len, frames))
    return b"".join([SIGNATURE, _COUNT.pack(len(frames)), sizes, *frames])


class FramesFile:
    """The frames' JPEG files in a file of pack_frames.  Raises ValueError where it is none, or not whole."""

    def __init__(self, data: bytes) -> None:
        begin = len(SIGNATURE) + _COUNT.size
        if data[: len(SIGNATURE)] != SIGNATURE:
            raise ValueError("it does not begin as such a file does")
        if len(data) < begin:
            raise ValueError("cut off in its index")
        (count,) = _COUNT.unpack_from(data, len(SIGNATURE))
        files = begin + 4 * count
        if count == 0:
            raise ValueError("no frame in it")
        if files > len(data):  # before so much is asked for
            raise ValueError(f"its index promises {count} frames, for which it is too short")
        self._ends = list(accumulate(struct.unpack_from(f"<{count}I", data, begin), initial=files))
        if self._ends[-1] != len(data):
            raise ValueError(f"{len(data)} bytes, its index says {self._ends[-1]}")
        self._data = data

    @property
    def num_frames(self) -> int:
        return len(self._ends) - 1

    def frame(self, number: int) -> bytes:
        """The JPEG file of a frame, 0 to num_frames - 1."""
        return self._data[self._ends[number] : self._ends[number + 1]]
