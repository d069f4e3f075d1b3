"""From the bytes of a file to the clip that it holds."""

from __future__ import annotations

from swinv2_train.config.pixels import FRAMES_EXTENSION, VIDEO_EXTENSIONS
from swinv2_train.data.clips.clip import Clip, JpegClip
from swinv2_train.data.clips.frame_times import FrameTimes
from swinv2_train.data.transforms.decode import DecodeError


def open_clip(data: bytes, extension: str, times: FrameTimes | None = None, decoder: str = "pyav") -> Clip:
    """The clip that a file of this ending holds.

    times: where its frames are, as the shard's index has it; None = not known, so it is looked for.
    decoder: of videos, pyav or torchcodec.
    Raises DecodeError for what is no clip or not whole.
    """
    if extension == FRAMES_EXTENSION:
        return JpegClip(data)
    if extension not in VIDEO_EXTENSIONS:
        raise DecodeError(f"a .{extension} file is one image, and model.frames asks for clips")
    if decoder == "torchcodec":
        from swinv2_train.data.clips.torchcodec_video import TorchcodecClip

        return TorchcodecClip(data, extension, times)
    from swinv2_train.data.clips.video import VideoClip

    return VideoClip(data, extension, times)
