"""Predict and embed for models of clips: folders, shards and lists of videos, in the views of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

import swinv2_train as s2
from swinv2_train import embed, predict
from swinv2_train.config.load import config_yaml
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.models import SwinTransformerV2
from swinv2_train.weights import save_weights
from tests.support.clips import frames_file, video
from tests.support.configs import composed
from tests.support.evaluation import evaluated
from tests.support.harness import RankFailed, run_distributed

pytestmark = pytest.mark.slow

CLASSES, COUNT, SIDE = 3, 7, 16
SIZES = {
    "img_size": SIDE, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2, "num_classes": CLASSES,
    "frames": 4, "patch_frames": 2, "window_frames": 2, "drop_path_rate": 0.0, "pretrained_window_sizes": (0, 0),
}  # fmt: skip
WORDS = (
    "task=classify", f"task.num_classes={CLASSES}", "task.mixup_alpha=0", "task.cutmix_alpha=0", "task.erasing_prob=0",
    "task.rand_augment=null", "model=demo", "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]",
    f"model.img_size={SIDE}", "model.window_size=2", "model.pretrained_window_sizes=[0,0]", "model.frames=4",
    "model.patch_frames=2", "model.window_frames=2", "data=labelled", "data.frame_stride=2", "data.eval_crop_pct=1",
    "data.num_workers=0", "train.micro_batch_size=2", "runtime.num_threads=1", "log.progress=none", "engine=local",
    "data.shards=gone.tar",
)  # fmt: skip
ASK = (
    "model=demo", "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", "model.window_size=2",
    "model.img_size=16", "model.frames=4", "model.window_frames=2", "data.frame_stride=2", "data.eval_crop_pct=1",
)  # fmt: skip
"""What weights of a model of clips do not say."""
VIEWS = ("task.eval_views=3", "task.eval_crops=2")


def film(number: int) -> bytes:
    """A video of noise, wider than high, shorter or longer than what the model sees of it."""
    rng = np.random.default_rng(number)
    frames = [rng.integers(0, 256, (SIDE, 24, 3), dtype=np.uint8) for _ in range(3 + 2 * number)]
    return video(frames)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, str]:
    """A run, weights, and the same clips in a folder by class (two more cannot be read), in shards and in a list."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("clips")
    torch.manual_seed(1)
    model = SwinTransformerV2(**SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_weights(model, folder / "weights.safetensors", "microsoft")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config_yaml(composed([*WORDS, f"run_dir={folder / 'run'}"])))
    rows = [(f"k{number}", film(number), "mp4", number % CLASSES) for number in range(COUNT)]
    write_shards(iter(rows), str(folder / "val"), 3)
    for key, data, ending, label in rows:
        path = folder / "films" / str(label) / f"{key}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    label = ["", " 2"]  # which lines may have
    lines = [f"films/{number % CLASSES}/k{number}.mp4{label[number % 2]}\n" for number in reversed(range(COUNT))]
    (folder / "films.txt").write_text("".join(lines))
    (folder / "films" / "1" / "torn.mp4").write_bytes(rows[0][1][:200])
    (folder / "films" / "2" / "torn.frames").write_bytes(frames_file(2)[:50])
    return {
        "run_dir": str(folder / "run"), "weights": str(folder / "weights.safetensors"),
        "images": str(folder / "films"), "shards": f"{folder}/val-*.tar", "list": str(folder / "films.txt"),
    }  # fmt: skip


def words(clips: dict[str, str], out: Path, images: str, *more: str) -> list[str]:
    return [
        f"run_dir={clips['run_dir']}",
        f"weights={clips['weights']}",
        f"images={clips[images]}",
        f"out={out}",
        *more,
    ]


def rows_of(clips: dict[str, str], out: Path, images: str, *more: str, ranks: int = 1) -> list[dict[str, Any]]:
    config, request = predict.parse(words(clips, out, images, *more))
    run_distributed(lambda world: predict.predict(config, request), ranks, init=False)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_what_is_counted_from_the_rows_is_what_evaluate_says_of_the_same_views(clips, tmp_path, capfd):
    rows = rows_of(clips, tmp_path / "a.jsonl", "shards", *VIEWS, ranks=2)
    given = (f"run_dir={clips['run_dir']}", f"weights={clips['weights']}", f"data.eval_shards={clips['shards']}")
    scores = evaluated(capfd, *given, *VIEWS)
    assert [row["image"] for row in rows] == [f"k{number}" for number in range(COUNT)]
    right = [row["classes"][0] == number % CLASSES for number, row in enumerate(rows)]
    assert (scores["images"], 100 * np.mean(right)) == (COUNT, pytest.approx(scores["val/top1"]))
    losses = [-np.log(row["probabilities"][row["classes"].index(n % CLASSES)]) for n, row in enumerate(rows)]
    assert np.mean(losses) == pytest.approx(scores["val/loss"], rel=1e-5)
    middle = rows_of(clips, tmp_path / "b.jsonl", "shards")
    differences = [one["probabilities"][0] - other["probabilities"][0] for one, other in zip(middle, rows, strict=True)]
    assert np.abs(differences).max() > 1e-3, "one view of the middle is not the mean of six"


def test_a_folder_and_a_list_of_videos_have_the_same_answers_in_their_own_order(clips, tmp_path):
    """Python's answer for a file is the same; what cannot be read is listed, and a batch may hold nothing else."""
    by_key = {row["image"]: row for row in rows_of(clips, tmp_path / "s.jsonl", "shards", *VIEWS)}
    files = rows_of(clips, tmp_path / "f.jsonl", "images", "train.micro_batch_size=1", *VIEWS)
    listed = rows_of(clips, tmp_path / "l.jsonl", "list", *VIEWS, ranks=3)
    names = sorted(str(path.relative_to(clips["images"])) for path in Path(clips["images"]).rglob("*.*"))
    assert [row["image"] for row in files] == names
    assert {row["image"] for row in files if "error" in row} == {"1/torn.mp4", "2/torn.frames"}
    assert [row["image"] for row in listed] == [f"{n % CLASSES}/k{n}.mp4" for n in reversed(range(COUNT))]
    for row in (*files, *listed):
        if "error" not in row:
            expected = by_key[Path(row["image"]).stem]
            assert row["classes"] == expected["classes"]
            assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
    answer = s2.load(clips["weights"], *ASK, *VIEWS, device="cpu").predict(Path(clips["images"]) / "2" / "k5.mp4")
    assert answer.probabilities == pytest.approx(by_key["k5"]["probabilities"], abs=1e-6)


def test_features_of_clips_have_their_keys_and_a_picture_of_middle_frames(clips, tmp_path):
    config, request = embed.parse(words(clips, tmp_path / "e", "images", "queries=2"))
    line = run_distributed(lambda world: embed.embed(config, request), 2, init=False)[0]
    found = np.load(tmp_path / "e" / "pooled.npy")
    keys = parquet.read_table(tmp_path / "e" / "keys.parquet").to_pylist()
    unreadable = np.array([bool(key["error"]) for key in keys])
    assert found.shape == (COUNT + 2, 16) and unreadable.sum() == line["unreadable"] == 2
    assert (np.isnan(found).all(axis=1) == unreadable).all() and np.isfinite(found[~unreadable]).all()
    assert Image.open(line["search"]).size[1] > 200, "two rows of pictures"
    files = [str(Path(clips["images"]) / key["image"]) for key in keys if not key["error"]]
    expected = s2.load(clips["weights"], *ASK, device="cpu").features(files)
    assert torch.allclose(torch.from_numpy(found[~unreadable]), expected, atol=1e-5)


def test_images_for_a_model_of_clips_and_clips_for_one_of_images_are_refused(clips, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    for images, more, message in (
        (str(tmp_path / "images"), (), "images: 1 of 1 samples are images, and model.frames asks for clips"),
        (clips["images"], ("model.frames=null", "model.patch_frames=1", "model.window_frames=1"), "set model.frames"),
    ):
        with pytest.raises(RankFailed, match=message):
            rows_of({**clips, "images": images}, tmp_path / "a.jsonl", "images", *more)
