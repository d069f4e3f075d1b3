"""Videos by torchcodec (data.video_decoder=torchcodec), at the time stamps that PyAV has found: the same frames.

torchcodec needs FFmpeg's shared libraries on the machine.  It has no word for a damaged frame and gives what it can
make of one, so PyAV is the default, and opens every file first: format, codec and size are checked once for both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from swinv2_train.config import ConfigError, MachineError
from swinv2_train.data.clips.clip import check_frame_size
from swinv2_train.data.clips.frame_times import FrameTimes
from swinv2_train.data.clips.video import VideoClip, video_stream_of
from swinv2_train.data.sample import lacking
from swinv2_train.data.transforms.decode import DecodeError


def check_torchcodec() -> None:
    """Raises ConfigError where torchcodec is not installed, or does not find FFmpeg."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        cause = str(error).strip().split("\n")[0][:200]
        raise ConfigError(
            f"data.video_decoder (torchcodec): it cannot be imported ({cause}); install torchcodec for this torch and "
            "FFmpeg's shared libraries, or leave data.video_decoder=pyav"
        ) from error


class TorchcodecClip(VideoClip):
    """A video file that is in memory; where its time stamps are not known, PyAV counts the frames."""

    def frames(self, positions: Sequence[int]) -> Iterator[Tensor]:
        if not self.times.known:
            yield from super().frames(positions)
            return
        from torchcodec.decoders import VideoDecoder

        stream = video_stream_of(self.data, self.extension)
        try:
            decoder = VideoDecoder(
                self.data, stream_index=stream, num_ffmpeg_threads=1, custom_frame_mappings=_mappings(self.times)
            )
            found = iter(decoder.get_frames_at(list(positions)).data)
        except Exception as error:
            fault = lacking(error)
            if fault is not None:
                raise MachineError(f"a video of {len(self.data)} bytes cannot be decoded: {fault}") from error
            cause = " ".join(str(error).split())[:200]
            raise DecodeError(f"not a readable .{self.extension} video ({type(error).__name__}: {cause})") from error
        size = None
        for position, frame in zip(positions, found, strict=True):
            check_frame_size(frame.shape, size, position)
            size = frame.shape
            yield frame


def _mappings(times: FrameTimes) -> str:
    """What torchcodec is told of the frames, in place of a scan of its own."""
    shown = times.shown.astype(object)
    lasts = np.diff(shown, append=shown[-1] + 1)
    keys = set(times.keys.tolist())
    return json.dumps(
        {
            "frames": [
                {"pts": int(pts), "duration": int(last), "key_frame": int(pts in keys)}
                for pts, last in zip(shown, lasts, strict=True)
            ]
        }
    )
