"""Videos by PyAV (FFmpeg): which frames there are, and any of them exactly.

Decoding begins at the key frame before the first frame that is wanted, so its frames are those of decoding everything.
What is not whole is damage: fewer frames than the container promises, a packet that cannot be decoded, a frame that the
decoder itself calls corrupt.  Of FFmpeg's formats and codecs those alone are read that videos for training come in.
"""

from __future__ import annotations

import errno
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import ConfigError, MachineError
from swinv2_train.data.clips.clip import Clip, check_frame_size
from swinv2_train.data.clips.frame_times import NO_TIME, FrameTimes
from swinv2_train.data.sample import lacking
from swinv2_train.data.transforms.decode import MAX_PIXELS, DecodeError, check_size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CODECS = (
    "h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "h263", "msmpeg4v3",
    "wmv2", "theora", "prores", "dnxhd", "ffv1", "huffyuv", "rawvideo",
)  # fmt: skip
"""FFmpeg's names of what is decoded: some of its other decoders were last looked at long ago."""
_BUFFER_BYTES = 1 << 20
_ROOM_BYTES = 1 << 30
_TURN = 65536
"""1 in a display matrix."""
_MATRICES = {
    (1, 0, 0, 1): (0, False), (0, 1, -1, 0): (3, False), (-1, 0, 0, -1): (2, False), (0, -1, 1, 0): (1, False),
    (-1, 0, 0, 1): (0, True), (1, 0, 0, -1): (2, True), (0, 1, 1, 0): (1, True), (0, -1, -1, 0): (3, True),
}  # fmt: skip
"""a, b, c and d of a display matrix to quarter turns against the clock, behind which it is mirrored left and right.

A pixel (x, y) of the frame is shown at (a x + c y, b x + d y), y pointing down.
"""


def check_decoder(what: str) -> None:
    """Raises ConfigError, which begins with what needs it, where no decoder of videos is installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{what}: videos are decoded by PyAV, which cannot be imported ({error}); pip install 'av>=15' (the extra "
            "'video' of this package), or make .frames files of them where it is (docs/data.md)"
        ) from error


def read_times(data: bytes, extension: str) -> FrameTimes:
    """When the frames of a video are shown, by reading all packets and decoding none, where these say it.

    Raises DecodeError for what is no video, or not whole.
    """
    with _opened(data, extension) as (container, stream):
        _check_whole(data, _format(data))
        shown: list[int] = []
        keys: list[int] = []
        promised, told, packets = _promised(stream, data), True, 0
        for packet in container.demux(stream):
            if packet.size == 0:  # asks the decoder for what it holds back
                continue
            if packet.is_corrupt:
                raise DecodeError(f"packet {packets} is not whole")
            avi = _format(data) == "avi"  # counts frames that it leaves out, and marks too many as key frames
            packets = (packet.dts or 0) + 1 if avi else packets + 1
            if packet.pts is None or avi:
                told = False
                continue
            if packet.is_keyframe:
                keys.append(packet.pts)
            if not packet.is_discard:  # an edit list leaves it out
                shown.append(packet.pts)
    if packets < promised:
        raise DecodeError(f"it promises {promised} frames and holds {packets}; it is cut off, or was never finished")
    if not packets or (told and not shown):
        raise DecodeError("no frame in it")
    if told and keys and len({*shown}) == len(shown):
        return FrameTimes(np.array(sorted(shown), "<i8"), np.array(sorted(keys), "<i8"))
    count = sum(1 for _ in _decoded(data, extension, None))
    if count == 0:
        raise DecodeError("no frame in it")
    return FrameTimes(np.full(count, NO_TIME, "<i8"), np.array([NO_TIME], "<i8"))


def video_stream_of(data: bytes, extension: str) -> int:
    """The number of the stream that is decoded, which is one that is decoded.  Raises DecodeError."""
    with _opened(data, extension) as (_, stream):
        return stream.index


class VideoClip(Clip):
    """A video file that is in memory.  times: None = they are looked for.  Raises DecodeError."""

    def __init__(self, data: bytes, extension: str, times: FrameTimes | None) -> None:
        self.data, self.extension = data, extension
        self.times = read_times(data, extension) if times is None else times
        self.num_frames = len(self.times.shown)

    def clock(self) -> tuple[list[int], Fraction | None]:
        """When each frame is shown, from the first one on, and the unit of that in seconds (None = not known).

        Where the video does not say it, its frames are evenly apart.  Raises DecodeError.
        """
        with _opened(self.data, self.extension) as (_, stream):
            unit, rate = stream.time_base, stream.average_rate
        if self.times.known and unit:
            return (self.times.shown - self.times.shown[0]).tolist(), unit
        return [*range(self.num_frames)], 1 / rate if rate else None

    def frames(self, positions: Sequence[int]) -> Iterator[Tensor]:
        times, size = self.times, None
        wanted = dict(zip(times.shown[list(positions)].tolist(), positions, strict=True)) if times.known else {}
        in_rgb = _in_rgb()
        waiting = iter(positions)
        position = next(waiting, None)
        if position is None:
            return
        begin = times.key_before(position) if times.known else None
        for number, frame in enumerate(_decoded(self.data, self.extension, begin)):
            if times.known and frame.pts is not None and frame.pts > times.shown[position]:
                break
            if (wanted.get(frame.pts) if times.known else number) != position:
                continue
            if frame.is_corrupt:
                raise DecodeError(f"frame {position} is damaged")
            pixels = _pixels(in_rgb(frame))
            check_frame_size(pixels.shape, size, position)
            size = pixels.shape
            yield pixels
            position = next(waiting, None)
            if position is None:  # the next frame would be decoded in vain
                return
        raise DecodeError(f"frame {position} of {self.num_frames} cannot be decoded")


def _decoded(data: bytes, extension: str, begin: int | None) -> Iterator[VideoFrame]:
    """All frames in the order in which they are shown, from the key frame of this time stamp on; None = from the
    first.
    """
    with _opened(data, extension) as (container, stream):
        if begin is not None:
            container.seek(begin, stream=stream, backward=True)
        for number, packet in enumerate(container.demux(stream)):
            if number == 0 and begin is not None and (packet.pts is None or packet.pts > begin):
                break  # containers look for packets by the time of decoding them, which may lead to a later one
            yield from packet.decode()
        else:
            return
    yield from _decoded(data, extension, None)


@contextmanager
def _opened(data: bytes, extension: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video.  What FFmpeg raises of damaged bytes is a DecodeError; MachineError where the
    machine was the reason.
    """
    check_decoder(f"a .{extension} file")
    import av

    try:
        with av.open(
            io.BytesIO(data), "r", format=_format(data), io_open=_no_other_file, buffer_size=_BUFFER_BYTES
        ) as container:
            stream = _video(container)
            yield container, stream
    except (DecodeError, ConfigError):
        raise
    except Exception as error:
        # The bytes are in memory: FFmpeg's errors of input and of permission are of what they say, not of a disk.
        fault = lacking(error) if getattr(error, "errno", errno.ENOMEM) in (None, errno.ENOMEM) else None
        if fault is not None and has_room():
            raise DecodeError(f"damaged: it asks for more memory than a video of {len(data)} bytes takes") from error
        if fault is not None:
            raise MachineError(f"a video of {len(data)} bytes cannot be decoded: {fault}") from error
        what = str(error).split("[Errno")[-1][:200]
        raise DecodeError(f"not a readable .{extension} video ({type(error).__name__}: {what})") from error


def has_room() -> bool:
    """Whether the machine gives more memory than decoding a video takes; then a file has asked for what none gives."""
    try:
        np.empty(_ROOM_BYTES, np.uint8)  # which nobody touches, so that it costs nothing
    except MemoryError:
        return False
    return True


def _promised(stream: VideoStream, data: bytes) -> int:
    """How many packets the container says that there are; 0 where it does not.  Raises DecodeError where some lie
    beyond the file's end.
    """
    if _format(data) != "mp4":
        return stream.frames
    entries = stream.index_entries  # an edit list leaves packets out, so they cannot be counted
    beyond = sum(entry.pos + entry.size > len(data) for entry in entries)
    if beyond:
        raise DecodeError(f"it promises {len(entries)} frames, of which {beyond} lie behind its end; it is cut off")
    return 0


def _check_whole(data: bytes, form: str) -> None:
    """Raises DecodeError where the container's outermost parts go on behind the file's end."""
    end = 0
    if form == "avi":
        end = 8 + int.from_bytes(data[4:8], "little")
    elif form == "matroska":
        size = len(data)
        for _ in range(2):  # the header, and the segment that holds everything
            first = data[end + 4] if end + 5 <= size else 0
            width = 9 - first.bit_length()
            value = int.from_bytes(data[end + 4 : end + 4 + width], "big") & ((1 << (7 * width)) - 1)
            if first == 0 or value == (1 << (7 * width)) - 1:  # not told, as of a recording that was sent
                return
            end += 4 + width + value
    else:
        while end + 8 <= len(data):
            size, head = int.from_bytes(data[end : end + 4], "big"), 8
            if size == 1:
                size, head = int.from_bytes(data[end + 8 : end + 16], "big"), 16
            if size == 0:  # up to the end
                return
            if size < head:
                raise DecodeError(f"damaged: a part of {size} bytes at byte {end}")
            end += size
    if end > len(data):
        raise DecodeError(f"cut off: {len(data)} bytes of {end}")


def _format(data: bytes) -> str:
    """FFmpeg's name of the container, by its first bytes: it would take anything, lists of other files among it."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise DecodeError(
        "an empty file" if not data else "no video (it begins neither as mp4 or mov, nor as webm or mkv, nor as avi)"
    )


def _no_other_file(url: str, flags: int, options: Any) -> NoReturn:
    raise DecodeError("it names another file to be read")


def _video(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise DecodeError(f"no video in it ({kinds} alone)")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        raise DecodeError(f"its codec ({'unknown' if context is None else context.name}) is not among those decoded")
    check_size(stream.height, stream.width, MAX_PIXELS)
    context.thread_count = 1  # a loader has a worker for each core
    context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return stream


def _in_rgb() -> Callable[[VideoFrame], tuple[VideoFrame, Any]]:
    """What turns frames into RGB, with their display matrices.

    In this thread: frames' own conversion has threads, for whose end a process would wait for ever that was forked
    while such a frame was not yet collected.
    """
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()

    def convert(frame: VideoFrame) -> tuple[VideoFrame, Any]:
        check_size(frame.height, frame.width, MAX_PIXELS)
        return reformatter.reformat(frame, format="rgb24", threads=1), frame.side_data.get("DISPLAYMATRIX")

    return convert


def _pixels(converted: tuple[VideoFrame, Any]) -> Tensor:
    """uint8 (3, H, W), a channels-last view, turned as the video asks for."""
    frame, matrix = converted
    image = torch.from_numpy(frame.to_ndarray()).permute(2, 0, 1)
    if matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("<9i", matrix)
    form = tuple(round(each / _TURN) if each % _TURN == 0 else 2 for each in (a, b, c, d))
    if form not in _MATRICES:
        raise DecodeError("it is to be shown at an angle that is no quarter turn")
    turns, mirrored = _MATRICES[form]
    image = image.rot90(turns, (1, 2))
    return image.flip(2) if mirrored else image
