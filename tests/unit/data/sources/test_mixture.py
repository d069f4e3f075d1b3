"""Several sources as one: shards counted on, keys with the source's name, classes that meet by name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.pipe_loader import build_train_loader
from swinv2_train.data.sample import SampleError
from swinv2_train.data.sources.mixture import Mixture
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.tasks.inputs import ImageTransform
from swinv2_train.training.build import _open_training
from tests.support.configs import composed
from tests.support.images import image_bytes, npy, tiff
from tests.support.shard_files import write_plain_tar


def folder(root: Path, *classes: str) -> Path:
    """Two images of each class, or three without any class."""
    for number, name in enumerate(classes or ("",)):
        (root / name).mkdir(parents=True)
        for each in range(2 if classes else 3):
            (root / name / f"{each}.png").write_bytes(image_bytes(10 * number + each, size=(16, 16)))
    return root


def opened(task: str, *overrides: str, names: tuple[str, ...] | None = None) -> Mixture:
    config = composed([f"task={task}", "data=folder", "run_dir=r", *overrides])
    source = _open_training(config, names, lambda line: None)
    assert isinstance(source, Mixture)
    return source


@pytest.fixture
def mix(tmp_path) -> tuple[str, ...]:
    one, two = folder(tmp_path / "one", "cat", "dog"), folder(tmp_path / "two", "ant", "dog", "cat")
    return f"+data.mix.b.shards={one}", f"+data.mix.a.shards={two}"


def test_shards_are_counted_on_and_keys_name_the_source(mix):
    source = pickle.loads(pickle.dumps(opened("simmim", *mix)))
    assert (source.names, source.weights, source.counts, source.num_samples) == (("a", "b"), (1, 1), (6, 4), 10)
    reader = source.open_reader()
    keys = [reader.key(shard, index) for shard, count in enumerate(source.counts) for index in range(count)]
    assert sorted(keys) == sorted(
        [f"a/{name}/{n}" for name in ("ant", "dog", "cat") for n in (0, 1)]
        + [f"b/{name}/{n}" for name in ("cat", "dog") for n in (0, 1)]
    )
    assert reader.read(1, 0).image.startswith(b"\x89PNG")


def test_labels_meet_by_name_in_the_classes_of_all_sources(mix):
    source = opened("classify", *mix, "task.num_classes=3")
    assert source.classes == ("ant", "cat", "dog") and source.used_labels == {0, 1, 2}
    reader = source.open_reader()
    for shard, count in enumerate(source.counts):
        for index in range(count):
            name = reader.key(shard, index).split("/")[1]
            assert reader.read(shard, index).targets["label"] == source.classes.index(name)
    resumed = opened("classify", *mix, "task.num_classes=3", names=("dog", "cat", "ant"))
    assert resumed.classes == ("dog", "cat", "ant")


def test_what_is_no_mixture_is_refused(mix, tmp_path):
    bare = folder(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"data.mix: c names no classes, but other sources do, .* classes.txt"):
        opened("classify", *mix, f"+data.mix.c.shards={bare}", "task.num_classes=3")
    with pytest.raises(ConfigError, match=r"task.num_classes \(2\) is too small: data.mix.a.shards has labels"):
        opened("classify", *mix, "task.num_classes=2")
    with pytest.raises(ConfigError, match=r"data.mix.a.shards .* classes that are none of"):
        opened("classify", *mix, "task.num_classes=2", names=("cat", "dog"))
    with pytest.raises(ConfigError, match="data.mix.d.shards"):
        opened("simmim", *mix, f"+data.mix.d.shards={tmp_path}/nothing-*.tar")


def test_sources_of_other_kinds_of_files_meet_in_their_bands_and_other_bands_are_damage(tmp_path):
    """By name, each source's own list says where a band lies; a source without it is named with its file."""
    pixels = {
        number: np.random.default_rng(number).integers(1, 60000, (8, 8, 3)).astype(np.uint16) for number in range(4)
    }
    (tmp_path / "tifs").mkdir()
    (tmp_path / "tifs" / "bands.json").write_text('["B02", "B03", "B04"]')
    for number in (0, 1):
        (tmp_path / "tifs" / f"{number}.tif").write_bytes(tiff(pixels[number]))
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "bands.json").write_text('["B04", "B8A", "B02", "B03"]')
    stored = {number: np.dstack([pixels[number], pixels[number][..., :1]])[..., [2, 3, 0, 1]] for number in (2, 3)}
    rows = [(f"{number}.npy", npy(array)) for number, array in stored.items()]
    write_plain_tar(tmp_path / "tar" / "t.tar", rows)
    values = (
        "model=demo", "model.img_size=8", "model.window_size=2", "task.mask_unit_px=8", "data.bands=[B03,B04]",
        "model.in_chans=2", "data.mean=[0,0]", "data.std=[1,1]", "data.crop_scale=[1,1]", "data.crop_ratio=[1,1]",
        "data.hflip=0", "data.num_workers=0", f"+data.mix.a.shards={tmp_path}/tifs",
        f"+data.mix.b.shards={tmp_path}/tar/t.tar",
    )  # fmt: skip
    config = composed(["task=simmim", "data=folder", "run_dir=r", *values])
    transform = ImageTransform(config.data, (8, 8), True, bands=Bands.of(config))
    steps = {"seed": 0, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1, "start_images": 0}

    def batch() -> dict[str, Any]:
        source = _open_training(config, None, lambda line: None)
        return next(iter(build_train_loader(source, config.data, transform, **steps)))

    found = batch()
    assert sorted(found["keys"]) == ["a/0", "a/1", "b/2", "b/3"]
    for key, image in zip(found["keys"], found["images"], strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels[int(key[2:])][..., 1:].astype(np.float32))
    (tmp_path / "tifs" / "bands.json").unlink()
    with pytest.raises(SampleError, match=r"tifs.*: sample '[01]': data.bands chooses 'B03' by its name, but neither"):
        batch()
    (tmp_path / "tifs" / "bands.json").write_text('["B03", "B04", "B8A", "B11"]')
    (tmp_path / "tifs" / "0.tif").write_bytes(tiff(pixels[0][..., 0]))
    (tmp_path / "tifs" / "1.tif").write_bytes(tiff(pixels[1][..., 0]))
    with pytest.raises(SampleError, match=r"tifs.*: sample '[01]': 1 bands of 8 x 8 pixels, but data.bands has 1"):
        batch()
