"""Clips encoded anew for training: short ways from key frame to key frame, and no more pixels than are used.

A clip is decoded from the key frame before its first frame on, so of videos as they are published, with a key frame
every few seconds, most frames are decoded in vain.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from swinv2_train.config.pixels import FRAMES_EXTENSION, VIDEO_EXTENSIONS
from swinv2_train.config.shown import shown, tell
from swinv2_train.data.class_names import listed
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.frames_file import pack_frames
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.clips.video import VideoClip, check_decoder
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.sample import ShardError
from swinv2_train.data.transforms.crop import resize
from swinv2_train.data.transforms.decode import DecodeError

CLIP_FORMS = ("mp4", FRAMES_EXTENSION)
_CRF, _JPEG_QUALITY = 20, 90
_RATE = 25
"""Frames a second of a clip that does not say when its frames are shown."""
_MEASURED, _VIEWS = 8, ClipViews(16, 4)
"""How many clips are decoded to say how fast that is, and which frames of each."""


@dataclass
class ClipEncoder:
    """Encodes clips, and counts what it did."""

    form: str
    """mp4 (H.264), or frames (JPEG files, to be read without a decoder of videos)."""
    short_px: int
    """The shorter side of clips that are larger; others keep their size.  mp4: even, as the other side is made."""
    key_frames: int
    """mp4: frames from a key frame to the next, at most."""
    refuse: bool
    """End at the first damaged clip, which else is left out and counted."""
    damaged: list[str] = field(default_factory=list)
    """The keys of these."""
    num_clips: int = 0
    num_frames: int = 0
    seconds: float = 0.0
    decoding: list[tuple[int, float, float]] = field(default_factory=list)
    """Of each clip that was measured: frames, and the processor's seconds to decode them before and after."""

    def check(self, key: str, extension: str) -> None:
        """Raises ShardError where this file is no clip, ConfigError where what it needs is not installed."""
        if extension not in (*VIDEO_EXTENSIONS, FRAMES_EXTENSION):
            raise ShardError(f"--clips ({self.form}) encodes clips, and SOURCE holds images ({shown(key)}.{extension})")
        if self.form == "mp4" or extension != FRAMES_EXTENSION:
            check_decoder(f"--clips {self.form}")

    def encode(self, key: str, data: bytes, extension: str) -> bytes | None:
        """The clip anew, a file of the ending `form`; None for a damaged one.

        Its frames are turned as the file asks for and shown at the same times after the first; sound is left out.
        Raises ShardError for a damaged clip with refuse, and where FFmpeg cannot encode it.
        """
        begin = time.perf_counter()
        try:
            clip = open_clip(data, extension)
            encoded = _mp4(clip, self, key) if self.form == "mp4" else _frames(clip, self.short_px)
        except DecodeError as error:
            if self.refuse:
                raise ShardError(f"{shown(key)}.{extension} is damaged: {error}; mend or delete it") from error
            if not self.damaged:
                tell(f"warning: {shown(key)}.{extension} is damaged ({error}) and left out; others are counted")
            self.damaged.append(f"{key}.{extension}")
            return None
        self.seconds += time.perf_counter() - begin
        self.num_clips, self.num_frames = self.num_clips + 1, self.num_frames + clip.num_frames
        if len(self.decoding) < _MEASURED:
            wanted = np.unique(_VIEWS.positions(_VIEWS.starts(clip.num_frames)[0], clip.num_frames)).tolist()
            again = open_clip(encoded, self.form)
            self.decoding.append((len(wanted), _decoding_sec(clip, wanted), _decoding_sec(again, wanted)))
        return encoded

    def finish(self) -> None:
        """Say what was done and how fast.  Raises ShardError where every clip is damaged."""
        if self.num_clips == 0:
            raise ShardError(f"all {len(self.damaged)} clips are damaged; look at the lines above")
        if self.damaged:
            tell(f"warning: {len(self.damaged)} damaged clips are left out ({listed(self.damaged)})")
        frames, before, after = (sum(each) for each in zip(*self.decoding, strict=True))
        tell(
            f"{self.num_frames} frames of {self.num_clips} clips encoded, {self.num_frames / self.seconds:.0f} "
            f"frames/s; on one core {frames / max(before, 1e-9):.0f} frames/s are decoded of SOURCE and "
            f"{frames / max(after, 1e-9):.0f} of the shards ({len(self.decoding)} clips, {_VIEWS.frames} frames of "
            f"each, {_VIEWS.stride} apart)"
        )


def _decoding_sec(clip: Clip, positions: list[int]) -> float:
    """The processor's seconds to decode these frames, which are not resized."""
    begin = time.process_time()
    for _ in clip.frames(positions):
        pass
    return time.process_time() - begin


def _smaller(clip: Clip, short_px: int, even: bool) -> Iterator[np.ndarray]:
    """All frames, uint8 (H, W, 3).  even: H and W are, as 4:2:0 needs."""
    for frame in clip.frames(range(clip.num_frames)):
        height, width = frame.shape[1:]
        scale = min(1.0, short_px / min(height, width))
        size = [max(1, round(each * scale)) for each in (height, width)]
        if even:
            size = [max(2, each // 2 * 2) for each in size]
        yield resize(frame, (size[0], size[1]), "bicubic").permute(1, 2, 0).contiguous().numpy()


def _frames(clip: Clip, short_px: int) -> bytes:
    import simplejpeg

    return pack_frames(
        [simplejpeg.encode_jpeg(frame, _JPEG_QUALITY, "RGB", "420") for frame in _smaller(clip, short_px, even=False)]
    )


def _mp4(clip: Clip, encoder: ClipEncoder, key: str) -> bytes:
    import av
    from av.video.reformatter import VideoReformatter

    times, unit = clip.clock() if isinstance(clip, VideoClip) else ([*range(clip.num_frames)], None)
    unit = unit or Fraction(1, _RATE)
    options = {"g": str(encoder.key_frames), "crf": str(_CRF), "preset": "veryfast", "x264-params": "open-gop=0"}
    reformatter, file = VideoReformatter(), io.BytesIO()
    stream: Any = None
    try:
        with av.open(file, "w", format="mp4") as output:
            for when, pixels in zip(times, _smaller(clip, encoder.short_px, even=True), strict=True):
                if stream is None:
                    stream = output.add_stream("libx264", options=options)
                    stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                    stream.codec_context.time_base = stream.time_base = unit
                    stream.codec_context.thread_count = 1
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = reformatter.reformat(frame, format="yuv420p", threads=1)
                frame.pts, frame.time_base = when, unit
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        raise ShardError(
            f"{shown(key)} cannot be encoded as H.264 ({error}); try --clips {FRAMES_EXTENSION}"
        ) from error
    return file.getvalue()
