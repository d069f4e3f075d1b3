"""Scenes with objects, tiles with trees, and the demo that trains on both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import compose_scenes, demo, demo_detect, fetch_trees
from scripts.compose_scenes import CLASSES, KINDS, VISIBLE, composed, drawn_objects
from scripts.fetch_trees import PHOTOGRAPHS, objects_in, tiles, windows
from scripts.package_files import FetchError
from swinv2_train import train
from swinv2_train.config import DetectConfig
from swinv2_train.config.command_line import compose_overrides, guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.data.mask_codes import decode_rle
from swinv2_train.data.shards.tar_reader import open_manifest
from tests.support.harness import run_distributed


def test_objects_are_what_is_seen_of_garments_and_no_pixel_is_of_two(fashion):
    """On a black photograph every pixel with light is of exactly one object or of one that is hardly seen."""
    red = [np.full((100, 120, 3), (200, 0, 0), np.uint8)]
    kind, hidden = KINDS["objects"], 0
    for number in range(40):
        image, placed = composed(number, "train", fashion, red, replace(kind, garments=(4, 4)))
        drawn = drawn_objects(placed)
        hidden += len(placed) - len(drawn.objects)
        assert drawn.size == image.shape[:2] == (64, 64)
        total = np.zeros((64, 64), int)
        for each in drawn.objects:
            mask = decode_rle(each.rle, (64, 64))
            total += mask
            rows, columns = np.nonzero(mask)
            assert each.box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert each.area == mask.sum() and each.category in {CLASSES[1], CLASSES[4], CLASSES[8], CLASSES[10]}
            assert np.median(image[mask][:, 0]) > 200  # garments are as bright as can be, the photograph is dim
        assert total.max() <= 1
        before, wanted = np.zeros((64, 64), bool), []
        for label, mask in reversed(placed):  # from the front: what is before a garment hides it
            area = int((mask & ~before).sum())
            wanted += [(CLASSES[label], area)] if area >= VISIBLE * mask.sum() else []
            before |= mask
        assert sorted((each.category, each.area) for each in drawn.objects) == sorted(wanted)
    assert hidden  # so that the rule was tried


def test_tiles_cover_an_image_and_a_tree_on_an_edge_is_an_object_in_one_of_them_alone():
    assert windows(1000, 400, True) == [(0, 400), (200, 600), (400, 800), (600, 1000)]
    assert windows(900, 400, True)[-1] == (500, 900) and windows(300, 400, True) == [(0, 300)]
    assert windows(1035, 400, False) == [(0, 345), (345, 690), (690, 1035)]
    boxes = np.array([[10, 10, 30, 30], [390, 100, 420, 130], [380, 300, 420, 340.0]])
    found = {tile: objects_in(tile, boxes) for tile in tiles((400, 800), 400, False)}
    left, right = found.values()
    assert left.size == right.size == (400, 400)
    assert [(each.box, each.crowd) for each in left.objects] == [
        ([10, 10, 30, 30], False), ([390, 100, 400, 130], True), ([380, 300, 400, 340], False)
    ]  # fmt: skip
    assert [(each.box, each.crowd) for each in right.objects] == [
        ([0, 100, 20, 130], False),
        ([0, 300, 20, 340], False),
    ]


def aerial(folder: Path) -> Path:
    """Two photographs of noise, with four trees each."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for stem in PHOTOGRAPHS.values():
        pixels = rng.integers(0, 256, (90, 130, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{stem}.png")
        corners = [(5, 5, 25, 25), (50, 40, 70, 60), (100, 60, 120, 80), (1, 60, 20, 85)]
        boxes = "".join(
            f"<object><name>Tree</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
            "</object>"
            for a, b, c, d in corners
        )
        size = "<size><width>130</width><height>90</height><depth>3</depth></size>"
        (folder / f"{stem}.xml").write_text(f"<annotation><filename>{stem}.png</filename>{size}{boxes}</annotation>")
    return folder


def test_photographs_of_other_light_look_alike_when_levelled():
    """The same scene through haze: darker, flatter, bluer."""
    plain = np.random.default_rng(0).integers(60, 190, (40, 50, 3)).astype(np.uint8)
    hazy = (plain * np.array([0.7, 0.6, 0.5]) + np.array([10, 30, 90])).astype(np.uint8)
    first, second = fetch_trees.levelled(plain), fetch_trees.levelled(hazy)
    assert np.abs(first.astype(int) - second).max() <= 2 and np.abs(plain.astype(int) - hazy).max() > 50
    assert np.abs(first.mean(axis=(0, 1)) - fetch_trees.MEAN).max() < 1
    assert np.abs(first.std(axis=(0, 1)) - fetch_trees.SPREAD).max() < 2


def test_somebody_elses_aerial_photographs_are_refused(tmp_path):
    with pytest.raises(FetchError, match=r"has no 2019_YELL_2_528000"):
        fetch_trees.find_photographs(tmp_path, tmp_path)
    with pytest.raises(FetchError, match="sha256 .*, wanted"):
        fetch_trees.find_photographs(tmp_path, aerial(tmp_path / "aerial"))


def test_tiles_are_packed_once_with_their_trees(tmp_path, monkeypatch, capsys):
    folder = aerial(tmp_path / "aerial")
    monkeypatch.setattr(fetch_trees, "find_photographs", lambda raw, given: folder)
    monkeypatch.setattr(fetch_trees, "TILE_PX", 60)
    fetch_trees.main(tmp_path / "trees")
    train_split, test_split = (open_manifest(str(tmp_path / f"trees/{split}-*.tar")) for split in ("train", "test"))
    assert (train_split.num_samples, test_split.num_samples) == (8, 6)  # (2 x 4) halves over; (2 x 3) side by side
    assert "is complete" not in capsys.readouterr().out
    fetch_trees.main(tmp_path / "trees")
    assert "is complete" in capsys.readouterr().out


def test_both_ways_of_detecting_differ_in_the_initial_weights_alone(tmp_path):
    overrides = ["train.epochs=3", "task.mask_ratio=0.5", "task.detections=7"]
    phases = demo_detect.phases_of(tmp_path, Path("data"), 1, overrides)
    configs = {each.run_dir.name: compose_overrides(each.command) for each in phases}
    assert configs.pop("trees").task.init_from == str(tmp_path / "from-scratch-0")
    assert configs.pop("pretrain").train.epochs == 3
    scratch, simmim = configs["from-scratch-0"], configs["from-simmim-weights-0"]
    assert isinstance(scratch.task, DetectConfig) and scratch.task.init_from is None and scratch.seed == 0
    assert simmim.task.init_from == str(tmp_path / "pretrain") and scratch.task.detections == 7
    simmim.task.init_from, simmim.run_dir = scratch.task.init_from, scratch.run_dir
    assert simmim == scratch


SHORT = (
    "model.embed_dim=8", "model.depths=[1,1,1,1]", "task.head_channels=8", "task.head_width=8", "train.epochs=null",
    "train.max_steps=1", "train.global_batch_size=2", "train.micro_batch_size=2", "optim.schedule.warmup_steps=1",
    "optim.schedule.warmup_epochs=null", "engine=local", "runtime.num_threads=1", "log.wandb=disabled",
    "log.progress=none", "task.proposals=20", "task.eval_proposals=20", "task.detections=5", "task.score_threshold=0",
)  # fmt: skip


@pytest.mark.slow
def test_a_shortened_demo_ends_with_both_tables_and_when_called_again_trains_nothing(
    fashion, tmp_path, monkeypatch, capsys
):
    """The script, the packers, the training and the tables are the real ones; garments are squares, trees noise."""
    few = replace(KINDS["objects"], sizes={"train": 4, "test": 2}, samples_per_shard=2)
    monkeypatch.setitem(compose_scenes.KINDS, "objects", few)
    colours = np.random.default_rng(0).integers(0, 256, (2, 100, 120, 3), dtype=np.uint8)
    folder = aerial(tmp_path / "aerial")
    monkeypatch.setattr(compose_scenes, "find_fashion", lambda raw, given: fashion)
    monkeypatch.setattr(compose_scenes, "find_photographs", lambda raw, given: {"train": colours, "test": colours})
    monkeypatch.setattr(fetch_trees, "find_photographs", lambda raw, given: folder)
    monkeypatch.setattr(fetch_trees, "TILE_PX", 60)

    def torchrun(command: list[str]) -> int:
        config = compose_overrides(command[command.index("swinv2_train.train") + 1 :])
        return run_distributed(lambda _: guarded(lambda: train.train(config)), 1, init=False)[0]

    monkeypatch.setattr(demo, "torchrun", torchrun)

    def rows() -> list[str]:
        assert demo_detect.main(where) == EXIT_DONE
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]

    where = ["--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "data"), "--seeds", "1", *SHORT]
    tables = rows()
    assert [line.split(" | ")[0] for line in tables if line.startswith("| from")] == [
        "| from scratch", "| from SimMIM weights", "| from the garments' detector"
    ]  # fmt: skip
    steps = {path.parent.name: len(path.read_text().splitlines()) for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert set(steps) == {"pretrain", "from-scratch-0", "from-simmim-weights-0", "trees"}
    assert rows() == tables
    again = {path.parent.name: len(path.read_text().splitlines()) for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert again == steps
