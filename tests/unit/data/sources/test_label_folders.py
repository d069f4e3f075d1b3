"""Folders of images with label images: which belongs to which, what is missing or left over, and what a run reads."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile

from swinv2_train import make_shards
from swinv2_train.config import ConfigError
from swinv2_train.data.sample import Sample, SampleError, ShardError
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.sources.label_folders import ade20k_names, pairs_of, pixel_class_names
from swinv2_train.data.transforms.label_image import read_label_image
from tests.support.configs import composed
from tests.support.images import encoded
from tests.support.segmentation import pixel_pair, write_pairs

ADE20K = ("images", "annotations")


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "ade", 4)
    return tmp_path / "ade"


def opened(folder: Path, said: list[str] | None = None, **options: object) -> Source:
    return open_source(str(folder), progress=None if said is None else said.append, **options)


def read(source: Source) -> dict[str, Sample]:
    reader = pickle.loads(pickle.dumps(source)).open_reader()
    samples = [reader.read(shard, i) for shard, count in enumerate(source.counts) for i in range(count)]
    return {sample.key: sample for sample in samples}


def test_ade20ks_layout_is_read_as_it_is_downloaded(ade):
    (ade / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t.5\twall\n2\t.3\tbuilding, edifice\n")
    source = opened(ade / "images" / "training", label_folders=ADE20K)
    found = read(source)
    assert sorted(found) == [f"k{n:03d}" for n in range(4)] and source.unsegmented == (0,)
    for key, sample in found.items():
        assert sample.image == (ade / "images" / "training" / f"{key}.jpg").read_bytes()
        assert sample.targets == {"segmentation": (ade / "annotations" / "training" / f"{key}.png").read_bytes()}
    assert source.classes == ("wall", "building")


def test_a_run_on_the_folder_sees_what_a_run_on_its_shards_sees(ade):
    source = opened(ade / "images" / "training", label_folders=ADE20K)
    masks = str(ade / "annotations" / "training")
    assert (
        make_shards.run([str(ade / "images" / "training"), str(ade / "t"), "--labels", masks, "--overlays", "0"]) == 0
    )
    shards = opened(ade / "t-*.tar", label_folders=ADE20K)  # of no meaning for shards
    pairs = [[(s.key, s.image, s.targets) for s in read(each).values()] for each in (source, shards)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("ending", ["tif", "tiff"])
def test_label_images_may_be_tiffs_and_are_png_in_shards(ade, ending):
    masks = ade / "annotations" / "training"
    values = {}
    for path in sorted(masks.glob("*.png")):
        values[path.stem] = read_label_image(path.read_bytes()).astype(np.uint16)
        tifffile.imwrite(path.with_suffix(f".{ending}"), values[path.stem])
        path.unlink()
    source = opened(ade / "images" / "training", label_folders=ADE20K)
    assert make_shards.run([str(ade / "images" / "training"), str(ade / "t"), "--labels", str(masks)]) == 0
    assert source.unsegmented == (0,)
    for found in (source, opened(ade / "t-*.tar")):
        for key, sample in read(found).items():
            assert np.array_equal(read_label_image(sample.targets["segmentation"]), values[key])
        assert found.num_samples == len(values) == 4


def test_folders_below_are_no_classes_and_the_last_part_of_that_name_counts(tmp_path):
    """Cityscapes' cities are no classes; a folder above may be called the same."""
    image, labels = (encoded(each) for each in pixel_pair(0))
    root = tmp_path / "images" / "set"
    for name in ("images/a/x.png", "images/b/x.png", "masks/a/x.png", "masks/b/x.png", "masks/b/y.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image if name.startswith("images") else labels)
    said: list[str] = []
    source = opened(root / "images", said, label_folders=("images", "masks"))
    assert sorted(read(source)) == ["a/x", "b/x"] and source.label_range is None and source.unsegmented == (0,)
    assert [line for line in said if "have no image" in line] == [
        f"warning: 1 label images below {root / 'masks'} have no image in {root / 'images'} (b/y.png)"
    ]


@pytest.mark.parametrize("member", [None, "input.npy"])
def test_label_images_may_lie_beside(tmp_path, member):
    ending = member or "jpg"
    for number in range(3):
        image, labels = pixel_pair(number)
        (tmp_path / f"k{number}.{ending}").write_bytes(encoded(image, "jpg"))
        if number:
            (tmp_path / f"k{number}.seg.png").write_bytes(encoded(labels))
    source = opened(tmp_path, image_member=member)
    found = read(source)
    keys = [f"k{n}.input" if member else f"k{n}" for n in range(3)]
    assert sorted(found) == keys and source.unsegmented == (1,)
    assert [found[key].targets.get("segmentation") for key in keys] == [
        None, *(encoded(pixel_pair(number)[1]) for number in (1, 2))
    ]  # fmt: skip


def test_a_missing_partner_is_counted_and_one_that_changes_is_a_damaged_sample(ade):
    masks = ade / "annotations" / "training"
    whole = opened(ade / "images" / "training", label_folders=ADE20K)
    (masks / "k001.png").unlink()
    with (masks / "k002.png").open("ab") as file:
        file.write(b"more")
    reader = whole.open_reader()
    problems = {}
    for index in range(4):
        try:
            reader.read(0, index)
        except SampleError as error:
            problems[error.key] = error.cause
    size = len(encoded(pixel_pair(2)[1]))
    assert problems == {
        "k001": "its label image: cannot be read: No such file or directory",
        "k002": f"its label image: more than {size} bytes, but {size} when the run started",
    }
    again = opened(ade / "images" / "training", label_folders=ADE20K)
    assert again.unsegmented == (1,) and again.digest != whole.digest
    assert "segmentation" not in read(again)["k001"].targets


def test_without_label_images_a_folder_is_what_it_was(ade):
    assert opened(ade / "images").classes == ("training",)
    assert opened(ade / "images" / "training").unsegmented == (4,)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("photos", "annotations"), r"no part of data.shards '.*/images/training' is called 'photos'; name the folder"),
        (("images", "masks"), r"are looked for in .*/ade/masks/training, which is no folder; mend either key"),
    ],
)
def test_folders_that_are_not_there_are_refused(ade, folders, message):
    with pytest.raises(ShardError, match=message):
        opened(ade / "images" / "training", label_folders=folders)


@pytest.mark.parametrize("value", ["[images]", "[images,a/b]", "[images,'']", "[images,..]"])
def test_the_key_takes_two_names(value):
    with pytest.raises(ConfigError, match=r"data.label_folders .* must hold two names of folders"):
        composed(["run_dir=/x", "data.shards=/x", f"data.label_folders={value}"])


def test_names_are_found_above_and_ambiguous_synonyms_are_kept_whole(tmp_path):
    deep = tmp_path / "annotations" / "training"
    deep.mkdir(parents=True)
    assert pixel_class_names(deep) is None
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t.1\t2\t3\t1\tscreen, crt\n2\t.1\t2\t3\t0\tscreen, door\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    assert pixel_class_names(deep) == ("screen, crt", "screen, door")
    (deep / "classes.txt").write_text("a\nb\n")
    assert pixel_class_names(deep) == ("a", "b")


@pytest.mark.parametrize("content", ["", "Idx\tName\n", "Idx\tName\n2\twall\n", "Idx\tName\n1\n", "a picture\nof it\n"])
def test_a_table_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "objectInfo150.txt").write_text(content)
    with pytest.raises(ShardError, match=r"is not ADE20K's table .* put a classes.txt there instead"):
        ade20k_names(tmp_path / "objectInfo150.txt")


def test_a_label_image_of_another_ending_is_no_partner():
    assert pairs_of(["a.jpg", "b/c.d.jpg"], ["a.jpg", "b/c.d.png", "a.bmp"]) == {"b/c.d.jpg": "b/c.d.png"}
