"""A folder of images keeps the promises of packed shards, and is read as make_shards.py would pack it."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinv2_train import make_shards
from swinv2_train.config import ConfigError
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.data.sources import folder as folder_module
from swinv2_train.data.sources import virtual_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.folder import open_folder
from swinv2_train.tasks import task_class
from swinv2_train.training.build import open_sources
from tests.support.configs import composed
from tests.support.images import image_bytes
from tests.support.loaders import CONFIG, Transform, rows, train_loader
from tests.support.one_rank import ONE


def write(folder: Path, names: list[str]) -> Path:
    """A small image of noise for each name, another one for each."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = name.rpartition(".")[2].lower()
        (folder / name).write_bytes(image_bytes(number, "jpg" if kind == "jpeg" else kind))
    return folder


def classes_of(count: int, size: int) -> list[str]:
    return [f"c{label:02d}/{number:03d}.png" for label in range(count) for number in range(size)]


def test_a_run_on_a_folder_is_the_run_on_its_packed_shards_image_for_image(tmp_path, monkeypatch):
    """Order, crops, labels and pixels, over an epoch border, with workers, and for every number of ranks the same set;
    each epoch has each image once."""
    monkeypatch.setattr(virtual_shards, "SAMPLES_PER_SHARD", 7)
    folder = write(tmp_path / "images", [*classes_of(3, 11), "c01/deep/er/x.JPG", "c03/y.jpeg", "c03/z.webp"])
    assert make_shards.run([str(folder), str(tmp_path / "out" / "t"), "--samples-per-shard", "7"]) == 0
    packed, source = open_manifest(f"{tmp_path}/out/t-*.tar"), open_source(str(folder))
    assert source.counts == packed.counts == (7, 7, 7, 7, 7, 1)
    assert (source.label_range, source.unlabelled) == (packed.label_range, packed.unlabelled) == ((0, 3), (0,) * 6)

    expected = rows(train_loader(packed), 24)
    assert rows(train_loader(source), 24) == expected
    assert rows(train_loader(source, replace(CONFIG, num_workers=2)), 24) == expected
    for epoch in (expected[:36], expected[36:72]):
        assert len({key for key, _, _ in epoch}) == 36
    for start in (0, 36):  # three ranks, from the start and after a resume
        ranks = [rows(train_loader(source, rank=rank, world_size=3, start_images=start), 3) for rank in range(3)]
        assert sorted(sum(ranks, [])) == sorted(expected[start : start + 36])


def test_a_few_batches_hold_every_class_though_the_files_lie_sorted_by_class(monkeypatch):
    """Neighbours in a folder are of one class, so shards of neighbours would make batches of four classes."""
    monkeypatch.setattr(virtual_shards, "SAMPLES_PER_SHARD", 10)
    labels = np.repeat(np.arange(20), 10)
    order = np.array(virtual_shards.packing_order(200))
    assert sorted(order) == list(range(200))
    shards = [set(labels[order[first : first + 10]]) for first in range(0, 200, 10)]
    assert min(map(len, shards)) >= 6  # of at most 10


def test_evaluation_counts_every_file_once_on_any_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(virtual_shards, "SAMPLES_PER_SHARD", 4)
    source = open_source(str(write(tmp_path / "images", classes_of(3, 5))))
    for ranks in (1, 2, 4):
        counted: list[tuple[str, int]] = []
        for rank in range(ranks):
            for batch in EvalLoader(source, CONFIG, Transform(), 3, rank, ranks):
                weighed = zip(batch["keys"], batch["label"].tolist(), batch["weight"].tolist(), strict=True)
                counted += [(key, label) for key, label, weight in weighed if weight]
        assert sorted(counted) == [(f"c{label:02d}/{number:03d}", label) for label in range(3) for number in range(5)]


def test_which_files_are_images_and_what_their_labels_are(tmp_path):
    """Classes in sorted order, whatever lies deeper; links are followed; what is hidden or no image is left out."""
    names = ["b-2/x.v1.png", "b/y.PNG", "b/deep/z.webp", "Z/w.jpg"]
    folder = write(tmp_path / "images", names)
    write(tmp_path / "elsewhere", ["far.png", "near.png"])
    (folder / "b" / "linked.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    write(folder, [".hidden/h.png", "b/._y.png", "__MACOSX/m.png"])
    (folder / "b" / "notes.txt").write_text("x")
    os.mkfifo(folder / "b" / "pipe.png")
    said: list[str] = []
    source = open_folder(str(folder), progress=said.append)
    reader = pickle.loads(pickle.dumps(source)).open_reader()
    read = [reader.read(0, index) for index in range(source.num_samples)]
    assert {sample.key: sample.targets.get("label") for sample in read} == {
        "Z/w": 0, "a/far": 1, "a/near": 1, "b/deep/z": 2, "b/linked": 2, "b/y": 2, "b-2/x.v1": 3,
    }  # fmt: skip
    assert source.classes == ("Z", "a", "b", "b-2") and said[0].startswith("5 files and hidden folders of")
    assert [reader.key(0, index) for index in range(7)] == [sample.key for sample in read]
    by_key = {sample.key: sample for sample in read}
    assert by_key["b/linked"].image == (tmp_path / "elsewhere" / "far.png").read_bytes()
    assert by_key["b/y"].extension == "png" and by_key["b/y"].shard == str(folder)


def test_images_without_class_folders_serve_pretraining_alone(tmp_path):
    source = open_source(str(write(tmp_path / "images", [f"{i}.png" for i in range(12)])))
    assert source.label_range is None and source.classes is None and sum(source.unlabelled) == 12
    batch = next(iter(train_loader(source, transform=Transform(needs_label=False))))
    assert len(set(batch["keys"])) == 4
    with pytest.raises(ShardError, match=r"data.shards: 12 of 12 samples have no readable label \(its class folder\)"):
        train_loader(source)
    with pytest.raises(ShardError, match="data.eval_shards: 12 of 12 .* or choose task=simmim"):
        EvalLoader(source, CONFIG, Transform(), 3, 0, 1)


def link_back(folder: Path) -> None:
    write(folder, ["a/1.png"])
    (folder / "a" / "up").symlink_to(folder)


def link_to_itself(folder: Path) -> None:
    write(folder, ["a/1.png"])
    (folder / "a" / "me").symlink_to(folder / "a" / "me")


def link_for_a_class(folder: Path) -> None:
    """Left out like a text file, it would shift the labels of all that follow."""
    write(folder, ["a/1.png", "c/2.png"])
    (folder / "b").symlink_to(folder / "not mounted")


def link_to_nothing(folder: Path) -> None:
    write(folder, ["a/1.png"])
    for name in ("2.png", "3.jpg"):
        (folder / "a" / name).symlink_to(folder / "nowhere")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.mkdir(), r"data.shards '.*' holds no images \(0 files, none named \*.jpg, .*webp\)"),
        (lambda folder: write(folder, ["1.png"]) and (folder / "1.png").rename(folder / "1.tar"),
         r"holds no images \(it holds shards: name them, .*images/\*.tar\)"),
        (lambda folder: write(folder, ["1.png"]) and (folder / "1.png").rename(folder / "1.arrow"),
         r"holds no images \(but Arrow files: .* save_to_disk"),
        (lambda folder: write(folder, ["a/1.png", "a/2.png", "3.png"]),
         r"2 images in class folders and 1 outside of them \(e.g. 3.png\)"),
        (lambda folder: write(folder, ["a/1.png", "a/1.jpg"]),
         r"two images have the name a/1 and differ in the extension alone"),
        (link_to_nothing, r"a/[23].*: a link to nothing \(2 such problems\); mend or delete it"),
        (link_for_a_class, r"images/b: a link to nothing \(1 such problems\); mend or delete it"),
        (link_back, r"a/up/: a link back to a folder above it \(1 such problems\)"),
        (link_to_itself, r"a/me cannot be listed: Too many levels of symbolic links \(1 such problems\)"),
    ],
    ids=["empty", "tars", "arrow", "mixed", "doubled", "broken links", "broken class", "circle", "self"],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_refused_by_name(tmp_path, prepare, message):
    prepare(tmp_path / "images")
    with pytest.raises(ShardError, match=message):
        open_source(str(tmp_path / "images"))


def test_a_folder_stands_alone_and_must_exist(tmp_path):
    folder = write(tmp_path / "images", ["a/1.png"])
    with pytest.raises(ShardError, match="stands alone: it is not joined to others by ::"):
        open_source(f"{folder}::{folder}", "data.eval_shards")
    with pytest.raises(ShardError, match="data.eval_shards names '.*nowhere', which does not exist"):
        open_source(f"{tmp_path}/nowhere", "data.eval_shards")


def test_files_that_vanish_or_change_after_the_start_follow_the_policy_for_damage(tmp_path):
    """The run does not die of an administrator's cleaning up, and it does not train on other images unawares."""
    folder = write(tmp_path / "images", [f"a/{i}.png" for i in range(8)])
    (folder / "a" / "4.png").write_bytes(b"")
    source = open_source(str(folder))
    (folder / "a" / "1.png").unlink()
    (folder / "a" / "2.png").write_bytes(b"short")
    with open(folder / "a" / "3.png", "ab") as file:
        file.write(b"more")
    (folder / "a" / "5.png").write_bytes(b"\x89PNG" + bytes((folder / "a" / "5.png").stat().st_size - 4))
    with pytest.raises(SampleError, match=r"images: sample 'a/[1-5]': .*on_bad_sample=replace"):
        rows(train_loader(source), 3)
    config = replace(CONFIG, on_bad_sample="replace", max_bad_fraction=1.0)
    batches = list(islice(train_loader(source, config, global_batch_size=8), 2))
    causes = {p["key"]: p["cause"] for batch in batches for p in batch["problems"]}
    assert sorted(key for batch in batches for key in batch["keys"]) == [f"a/{i}" for i in range(8)]
    assert sum(float(batch["weight"].sum()) for batch in batches) == 3
    assert causes.pop("a/5").startswith("not a readable .png image") and "byte" not in causes
    size = source.sizes[virtual_shards.packing_order(8).index(3)]
    assert causes == {
        "a/1": "cannot be read: No such file or directory",
        "a/2": causes["a/2"],
        "a/3": f"more than {size} bytes, but {size} when the run started",
        "a/4": "an empty image",
    }
    assert causes["a/2"].startswith("5 bytes, but ")


def test_a_file_that_comes_in_pieces_is_read_to_its_end(tmp_path, monkeypatch):
    """read(2) may give less than it is asked for, and does on some network file systems; that is no damage."""

    class Pieces(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 7))

    source = open_folder(str(write(tmp_path / "images", ["a/1.png"])))
    monkeypatch.setattr(folder_module, "open", lambda path, mode, buffering: Pieces(path), raising=False)
    assert source.open_reader().read(0, 0).image == image_bytes(0, "png")


def test_a_resume_takes_the_folder_wherever_it_lies_and_refuses_another(tmp_path):
    folder = write(tmp_path / "images", classes_of(2, 6))
    state = train_loader(open_source(str(folder))).state_dict(24, 0)
    shutil.copytree(folder, tmp_path / "moved")
    train_loader(open_source(f"{tmp_path}/moved/")).check_state(state)
    refused = "data.shards are not the shards of the checkpoint"
    image = tmp_path / "moved" / "c00" / "000.png"
    image.rename(image.with_name("00x.png"))
    with pytest.raises(ConfigError, match=refused):
        train_loader(open_source(f"{tmp_path}/moved")).check_state(state)
    image.with_name("00x.png").rename(image)
    train_loader(open_source(f"{tmp_path}/moved")).check_state(state)
    image.write_bytes(image_bytes(0, size=(9, 9)))
    with pytest.raises(ConfigError, match=refused):
        train_loader(open_source(f"{tmp_path}/moved")).check_state(state)


def test_a_model_has_a_class_for_every_folder(tmp_path):
    """The last folder may be empty: it is a class all the same."""
    folder = write(tmp_path / "train", ["a/1.png", "b/2.png"])
    three, two = (
        composed(["task=classify", f"task.num_classes={count}", "model=demo", "run_dir=x", "data.shards=x"]).task
        for count in (3, 2)
    )
    (folder / "c").mkdir()
    source = open_source(str(folder))
    task_class(three).check_source(three, source, "data.shards")
    with pytest.raises(ConfigError, match=r"data.shards has 3 classes \(a, b, c\); set task.num_classes=3"):
        task_class(two).check_source(two, source, "data.shards")
    write(folder, ["c/3.png"])
    with pytest.raises(ConfigError, match="data.shards has labels from 0 to 2; set task.num_classes=3"):
        task_class(two).check_source(two, open_source(str(folder)), "data.shards")


def test_the_train_command_opens_folders_and_refuses_other_classes_before_it_trains(tmp_path):
    train, val = write(tmp_path / "train", ["a/1.png", "b/2.png"]), write(tmp_path / "val", ["a/1.png", "x/3.png"])
    task = ("task=classify", "task.num_classes=2", "model=demo", "run_dir=x", f"data.shards={train}")
    alone = ONE
    training, evaluation, classes = open_sources(composed([*task, f"data.eval_shards={train}"]), alone)
    assert training.num_samples == 2 and evaluation is not None and evaluation.label_range == (0, 1)
    assert classes == ("a", "b")
    with pytest.raises(ConfigError, match=r"data.eval_shards has 1 classes that are none of the model's classes \(x\)"):
        open_sources(composed([*task, f"data.eval_shards={val}"]), alone)
    write(tmp_path / "train", ["c/4.png"])
    with pytest.raises(ConfigError, match="task.num_classes .2. is too small: data.shards"):
        open_sources(composed(task), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_several_frames_are_said_once(tmp_path, caplog, workers):
    """Their first frame is used, in every batch of every worker; a line for each would be thousands."""
    (tmp_path / "a").mkdir()
    frames = [Image.fromarray(np.full((9, 9), 50 * i, np.uint8)) for i in range(3)]
    for i in range(12):
        frames[0].save(tmp_path / "a" / f"{i}.gif", save_all=True, append_images=frames[1:])
    rows(train_loader(open_folder(str(tmp_path)), replace(CONFIG, num_workers=workers)), 6)
    assert [record.getMessage() for record in caplog.records] == [
        "some GIF files hold several frames or pages; the first of each is used"
    ]
