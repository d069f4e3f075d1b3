"""Videos: any frame exactly, whatever came before it; what is not whole is damage, with a cause in words."""

from __future__ import annotations

import builtins
import struct
import sys

import numpy as np
import pytest

from swinv2_train.config import ConfigError, MachineError
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.clips import video as video_files
from swinv2_train.data.clips.frame_times import FrameTimes
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.clips.torchcodec_video import check_torchcodec
from swinv2_train.data.clips.video import read_times
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.transforms.decode import DecodeError
from tests.support.clips import number_of, numbered, sound_alone, video

COUNT = 20
FRAMES = [numbered(number, (64, 96)) for number in range(COUNT)]


def numbers(data: bytes, positions: list[int], extension: str = "mp4") -> list[int]:
    return [number_of(frame.numpy()) for frame in open_clip(data, extension).frames(positions)]


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """20 frames with B-frames, a key frame every 6."""
    return video(FRAMES, bf="2")


FORMS = {
    "h264": {},
    "h264, open groups": {"x264-params": "open-gop=1:bframes=3:keyint=6:min-keyint=6"},
    "h264, groups of two": {"g": "2", "x264-params": "bframes=2:b-adapt=0:open-gop=1"},
    "vp9 in webm": {"container": "webm", "codec": "libvpx-vp9"},
    "h264 in mkv": {"container": "matroska", "bf": "3"},
    "hevc, open groups": {"codec": "libx265", "x265-params": "open-gop=1:bframes=3:log-level=none:pools=none"},
    "mpeg4 in avi": {"container": "avi", "codec": "mpeg4", "bf": "2", "qmax": "2"},
    "mjpeg in avi": {"container": "avi", "codec": "mjpeg", "pixels": "yuvj420p"},
    "444": {"pixels": "yuv444p"},
    "10 bit": {"pixels": "yuv420p10le"},
    "grey": {"pixels": "gray"},
    "lossless": {"container": "matroska", "codec": "ffv1"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_any_frames_are_those_of_decoding_everything(form):
    """Bit for bit, wherever decoding begins."""
    clip = open_clip(video(FRAMES, **form), "mp4")
    assert clip.num_frames == COUNT
    everything = [frame.clone() for frame in clip.frames(range(COUNT))]
    if form.get("pixels") != "gray":  # of which encoders and decoders take black and white for other levels
        assert [number_of(frame.numpy()) for frame in everything] == list(range(COUNT))
    for positions in ([0], [5, 6, 7], [11, 14, 17], [13], [COUNT - 1]):
        for position, frame in zip(positions, clip.frames(positions), strict=True):
            assert frame.equal(everything[position]), position


def torchcodec_problem() -> str | None:
    try:
        check_torchcodec()
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.skipif(torchcodec_problem() is not None, reason="torchcodec, or FFmpeg for it, is not installed")
@pytest.mark.parametrize("form", [*FORMS.values(), {"rotation": 90}, {"rotation": 180}], ids=[*FORMS, "turned", "over"])
def test_torchcodec_gives_the_same_frames(form):
    data = video(FRAMES, **form)
    ours, theirs = open_clip(data, "mp4"), open_clip(data, "mp4", decoder="torchcodec")
    for positions in ([0], [5, 6, 7], [11, 14, 17], list(range(COUNT))):
        for position, frame, other in zip(positions, ours.frames(positions), theirs.frames(positions), strict=True):
            assert frame.equal(other), position
    with pytest.raises(DecodeError):
        list(open_clip(data[: len(data) // 2], "mp4", ours.times, "torchcodec").frames([COUNT - 1]))


def test_without_torchcodec_the_key_and_the_remedy_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    config = compose_overrides(["experiment=cifar10_finetune", "model.frames=4", "data.video_decoder=torchcodec"])
    with pytest.raises(ConfigError, match=r"data\.video_decoder \(torchcodec\): it cannot be imported.*=pyav"):
        ClipViews.of(config)


def test_time_stamps_and_key_frames_are_those_of_the_packets(mp4):
    times = read_times(mp4, "mp4")
    assert np.array_equal(np.diff(times.shown), np.full(COUNT - 1, times.shown[1]))
    assert np.array_equal(times.keys, times.shown[::6])
    assert [times.key_before(position) for position in (0, 5, 6, 19)] == [times.shown[n] for n in (0, 0, 6, 18)]


def test_frames_are_counted_whatever_the_time_between_them():
    """Variable frame rate: a clip's stride is of frames."""
    times = [0, 1, 2, 50, 51, 90, 200, 201, 202, 203, 300, 301, 302, 303, 304, 600, 601, 602, 603, 604]
    data = video(FRAMES, times=times, bf="2")
    assert numbers(data, [0, 3, 6, 9, 15, 19]) == [0, 3, 6, 9, 15, 19]
    assert read_times(data, "mp4").shown[15] * 3 == read_times(data, "mp4").shown[6] * 9


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (90, (-1, 0)), (180, (-1, -1)), (270, (0, -1))])
def test_a_video_is_turned_as_it_says(degrees, corner):
    """Telephones write frames as the sensor lies, and a display matrix."""
    (frame,) = open_clip(video(FRAMES, rotation=degrees), "mp4").frames([0])
    assert tuple(frame.shape) == ((3, 64, 96) if degrees % 180 == 0 else (3, 96, 64))
    bright = {place: int(frame[0, place[0], place[1]]) for place in [(0, 0), (0, -1), (-1, 0), (-1, -1)]}
    assert max(bright, key=bright.__getitem__) == corner


def test_a_mirrored_video_is_mirrored_and_an_odd_angle_is_refused():
    data = video(FRAMES, rotation=180)
    matrix = struct.pack(">9i", -65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30)
    at = data.index(matrix[:20])  # a, b, u, c, d; where the frame is moved to follows
    mirrored = data[:at] + struct.pack(">5i", -65536, 0, 0, 0, 65536) + data[at + 20 :]
    (frame,) = open_clip(mirrored, "mp4").frames([0])
    assert int(frame[0, 0, -1]) > int(frame[0, 0, 0]) + 20 and int(frame[0, -1, -1]) < int(frame[0, 0, -1]) - 20
    slanted = data[:at] + struct.pack(">5i", 46341, 46341, 0, -46341, 46341) + data[at + 20 :]
    with pytest.raises(DecodeError, match="an angle that is no quarter turn"):
        list(open_clip(slanted, "mp4").frames([0]))


def test_odd_sizes_and_one_frame_are_read():
    clip = open_clip(video([numbered(3, (17, 31))], pixels="yuv444p"), "mp4")
    (frame,) = clip.frames([0])
    assert clip.num_frames == 1 and tuple(frame.shape) == (3, 17, 31) and number_of(frame.numpy()) == 3


def test_sound_and_a_late_header_do_no_harm():
    """moov behind the frames, as most programs write it; and in front."""
    behind, before = video(FRAMES, audio=True), video(FRAMES, audio=True, header_first=True)
    assert behind.index(b"mdat") < behind.index(b"moov") and before.index(b"moov") < before.index(b"mdat")
    assert numbers(behind, [7, 19]) == numbers(before, [7, 19]) == [7, 19]


def test_an_edit_list_leaves_frames_out(mp4):
    """Frames before the cut are decoded and not shown."""
    at = mp4.index(b"elst")
    version, count = struct.unpack(">II", mp4[at + 4 : at + 12])
    duration, begin = struct.unpack(">II", mp4[at + 12 : at + 20])
    times = read_times(mp4, "mp4")
    cut = mp4[: at + 16] + struct.pack(">I", begin + int(times.shown[8])) + mp4[at + 20 :]
    clip = open_clip(cut, "mp4")
    assert version == 0 and count == 1 and duration and clip.num_frames == COUNT - 8
    assert [number_of(frame.numpy()) for frame in clip.frames([0, 1, 11])] == [8, 9, 19]


def _cut_in_front(mp4: bytes) -> bytes:
    whole = video(FRAMES, header_first=True)
    return whole[: whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) // 2]


def _fewer_than_promised(mp4: bytes) -> bytes:
    """Cut off, and what is left is called all."""
    cut = _cut_in_front(mp4)
    at = cut.index(b"mdat") - 4
    return cut[:at] + struct.pack(">I", len(cut) - at) + cut[at + 4 :]


def _huge(mp4: bytes) -> bytes:
    """Frames whose own headers claim 20,000 x 20,000 pixels."""
    data = video(FRAMES[:2], container="matroska", codec="mjpeg", pixels="yuvj420p")
    return data.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", 20000, 20000))


def _scrambled(mp4: bytes) -> bytes:
    begin = mp4.index(b"mdat") + 4
    return mp4[: begin + 760] + bytes(200) + mp4[begin + 960 :]


DAMAGED = {
    "empty": (lambda mp4: b"", "an empty file"),
    "no video": (lambda mp4: bytes(1000), "no video .it begins neither"),
    "a list of other files": (lambda mp4: b"ffconcat version 1.0\nfile /etc/passwd\n", "no video"),
    "sound alone": (lambda mp4: sound_alone(), "no video in it .audio alone."),
    "no header": (lambda mp4: mp4[: len(mp4) // 2], "not a readable .mp4 video"),
    "cut behind the header": (_cut_in_front, r"cut off: \d+ bytes of \d+"),
    "fewer than promised": (_fewer_than_promised, r"promises 20 frames, of which \d+ lie behind its end"),
    "webm, cut": (lambda mp4: video(FRAMES, "webm", "libvpx-vp9")[:-100], "cut off: "),
    "avi, cut": (lambda mp4: video(FRAMES, "avi", "mpeg4")[:-100], "cut off: "),
    "huge": (_huge, "20000 x 20000|not a readable"),
    "zeros among the frames": (_scrambled, "."),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_said(mp4, damage, said):
    with pytest.raises(DecodeError, match=said):
        clip = open_clip(damage(mp4), "mp4")
        list(clip.frames(range(clip.num_frames)))


def test_a_size_that_a_file_claims_is_looked_at_before_anything_is_decoded(mp4, monkeypatch):
    """One pixel fewer than the frames have, so nothing but the limit can refuse them; and as many."""
    monkeypatch.setattr("swinv2_train.data.clips.video.MAX_PIXELS", 64 * 96 - 1)
    with pytest.raises(DecodeError, match="64 x 96|96 x 64"):
        read_times(mp4, "mp4")
    monkeypatch.setattr("swinv2_train.data.clips.video.MAX_PIXELS", 64 * 96)
    assert read_times(mp4, "mp4").keys.size


def test_a_file_that_asks_for_more_memory_than_there_is_is_damaged_and_a_machine_without_memory_is_not(
    mp4, monkeypatch
):
    """Else one of them ends a run, or a poor machine calls its videos damaged."""
    place = mp4.index(b"stts") + 8  # how many entries its table of durations has
    asking = mp4[:place] + (1 << 29).to_bytes(4, "big") + mp4[place + 4 :]
    with pytest.raises(DecodeError, match=r"damaged: it asks for more memory than a video of \d+ bytes takes"):
        open_clip(asking, "mp4")
    monkeypatch.setattr(video_files, "has_room", lambda: False)
    with pytest.raises(MachineError, match="no memory is left"):
        open_clip(asking, "mp4")


def test_damage_anywhere_is_no_fault_of_the_machine(mp4):
    """FFmpeg calls some of it an error of input, not permitted, or a lack of memory."""
    numbers = np.random.default_rng(0)
    damaged = 0
    for _ in range(800):
        content = bytearray(mp4)
        for place in numbers.integers(len(content), size=4):
            content[place] = numbers.integers(256)
        try:
            clip = open_clip(bytes(content), "mp4")
            list(clip.frames(range(0, clip.num_frames, 3)))
        except DecodeError:
            damaged += 1
    assert 200 < damaged < 800


def test_a_frame_that_the_index_speaks_of_and_is_not_there_is_named(mp4):
    times = read_times(mp4, "mp4")
    wrong = FrameTimes(np.append(times.shown, times.shown[-1] + 10), times.keys)
    with pytest.raises(DecodeError, match="frame 20 of 21 cannot be decoded"):
        list(open_clip(mp4, "mp4", wrong).frames([19, 20]))


def test_without_a_decoder_the_extra_is_named(mp4, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"PyAV.*pip install 'av>=15' .the extra 'video'.*.frames files"):
        open_clip(mp4, "mp4")
