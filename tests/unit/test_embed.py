"""The embed command: arrays with a row for each image, the same on any number of ranks and after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from swinv2_train import embed
from swinv2_train.config import ConfigError
from swinv2_train.config.load import config_yaml
from swinv2_train.inference.journal import Journal
from swinv2_train.inference.neighbours import nearest
from tests.support.configs import composed
from tests.support.evaluation import CLASSIFY, MEAN, MODEL, STD, make_images, make_model, save_model
from tests.support.harness import RankFailed, run_distributed

COUNT = 13
IMAGES = make_images(COUNT, seed=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, ...]:
    """A run, weights and images, of which the last but one is broken."""
    folder = tmp_path_factory.mktemp("embed")
    (folder / "images").mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
    (folder / "images" / "11.png").write_bytes(b"no image")
    words = (*CLASSIFY, *MODEL, "data.num_workers=0", f"run_dir={folder / 'run'}", "data.shards=gone.tar")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config_yaml(composed(words)))
    weights = save_model(folder / "weights.safetensors")
    return (f"run_dir={folder / 'run'}", f"weights={weights}", f"images={folder / 'images'}")


def embedded(*words: str, ranks: int = 1, **more: Any) -> dict[str, Any] | None:
    config, request = embed.parse(list(words))
    return run_distributed(lambda world: embed.embed(config, request), ranks, init=False, **more)[0]


@torch.no_grad()
def maps_of(images: np.ndarray) -> list[list[torch.Tensor]]:
    """Each image's stage maps, one at a time."""
    model = make_model()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return [model.forward_features(((image - MEAN) / STD)[None]) for image in pixels]


@pytest.mark.slow
def test_pooled_features_their_keys_and_a_picture_of_neighbours(files, tmp_path):
    line = embedded(*files, f"out={tmp_path / 'a'}", "queries=3", ranks=2)
    found = np.load(tmp_path / "a" / "pooled.npy")
    expected = torch.cat([maps[-1].mean(dim=(2, 3)) for maps in maps_of(IMAGES)]).numpy()
    readable = np.arange(COUNT) != 11
    assert found.dtype == np.float32 and found.shape == (COUNT, 16) and np.isnan(found[11]).all()
    np.testing.assert_allclose(found[readable], expected[readable], rtol=1e-4, atol=1e-5)
    keys = parquet.read_table(tmp_path / "a" / "keys.parquet").to_pylist()
    assert [row["image"] for row in keys] == [f"{number:02d}.png" for number in range(COUNT)]
    assert [row["error"] is None for row in keys] == readable.tolist() and line["unreadable"] == 1
    picture = Image.open(tmp_path / "a" / "search.png")
    assert picture.size[0] == 9 * 116 and picture.size[1] == 3 * 130
    assert np.array_equal(np.asarray(picture)[14:126:7, 0:112:7], IMAGES[0])  # the first query, 7 times as large
    assert json.loads((tmp_path / "a" / "embedding.json").read_text())["arrays"] == {"pooled.npy": [COUNT, 16]}
    assert not (tmp_path / "a" / "unfinished").exists()
    with pytest.raises(RankFailed, match="holds features already"):
        embedded(*files, f"out={tmp_path / 'a'}")


def test_stages_and_tiles_in_half_precision(files, tmp_path):
    embedded(*files, f"out={tmp_path / 's'}", "features=stages", "dtype=fp16")
    for stage in (0, 1):
        found = np.load(tmp_path / "s" / f"stage{stage + 1}.npy")
        expected = [maps[stage].mean(dim=(2, 3))[0].numpy() for maps in maps_of(IMAGES[:3])]
        assert found.dtype == np.float16
        np.testing.assert_allclose(found[:3], expected, rtol=2e-3, atol=2e-3)
    embedded(*files, f"out={tmp_path / 't'}", "features=tiles", "tiles=[1,2]", "data.interpolation=bilinear")
    found = np.load(tmp_path / "t" / "tiles.npy")
    assert found.shape == (COUNT, 2, 16)
    for tile, columns in enumerate((slice(0, 8), slice(8, 16))):
        half = torch.from_numpy(IMAGES[:2, :, columns]).permute(0, 3, 1, 2).float()
        seen = torch.nn.functional.interpolate(half, (16, 16), mode="bilinear", antialias=True).round().byte()
        expected = [maps[-1].mean(dim=(2, 3))[0] for maps in maps_of(seen.permute(0, 2, 3, 1).numpy())]
        np.testing.assert_allclose(found[:2, tile], torch.stack(expected).numpy(), rtol=0.05, atol=0.05)  # grey levels


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(files, tmp_path, monkeypatch):
    words = (*files, f"out={tmp_path / 'a'}", "train.micro_batch_size=2")
    add, left = Journal.add, 3

    def dying(self: Journal, first: int, rows: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, first, rows)

    monkeypatch.setattr(Journal, "add", dying)
    assert embedded(*words, may_die=True) is None
    monkeypatch.setattr(Journal, "add", add)
    journal = Journal(tmp_path / "a" / "unfinished")
    assert sum(piece.images for piece in journal.pieces()) == 6
    embedded(*words, ranks=2)
    embedded(*files, f"out={tmp_path / 'b'}", "train.micro_batch_size=2")
    one, other = (np.load(tmp_path / name / "pooled.npy") for name in "ab")
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert np.isnan(one).all(axis=1).tolist() == [number == 11 for number in range(COUNT)]


def test_arrays_that_are_gone_are_not_made_up(files, tmp_path, monkeypatch):
    """Or rows that were done would be zeros."""
    add = Journal.add

    def once(self: Journal, first: int, rows: Any) -> None:
        add(self, first, rows)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Journal, "add", once)
    assert embedded(*files, f"out={tmp_path / 'a'}", may_die=True) is None
    monkeypatch.setattr(Journal, "add", add)
    Path(tmp_path / "a" / "pooled.npy").unlink()
    with pytest.raises(RankFailed, match="pooled.npy is gone"):
        embedded(*files, f"out={tmp_path / 'a'}")


def test_neighbours_are_those_of_plain_loops():
    features = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    features[7] = np.nan
    found = nearest(features, np.array([3, 20]), 6)
    for row, query in enumerate((3, 20)):
        cosines = {}
        for number in range(40):
            if number not in (query, 7):
                a, b = features[query].astype(float), features[number].astype(float)
                cosines[number] = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        expected = sorted(cosines, key=lambda number: -cosines[number])[:6]
        assert found.places[row].tolist() == expected
        assert found.similarities[row] == pytest.approx([cosines[number] for number in expected], abs=1e-6)
    assert nearest(features[:3], np.array([0]), 9).places.shape == (1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("features=mean",), r"features \(mean\) must be one of"),
        (("features=tiles",), "tiles=.* belongs to features=tiles"),
        (("tiles=[1,2]",), "tiles=.* belongs to features=tiles"),
        (("features=tiles", "tiles=[0,2]"), r"tiles \(\[0,2\]\) must be two whole numbers"),
        (("dtype=int8",), r"dtype \(int8\) must be one of"),
        (("queries=x",), r"queries \(x\) must be a whole number"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_read(words, message, files, tmp_path):
    with pytest.raises(ConfigError, match=message):
        embed.parse([*files, f"out={tmp_path / 'a'}", *words])
