"""Clips in shards and folders: one stream of the same clips from either, exact after a restart; damage is handled."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.schema import MixSourceConfig
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.clips.video import read_times
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.loading.loader import EvalLoader, TrainLoader
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.tar_index import TIME_FIELDS, load_index, load_times
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.mixture import open_mixture
from swinv2_train.data.sources.pipe import open_stream
from swinv2_train.data.sources.videos import check_videos
from swinv2_train.tasks.inputs import ImageTransform
from swinv2_train.training.build import _open_training
from tests.support.clips import frames_file, number_of, numbered, sound_alone, video
from tests.support.images import image_bytes
from tests.support.loaders import CONFIG
from tests.support.shard_files import write_plain_tar

TRANSFORM = ImageTransform(CONFIG, (16, 24), train=True, clips=ClipViews(3, 2))


@pytest.fixture(scope="module")
def clips() -> list[tuple[str, bytes, str, int]]:
    """12 clips of 12 to 17 frames, videos and .frames in turn, of 2 classes."""
    found = []
    for number in range(12):
        count = 12 + number % 6
        if number % 2:
            content, extension = frames_file(count, (32, 48)), "frames"
        else:
            content, extension = video([numbered(each) for each in range(count)], bf="2"), "mp4"
        found.append((f"c{number:02d}", content, extension, number % 2))
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory, clips):
    return write_shards(clips, str(tmp_path_factory.mktemp("clips") / "t"), samples_per_shard=5)


def loader(source, start: int = 0, workers: int = 0, **changes) -> TrainLoader:
    data = replace(CONFIG, num_workers=workers, **changes)
    return TrainLoader(source, data, TRANSFORM, 5, 6, 3, rank=0, world_size=1, start_images=start)


def seen(source, batches: int, **changes) -> list[tuple[str, bytes]]:
    stream = loader(source, **changes)
    rows = [
        (key, batch["images"][number].numpy().tobytes())
        for batch in islice(stream, batches)
        for number, key in enumerate(batch["keys"])
    ]
    stream.close()
    return rows


def test_a_stream_of_clips_is_a_function_of_the_position(shards):
    """Two epochs: restarted in the middle of the first, with workers and without, each clip is the same bytes."""
    whole = seen(shards, 8)
    assert len({*whole}) == 24 and len({key for key, _ in whole}) == 12
    assert seen(shards, 4, start=12) == whole[12:]
    assert seen(shards, 6, start=6, workers=2) == whole[6:]
    batch = next(iter(loader(shards)))
    assert batch["images"].shape == (3, 3, 3, 16, 24) and batch["images"].dtype == torch.uint8


def test_a_folder_gives_the_clips_that_its_shards_do(tmp_path, clips):
    """Time stamps are looked for there, and stand in a shard's index: the frames are the same."""
    for key, content, extension, label in clips:
        (tmp_path / "in" / str(label)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / str(label) / f"{key}.{extension}").write_bytes(content)
    folder = open_source(str(tmp_path / "in"))
    assert folder.clips == (12,) and folder.classes == ("0", "1")
    reader, evaluation = folder.open_reader(), ClipViews(3, 2)
    packed = TarReader(write_shards(clips, str(tmp_path / "out" / "t"), 12))
    where = {packed.key(0, index): index for index in range(12)}
    for index in range(12):
        sample = reader.read(0, index)
        other = packed.read(0, where[sample.key.partition("/")[2]])
        assert sample.image == other.image and sample.targets == other.targets and sample.times is None
        assert (other.times is None) == (other.extension == "frames")
        one, two = (_seen_of(each, evaluation) for each in (sample, other))
        assert one.equal(two)
        first = (12 + int(sample.key[-2:]) % 6 - evaluation.span) // 2
        assert [number_of(one[:, place].numpy()) for place in range(3)] == [first, first + 2, first + 4]


def _seen_of(sample, views: ClipViews) -> torch.Tensor:
    return views.evaluate(open_clip(sample.image, sample.extension, sample.times), (32, 48), CONFIG)


def test_the_index_holds_the_time_stamps_once(shards, clips):
    path = shards.index_paths[0]
    rows, times = load_index(path, shards.sizes[0]), load_times(path)
    assert shards.clips == (5, 5, 2) and times is not None
    for row, (_, content, extension, _) in zip(rows, clips, strict=False):
        at, frames, keys = (int(row[name]) for name in TIME_FIELDS)
        if extension == "frames":
            assert (at, frames, keys) == (0, 0, 0)
            continue
        found = read_times(content, extension)
        assert np.array_equal(times[at : at + frames], found.shown)
        assert np.array_equal(times[at + frames : at + frames + keys], found.keys)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_an_index_without_its_time_stamps_is_refused(tmp_path, clips, keep):
    source = write_shards(clips[:5], str(tmp_path / "t"), 5)
    path = tmp_path / "t-000000.tar.idx.npy"
    whole = path.read_bytes()
    begin = whole.index(b"\x93NUMPY", 1)
    path.write_bytes(whole[: begin + int(keep * (len(whole) - begin))])
    with pytest.raises(ShardError, match=r"its index cannot be opened: its time stamps are missing.*it is made again"):
        TarReader(source).read(0, 0)


def test_indices_of_images_are_as_they_were(tmp_path):
    """An index without clips has no field more, so those that exist stay good."""
    source = write_shards([("a", image_bytes(0), "png", 1)], str(tmp_path / "t"), 5)
    rows = load_index(source.index_paths[0], source.sizes[0])
    assert rows.dtype.names == ("offset", "size", "label", "extension", "key", "crc32")
    assert rows.dtype["extension"] == np.dtype("S4") and load_times(source.index_paths[0]) is None
    assert "clips" not in (tmp_path / "manifest.json").read_text() and source.clips == (0,)


def test_images_are_no_clips_and_clips_no_images(tmp_path, shards):
    """Said before the first step, with the key and the remedy."""
    images = write_shards([(f"i{n}", image_bytes(n), "png", 0) for n in range(4)], str(tmp_path / "t"), 4)
    with pytest.raises(ShardError, match=r"data.shards: 4 of 4 samples are images, and model.frames asks for clips"):
        loader(images)
    plain = ImageTransform(CONFIG, (16, 24), train=False)
    with pytest.raises(ShardError, match=r"data.eval_shards: 12 of 12 samples are clips.*set model.frames"):
        EvalLoader(shards, CONFIG, plain, 2, 0, 1)


def test_an_image_beside_a_clip_is_taken_unless_the_clip_is_named(tmp_path):
    members = [("a.jpg", image_bytes(0)), ("a.frames", frames_file(4)), ("a.cls", b"1")]
    path = str(write_plain_tar(tmp_path / "t.tar", members))
    assert open_manifest(path).clips == (0,)
    assert open_source(path, image_member="frames").clips == (1,)
    (tmp_path / "in").mkdir()
    for name, content in members[:2]:
        (tmp_path / "in" / name).write_bytes(content)
    assert open_source(str(tmp_path / "in")).clips == (0,)
    assert open_source(str(tmp_path / "in"), image_member="frames").clips == (1,)


def test_without_a_decoder_videos_are_refused_where_a_source_is_opened(tmp_path, shards, clips, monkeypatch):
    """Before anything is read: folders, lists, mixtures, indexed shards, and pipes whose member is named."""
    for extension, content in {each[2]: each[1] for each in clips}.items():
        (tmp_path / extension).mkdir()
        (tmp_path / extension / f"a.{extension}").write_bytes(content)
    (tmp_path / "list.txt").write_text("mp4/a.mp4 0\n")
    frames = open_source(str(tmp_path / "frames"))
    packed = write_shards([each for each in clips if each[2] == "frames"], str(tmp_path / "f" / "t"), 4)
    pipe = open_stream("pipe:cat x.tar")
    videos = [shards, open_source(str(tmp_path / "mp4")), open_source(str(tmp_path / "list.txt"))]
    mix = {name: MixSourceConfig(str(tmp_path / name), 0.5) for name in ("frames", "mp4")}
    videos.append(open_mixture(replace(CONFIG, mix=mix), None, lambda source, key: source))
    for source in (*videos, frames, packed, pipe):
        check_videos(source, "data.shards", "mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    for source in (frames, packed):
        check_videos(source, "data.shards")
    check_videos(pipe, "data.shards", "frames")
    for source in (*videos, pipe):
        with pytest.raises(ConfigError, match=r"data.eval_shards holds videos: .*PyAV.*pip install 'av>=15'"):
            check_videos(source, "data.eval_shards", "mp4")


def test_a_run_on_videos_without_a_decoder_ends_before_its_model_is_made(tmp_path, monkeypatch):
    config = compose_overrides(["run_dir=x", f"data.shards={tmp_path}", "model.frames=4", "model.window_frames=4"])
    piped = replace(config.data, shards="pipe:cat x.tar", image_member="mp4")
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="data.shards holds videos"):
        _open_training(config, None, print)
    with pytest.raises(ConfigError, match="data.shards holds videos"):
        _open_training(replace(config, data=piped), None, print)


DAMAGED = {"sound": sound_alone, "empty": lambda: b"", "zeros": lambda: bytes(5000)}


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_the_policy_for_damaged_samples_is_that_of_images(tmp_path, clips, make):
    """It is found when the clip is read; the index is made all the same."""
    source = write_shards([*clips[:5], ("bad", make(), "mp4", 0)], str(tmp_path / "t"), 6)
    with pytest.raises(SampleError, match="sample 'bad'.*data.on_bad_sample=replace"):
        seen(source, 2)
    bad = [batch for batch in islice(loader(source, on_bad_sample="replace"), 2) if batch["num_bad"]]
    (batch,) = bad
    assert [problem["key"] for problem in batch["problems"]] == ["bad"]
    assert batch["weight"].tolist().count(0.0) == 1 and batch["keys"][batch["weight"].tolist().index(0.0)] == "bad"


def test_an_evaluation_of_views_passes_every_clip_once(shards):
    transform = ImageTransform(CONFIG, (16, 16), train=False, clips=ClipViews(3, 2, views=2, crops=3))
    batches = list(EvalLoader(shards, CONFIG, transform, 5, 0, 1))
    assert [tuple(batch["images"].shape) for batch in batches] == [(5, 6, 3, 3, 16, 16)] * 3
    assert [key for batch in batches for key in batch["keys"] if key] == [f"c{n:02d}" for n in range(12)]
