"""swinv2-make-shards of images with label images: every pair is looked at, and what would ruin a run is refused."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinv2_train import make_shards
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from tests.support.images import encoded
from tests.support.segmentation import pixel_pair, write_pairs
from tests.support.shard_files import write_plain_tar


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "ade", 5)
    return tmp_path / "ade"


def run(pairs: Path, *options: str, out: str = "out/train") -> int:
    images, labels = pairs / "images" / "training", pairs / "annotations" / "training"
    return make_shards.run([str(images), str(pairs / out), "--labels", str(labels), *options])


def annotation(pairs: Path, number: int) -> Path:
    return pairs / "annotations" / "training" / f"k{number:03d}.png"


def contents(pattern: str) -> dict[str, tuple[str, bytes, bytes | None]]:
    manifest = open_manifest(pattern)
    reader = TarReader(manifest)
    read = [reader.read(shard, i) for shard, count in enumerate(manifest.counts) for i in range(count)]
    return {sample.key: (sample.extension, sample.image, sample.targets.get("segmentation")) for sample in read}


def test_pairs_of_two_folders_are_packed_byte_for_byte_and_their_values_counted(pairs, capsys):
    (pairs / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t.5\twall\n2\t.3\tdisc, disk\n")
    assert run(pairs, "--samples-per-shard", "2", "--reduce-zero-label", "--overlays", "2") == 0
    found = contents(f"{pairs}/out/train-*.tar")
    files = {
        f"k{n:03d}": ("jpg", (pairs / f"images/training/k{n:03d}.jpg").read_bytes(), annotation(pairs, n).read_bytes())
        for n in range(5)
    }
    assert found == files
    assert (pairs / "out" / "classes.txt").read_text() == "wall\ndisc\n"
    assert open_manifest(f"{pairs}/out/train-*.tar").classes == ("wall", "disc")
    entries = json.loads((pairs / "out" / "manifest.json").read_text())["shards"]
    counted: dict[int, int] = {}
    for entry in entries.values():
        assert entry["targets"] == {"segmentation": entry["samples"]}
        for value, count in entry["label_values"].items():
            counted[int(value)] = counted.get(int(value), 0) + count
    whole = np.stack([pixel_pair(n)[1] for n in range(5)])
    assert counted == {value: int((whole == value).sum()) for value in range(3)}
    out = capsys.readouterr().out
    shares = [f"{100 * counted[value] / whole.size:6.2f} %" for value in range(3)]
    for value, name in enumerate(("(ignored)", "wall", "disc")):
        line = next(line for line in out.splitlines() if line.startswith(f"  {value} "))
        assert shares[value] in line and line.endswith(name)
    for number in range(2):
        with Image.open(pairs / "out" / f"train-labels-{number}.png") as picture:
            assert picture.width > 3 * 256 and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10
    assert not (pairs / "out" / "train-labels-2.png").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_give_the_same_shards(pairs, kind):
    made = {}
    for name in ("images", "annotations"):
        made[name] = path = pairs / f"{name}.{kind}"
        files = sorted((pairs / name / "training").iterdir())
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for file in files:
                    archive.write(file, f"top/{file.name}")
        else:
            with tarfile.open(path, "w") as tar:
                for file in files:
                    tar.add(file, f"top/{file.name}")
    assert make_shards.run([str(made["images"]), str(pairs / "a"), "--labels", str(made["annotations"])]) == 0
    assert run(pairs, out="b") == 0
    assert (pairs / "a-000000.tar").read_bytes() == (pairs / "b-000000.tar").read_bytes()


def test_packed_tars_and_folders_with_label_images_beside_are_packed_anew(pairs):
    assert run(pairs) == 0
    tar = pairs / "out" / "train-000000.tar"
    assert make_shards.run([str(tar), str(pairs / "again" / "train"), "--num-classes", "3"]) == 0
    assert contents(f"{pairs}/again/train-*.tar") == contents(str(tar))
    with tarfile.open(tar) as packed:
        packed.extractall(pairs / "unpacked", filter="data")
    assert make_shards.run([str(pairs / "unpacked"), str(pairs / "third" / "train"), "--overlays", "0"]) == 0
    assert contents(f"{pairs}/third/train-*.tar") == contents(str(tar))


def refused(capsys: pytest.CaptureFixture[str], pairs: Path, *options: str) -> str:
    """The message; nothing is left of the shards, nor of the pictures of the first pairs."""
    before = sorted(pairs.rglob("*"))
    assert run(pairs, *options) == 2
    assert sorted(pairs.rglob("*")) == before
    return capsys.readouterr().err


def test_masks_of_0_and_255_are_refused(pairs, capsys):
    for number in range(5):
        annotation(pairs, number).write_bytes(encoded((255 * (pixel_pair(number)[1] > 0)).astype(np.uint8)))
    message = refused(capsys, pairs)
    assert "all pixels of its label images are 0 or 255" in message and "divide them by 255" in message


def test_one_image_of_background_and_ignored_rim_is_no_such_mask(pairs):
    annotation(pairs, 0).write_bytes(encoded((255 * (pixel_pair(0)[1] > 0)).astype(np.uint8)))
    assert run(pairs) == 0


def test_images_of_which_every_pixel_is_ignored_are_packed_unless_all_are(pairs, capsys):
    """The first ones are drawn; there was no colour to draw with."""
    for number in range(4):
        annotation(pairs, number).write_bytes(encoded(np.full((32, 32), 255, np.uint8)))
    assert run(pairs, out="some/train") == 0
    capsys.readouterr()
    annotation(pairs, 4).write_bytes(encoded(np.full((32, 32), 255, np.uint8)))
    assert "all pixels of its label images are 255, which is ignored, so there is nothing to " in refused(capsys, pairs)


def test_another_size_is_refused_by_name(pairs, capsys):
    annotation(pairs, 3).write_bytes(encoded(np.zeros((32, 31), np.uint8)))
    assert "the label image of 'k003' cannot be packed: its label image has 32 x 31 pixels and the image 32 x 32" in (
        refused(capsys, pairs)
    )


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (3, ("--num-classes", "3"), "the values 3 (10 pixels), but 0 to 2 are classes and 255 ignored"),
        (3, ("--num-classes", "3"), "set task.reduce_zero_label=true where 0 is no class of its own, or raise "
         "task.num_classes to 4, or set task.ignore_index=3"),
        (9, ("--num-classes", "2", "--reduce-zero-label"), "9 (10 pixels), but 1 to 2 are classes and 0 and 255 "
         "ignored"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_class_is_refused_with_the_remedies(pairs, capsys, value, options, message):
    labels = pixel_pair(2)[1]
    labels[0, :10] = value
    annotation(pairs, 2).write_bytes(encoded(labels))
    found = refused(capsys, pairs, *options)
    assert "the label image of 'k002'" in found and message in found
    assert run(pairs, "--num-classes", "3", "--ignore-index", str(value)) == 0


def test_colours_and_damage_are_refused_by_name(pairs, capsys):
    annotation(pairs, 1).write_bytes(encoded(np.zeros((32, 32, 3), np.uint8)))
    message = refused(capsys, pairs)
    assert "'k001' cannot be packed: a label image of colours (RGB)" in message and "save it as grey" in message
    annotation(pairs, 1).write_bytes(encoded(pixel_pair(1)[1])[:-20])
    assert "'k001' cannot be packed: not a readable .png image" in refused(capsys, pairs)


def test_what_has_no_partner_is_named_and_counted(pairs, capsys):
    annotation(pairs, 4).unlink()
    (pairs / "images" / "training" / "k002.jpg").unlink()
    message = refused(capsys, pairs)
    assert "1 of 4 images have no label image in" in message and "(k004.jpg)" in message
    (pairs / "images" / "training" / "k004.jpg").unlink()
    assert run(pairs) == 0
    assert "warning: 1 label images have no image and are left out (k002.png)" in capsys.readouterr().out
    assert sorted(contents(f"{pairs}/out/train-*.tar")) == ["k000", "k001", "k003"]


def test_a_tar_in_which_some_images_have_none_is_refused(tmp_path, capsys):
    image, labels = (encoded(each) for each in pixel_pair(0))
    members = [("a.png", image), ("a.seg.png", labels), ("b.png", image)]
    assert make_shards.run([str(write_plain_tar(tmp_path / "t.tar", members)), str(tmp_path / "out" / "t")]) == 2
    assert "1 of 2 images have no label image in" in capsys.readouterr().err


def test_checks_without_label_images_are_no_silent_success(pairs, capsys):
    assert make_shards.run([str(pairs / "images" / "training"), str(pairs / "o"), "--num-classes", "3"]) == 2
    assert "has none; name their folder by --labels" in capsys.readouterr().err


def test_names_of_other_classes_are_not_mixed(pairs, capsys):
    (pairs / "classes.txt").write_text("sky\nsun\nsea\n")
    assert run(pairs) == 0
    (pairs / "classes.txt").write_text("sun\nsky\nsea\n")
    assert run(pairs, out="out/val") == 2
    assert "lists the classes of pixels in another order" in capsys.readouterr().err
    (pairs / "classes.txt").write_text("sky\nsun\nice\n")
    assert run(pairs, out="out/val") == 2
    assert "ice" in capsys.readouterr().err
    (pairs / "classes.txt").write_text("sky\nsun\nsea\n")
    assert run(pairs, out="out/val") == 0


@pytest.mark.parametrize("shape", [(5, 32, 32), (32, 32, 5)])
def test_arrays_of_bands_are_packed_and_their_sizes_compared(tmp_path, capsys, shape):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    array = io.BytesIO()
    np.save(array, np.zeros(shape, np.uint16))
    (tmp_path / "images" / "a.npy").write_bytes(array.getvalue())
    deep = np.full((32, 32), 700, np.uint16)
    command = [str(tmp_path / "images"), str(tmp_path / "out" / "t"), "--labels", str(tmp_path / "masks")]
    (tmp_path / "masks" / "a.png").write_bytes(encoded(deep))
    assert make_shards.run(command) == 0
    assert contents(f"{tmp_path}/out/t-*.tar")["a"] == ("npy", array.getvalue(), encoded(deep))
    (tmp_path / "masks" / "a.png").write_bytes(encoded(deep[:30]))
    assert make_shards.run([*command, "--overwrite"]) == 2
    assert "30 x 32 pixels and the image" in capsys.readouterr().err
