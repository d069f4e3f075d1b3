"""swinv2-make-shards of clips: folders and lists, copied or encoded anew with short ways between key frames."""

from __future__ import annotations

import builtins
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from swinv2_train import make_shards
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.clips.video import VideoClip
from swinv2_train.data.sample import LABEL
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from tests.support.clips import frames_file, number_of, numbered, sound_alone, video
from tests.support.images import image_bytes

COUNT = 20
TIMES = [0, 4, 8, 12, 16, 30, 31, 35, 39, 43, 47, 51, 90, 94, 98, 102, 106, 110, 114, 118]
MIN_PSNR_DB = 36  # measured worst 40.5 as H.264 and 44.0 as JPEG; the frame after it gives 28


def moving(number: int) -> np.ndarray:
    """uint8 (40, 60, 3): numbered(), with colours that move."""
    rows, columns = np.mgrid[:40, :60]
    waves = [12 * np.sin((columns + turn * rows + number) / 9) for turn in (0, 1, -1)]
    shifted: np.ndarray = (numbered(number, (40, 60)) + np.stack(waves, 2)).clip(0, 255).astype(np.uint8)
    return shifted


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Three whole clips of two classes: one of variable frame rate with sound, one to be turned, one of JPEG files."""
    frames = [moving(number) for number in range(COUNT)]
    return {
        "jump/a.mp4": video(frames, times=TIMES, bf="2", g="20", audio=True),
        "jump/b.mkv": video(frames, container="matroska", g="20"),
        "walk/c.mp4": video(frames, rotation=90, g="20"),
        "walk/d.avi": video(frames, container="avi", codec="mpeg4", qmax="2"),
        "walk/e.frames": frames_file(7, (40, 60)),
    }


LABELS = {"jump/a": 0, "jump/b": 0, "walk/c": 1, "walk/d": 1, "walk/e": 1}


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def pack(*arguments: object) -> int:
    return make_shards.run([str(each) for each in arguments])


def packed(out: Path) -> dict[str, tuple[Clip, int | None, str]]:
    """Clips, as the index has their times, labels and endings, by their keys."""
    source = open_manifest(str(out.parent / f"{out.name}-*.tar"))
    reader = TarReader(source)
    samples = [reader.read(shard, row) for shard, count in enumerate(source.counts) for row in range(count)]
    return {
        each.key: (open_clip(each.image, each.extension, each.times), each.targets.get(LABEL), each.extension)
        for each in samples
    }


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """In dB; uint8 arrays."""
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


def all_frames(clip: Clip) -> np.ndarray:
    return np.stack([frame.numpy() for frame in clip.frames(range(clip.num_frames))])


def seconds(clip: VideoClip) -> list[Fraction]:
    times, unit = clip.clock()
    assert unit is not None
    return [time * unit for time in times]


def test_clips_are_encoded_with_key_frames_close_to_each_other(tmp_path, files, capsys):
    """The same frames at the same times, upright, without sound."""
    source, out = folder(tmp_path / "in", files), tmp_path / "out" / "t"
    assert pack(source, out, "--clips", "mp4", "--clips-gop", "4", "--samples-per-shard", "3") == 0
    said = capsys.readouterr().out
    assert re.search(r"87 frames of 5 clips encoded, \d+ frames/s; on one core \d+ frames/s are decoded of SO", said)
    assert "5 clips in 2 shards" in said and "5 of 5 clips packed" in said
    found = packed(out)
    assert {key: label for key, (_, label, _) in found.items()} == LABELS
    assert (tmp_path / "out" / "classes.txt").read_text() == "jump\nwalk\n"
    for name, data in files.items():
        key, _, extension = name.partition(".")
        before, (after, _, ending) = open_clip(data, extension), found[key]
        assert ending == "mp4" and isinstance(after, VideoClip) and after.num_frames == before.num_frames
        assert np.diff([*np.searchsorted(after.times.shown, after.times.keys), after.num_frames]).max() <= 4
        assert set(after.times.keys) <= set(after.times.shown) and after.times.keys[0] == after.times.shown[0]
        one, other = all_frames(before), all_frames(after)
        assert one.shape == other.shape and one.shape[2:] == ((60, 40) if key == "walk/c" else (40, 60))
        assert min(map(psnr, one, other)) > MIN_PSNR_DB
        expected = seconds(before) if isinstance(before, VideoClip) else [Fraction(n, 25) for n in range(7)]
        assert seconds(after) == expected
    with av.open(str(_written(tmp_path, found["jump/a"][0]))) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams.video[0].codec_context.name == "h264"


def _written(path: Path, clip: Clip) -> Path:
    assert isinstance(clip, VideoClip)
    (path / "clip.mp4").write_bytes(clip.data)
    return path / "clip.mp4"


@pytest.mark.parametrize(("form", "size"), [("mp4", (16, 24)), ("frames", (16, 25))])
def test_larger_clips_are_made_smaller_and_no_clip_larger(tmp_path, form, size):
    """To even sizes as a video; odd ones come, too."""
    source = folder(tmp_path / "in", {
        "large.mp4": video([numbered(number, (33, 51)) for number in range(6)], pixels="yuv444p"),
        "small.mp4": video([numbered(number, (11, 17)) for number in range(6)], pixels="yuv444p"),
    })  # fmt: skip
    assert pack(source, tmp_path / "t", "--clips", form, "--clips-short-side", "16") == 0
    found = packed(tmp_path / "t")
    large, small = (all_frames(found[key][0]) for key in ("large", "small"))
    assert large.shape[2:] == size and small.shape[2:] == ((10, 16) if form == "mp4" else (11, 17))
    for frames in (large, small):
        assert [number_of(frame) for frame in frames] == [*range(6)]
    assert {label for _, label, _ in found.values()} == {None}


def test_files_of_jpeg_frames_are_read_back_without_a_decoder_of_videos(tmp_path, files, monkeypatch):
    source = folder(tmp_path / "in", files)
    assert pack(source, tmp_path / "t", "--clips", "frames") == 0
    names = {name.partition(".")[0]: name for name in files}
    before = {key: all_frames(open_clip(files[name], name.partition(".")[2])) for key, name in names.items()}
    _without_av(monkeypatch)
    found = packed(tmp_path / "t")
    assert {key: label for key, (_, label, _) in found.items()} == LABELS
    for key, (clip, _, ending) in found.items():
        assert ending == "frames" and min(map(psnr, before[key], all_frames(clip))) > MIN_PSNR_DB


def test_a_list_gives_the_labels_and_what_is_not_there_is_said(tmp_path, files, capsys):
    """Kinetics' lists name clips that are gone; their labels are numbers."""
    folder(tmp_path / "in", files)
    (tmp_path / "train.txt").write_text("in/jump/a.mp4 7\nin/walk/c.mp4 3\nin/walk/gone.mp4 3\n")
    assert pack(tmp_path / "train.txt", tmp_path / "out" / "t") == 0
    said = capsys.readouterr().out
    assert "1 of its 3 files are not there and are left out" in said and "walk/gone.mp4" in said
    assert "2 clips in 1 shards" in said and "labels up to 7" in said
    found = packed(tmp_path / "out" / "t")
    assert {key: label for key, (_, label, _) in found.items()} == {"jump/a": 7, "walk/c": 3}
    clip = found["jump/a"][0]
    assert isinstance(clip, VideoClip) and clip.data == files["jump/a.mp4"], "copied byte for byte"
    (tmp_path / "out" / "classes.txt").write_text("x\ny\n")
    assert pack(tmp_path / "train.txt", tmp_path / "out" / "u") == 2
    assert "lists 2 classes, and SOURCE a label 7" in capsys.readouterr().err
    (tmp_path / "out" / "classes.txt").write_text("".join(f"{name}\n" for name in "abcdefgh"))
    assert pack(tmp_path / "train.txt", tmp_path / "out" / "u", "--clips", "frames") == 0
    assert "its 8 names are taken for those of SOURCE's labels, 0 = a" in capsys.readouterr().out


def test_damaged_clips_are_left_out_and_counted_or_refused(tmp_path, files, capsys):
    whole = files["jump/b.mkv"]
    source = folder(tmp_path / "in", {
        "a.mp4": files["jump/a.mp4"], "cut.mkv": whole[: len(whole) // 2], "sound.mp4": sound_alone(),
    })  # fmt: skip
    assert pack(source, tmp_path / "t", "--clips", "mp4") == 0
    said = capsys.readouterr().out
    assert "warning: 2 damaged clips are left out (" in said and "cut.mkv" in said and "sound.mp4" in said
    assert "20 frames of 1 clips encoded" in said and [*packed(tmp_path / "t")] == ["a"]
    assert pack(source, tmp_path / "u", "--clips", "mp4", "--on-bad-clip", "error") == 2
    assert re.search(r"(cut\.mkv|sound\.mp4) is damaged: .*; mend or delete it", capsys.readouterr().err)
    (source / "a.mp4").unlink()
    assert pack(source, tmp_path / "u", "--clips", "frames") == 2
    assert "all 2 clips are damaged" in capsys.readouterr().err and not [*tmp_path.glob("u*")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--clips-gop", "8"], "--clips-gop are of clips that are encoded anew; add --clips mp4"),
        (["--clips-short-side", "128", "--on-bad-clip", "error"], "--clips-short-side and --on-bad-clip are of clips"),
        (["--clips", "frames", "--clips-gop", "8"], "--clips-gop is of --clips mp4"),
        (["--clips", "mp4", "--clips-short-side", "129"], r"--clips-short-side \(129\) must be an even number"),
        (["--clips", "frames", "--clips-short-side", "8"], r"\(8\) must be an even number of pixels, 16 or more"),
        (["--clips", "mp4", "--clips-gop", "0"], r"--clips-gop \(0\) must be at least 1"),
        (["--clips", "mp4", "--labels", "masks"], "goes with none of --labels"),
        (["--clips", "mp4", "--verify"], "goes with none of --labels, --annotations, --reindex and --verify"),
        (["--clips", "mp4"], r"--clips \(mp4\) encodes clips, and SOURCE holds images \(a\.jpg\)"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, capsys, options, said):
    source = folder(tmp_path / "in", {"a.jpg": image_bytes(0, "jpg", (6, 6))})
    assert pack(source, tmp_path / "out" / "t", *options) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_without_a_decoder_of_videos_the_extra_is_named(tmp_path, files, capsys, monkeypatch):
    source = folder(tmp_path / "in", files)
    _without_av(monkeypatch)
    for form in ("mp4", "frames"):
        assert pack(source, tmp_path / "out" / "t", "--clips", form) == 2
        assert "the extra 'video' of this package" in capsys.readouterr().err and not (tmp_path / "out").exists()


def _without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object, **others: object) -> object:
        if name.partition(".")[0] == "av":
            raise ImportError("no av here")
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without)
