"""Several sources as one: shards counted on, keys with the source's name, classes that meet by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.sources.mixture import Mixture
from swinv2_train.training.build import _open_training
from tests.support.configs import composed
from tests.support.images import image_bytes


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
