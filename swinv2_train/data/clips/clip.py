"""A sample of many frames, of which only those are decoded that are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from swinv2_train.config.pixels import FRAMES_EXTENSION
from swinv2_train.data.clips.frames_file import FramesFile
from swinv2_train.data.transforms.decode import DecodeError, decode_image


class Clip(ABC):
    """Frames 0 .. num_frames - 1 in the order in which they are shown."""

    num_frames: int

    @abstractmethod
    def frames(self, positions: Sequence[int]) -> Iterator[Tensor]:
        """The frames at these positions, which rise: uint8 (3, H, W) each, all of one size.  Raises DecodeError."""


class HeldClip(Clip):
    """A clip that is in memory: uint8 (3, T, H, W)."""

    def __init__(self, frames: Tensor) -> None:
        self._frames, self.num_frames = frames, frames.shape[1]

    def frames(self, positions: Sequence[int]) -> Iterator[Tensor]:
        yield from (self._frames[:, position] for position in positions)


class JpegClip(Clip):
    """The JPEG files of a clip's frames (frames_file.py).  Raises DecodeError where they are not whole."""

    def __init__(self, data: bytes) -> None:
        try:
            self._file = FramesFile(data)
        except ValueError as error:
            raise DecodeError(f"not a readable .{FRAMES_EXTENSION} file ({error})") from error
        self.num_frames = self._file.num_frames

    def frames(self, positions: Sequence[int]) -> Iterator[Tensor]:
        size: torch.Size | None = None
        for position in positions:
            try:
                frame = decode_image(self._file.frame(position), "jpg")
            except DecodeError as error:
                raise DecodeError(f"frame {position}: {error}") from error
            check_frame_size(frame.shape, size, position)
            size = frame.shape
            yield frame


def check_frame_size(shape: Sequence[int], others: Sequence[int] | None, position: int) -> None:
    """Raises DecodeError for a frame of another size, (3, H, W), than the ones before it; None: there are none."""
    if others is not None and tuple(shape) != tuple(others):
        raise DecodeError(
            f"frame {position} has {shape[1]} x {shape[2]} pixels (height x width), the ones before it {others[1]} x "
            f"{others[2]}; a clip has frames of one size"
        )
