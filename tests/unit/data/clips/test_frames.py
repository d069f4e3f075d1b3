"""KEY.frames: what was packed comes back, and what is not whole is said."""

from __future__ import annotations

import struct

import pytest

from swinv2_train.data.clips.frames_file import SIGNATURE, FramesFile, pack_frames
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.transforms.decode import DecodeError, decode_image
from tests.support.clips import frames_file, jpeg, number_of, numbered


def test_frames_come_back_as_they_were_packed():
    files = [jpeg(numbered(number)) for number in range(5)]
    packed = FramesFile(pack_frames(files))
    assert [packed.frame(number) for number in range(packed.num_frames)] == files
    clip = open_clip(pack_frames(files), "frames")
    assert clip.num_frames == 5
    for position, frame in zip([1, 4], clip.frames([1, 4]), strict=True):
        assert frame.equal(decode_image(files[position], "jpg")) and number_of(frame.numpy()) == position


def test_the_file_is_as_it_is_described():
    """docs/data.md says it to those who write such files themselves."""
    first, second = jpeg(numbered(0)), jpeg(numbered(1))
    head = b"\x89JPEGs1\n" + struct.pack("<III", 2, len(first), len(second))
    assert pack_frames([first, second]) == head + first + second


@pytest.mark.parametrize(
    ("frames", "said"), [([], "at least one frame"), ([jpeg(numbered(0)), b"\x89PNG"], "frame 1 is no JPEG file")]
)
def test_what_is_no_clip_is_not_packed(frames, said):
    with pytest.raises(ValueError, match=said):
        pack_frames(frames)


GOOD = frames_file(3)
SMALLER = pack_frames([jpeg(numbered(0)), jpeg(numbered(1, (32, 40)))])
DAMAGED = {
    "another file": (jpeg(numbered(0)), "does not begin as such a file"),
    "nothing": (b"", "does not begin"),
    "signature alone": (SIGNATURE, "cut off in its index"),
    "no frame": (SIGNATURE + bytes(4), "no frame in it"),
    "too many": (SIGNATURE + struct.pack("<I", 2**32 - 1) + bytes(100), "promises 4294967295 frames"),
    "cut": (GOOD[:-10], "bytes, its index says"),
    "more behind": (GOOD + b"x", "bytes, its index says"),
    "a damaged frame": (pack_frames([jpeg(numbered(0)), jpeg(numbered(1))[:-40]]), "frame 1: not a readable .jpg"),
    "two sizes": (SMALLER, r"frame 1 has 32 x 40 pixels \(height x width\), the ones before it 32 x 48"),
}


@pytest.mark.parametrize(("data", "said"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_said(data, said):
    with pytest.raises(DecodeError, match=said):
        list(open_clip(data, "frames").frames([0, 1]))


def test_an_image_is_no_clip():
    with pytest.raises(DecodeError, match=r"a .jpg file is one image, and model.frames asks for clips"):
        open_clip(jpeg(numbered(0)), "jpg")
