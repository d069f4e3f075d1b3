"""Data sets saved by Hugging Face's `datasets` keep the promises of packed shards; `datasets` itself is the witness."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources import virtual_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.huggingface import find_columns
from swinv2_train.data.sources.matched import matched
from tests.support.images import encoded, image_bytes
from tests.support.loaders import CONFIG, Transform, rows, train_loader
from tests.support.processes import finished, forked
from tests.support.segmentation import pixel_pair

COUNT = 240


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """240 rows sorted by class in two files of several record batches each, and a column that nobody asked for."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    directory = tmp_path_factory.mktemp("saved") / "train"
    features = Features({"id": Value("string"), "img": Image(), "class": ClassLabel(names=["ape", "cat", "dog"])})
    columns = {
        "id": [f"row {i}" for i in range(COUNT)],
        "img": [{"bytes": image_bytes(i), "path": f"{i}.png"} for i in range(COUNT)],
        "class": [i // 80 for i in range(COUNT)],
    }
    Dataset.from_dict(columns, features=features).save_to_disk(str(directory), num_shards=2)
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """One that may be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_table(path: Path, change: Any) -> None:
    """Write an Arrow file again, as `datasets` would have written a changed table, and under its name at the end."""
    new = path.with_suffix(".new")
    with pyarrow.ipc.open_stream(path) as stream:
        table = change(stream.read_all())
    with pyarrow.OSFile(str(new), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    new.replace(path)


def test_every_row_is_what_datasets_itself_gives(saved):
    from datasets import Image, load_from_disk

    theirs = load_from_disk(str(saved)).cast_column("img", Image(decode=False))
    assert max(len(file.to_batches()) for file in [pyarrow.ipc.open_stream(path).read_all() for path in
               sorted(saved.glob("*.arrow"))]) > 1  # fmt: skip
    said: list[str] = []
    source = open_source(str(saved), progress=said.append)
    reader = pickle.loads(pickle.dumps(source)).open_reader()
    reader.read(0, 0)
    reader = pickle.loads(pickle.dumps(reader))  # as a worker that is not forked gets it
    assert source.counts == (COUNT,) and source.classes == ("ape", "cat", "dog") and source.label_range == (0, 2)
    assert said == [f"{saved}: {COUNT} rows; images in the column 'img', labels in 'class'"]
    for index in range(COUNT):
        sample = reader.read(0, index)
        row = theirs[int(sample.key)]
        assert (sample.image, sample.targets.get("label"), sample.extension) == (
            row["img"]["bytes"],
            row["class"],
            "png",
        )
    assert sorted(int(reader.key(0, index)) for index in range(COUNT)) == list(range(COUNT))


def test_a_run_is_the_run_on_shards_of_the_same_rows(saved, tmp_path, monkeypatch):
    """Order, crops, labels and pixels; with workers; a resume on three ranks; each epoch has each row once."""
    monkeypatch.setattr(virtual_shards, "SAMPLES_PER_SHARD", 30)
    images = [(str(i), image_bytes(i), "png", i // 80) for i in virtual_shards.packing_order(COUNT)]
    packed = write_shards(images, str(tmp_path / "t"), 30)
    source = open_source(str(saved))
    expected = rows(train_loader(packed), 75)
    assert rows(train_loader(source), 75) == expected
    assert rows(train_loader(source, replace(CONFIG, num_workers=2)), 75) == expected
    assert len({key for key, _, _ in expected[:COUNT]}) == COUNT
    ranks = [rows(train_loader(source, rank=rank, world_size=3, start_images=120), 3) for rank in range(3)]
    assert sorted(sum(ranks, [])) == sorted(expected[120:156])
    counted = [
        key
        for rank in range(3)
        for batch in EvalLoader(source, CONFIG, Transform(), 7, rank, 3)
        for key, weight in zip(batch["keys"], batch["weight"].tolist(), strict=True)
        if weight
    ]
    assert sorted(counted, key=int) == [str(i) for i in range(COUNT)]


def test_rows_without_an_image_in_them_are_read_from_below_the_set_or_are_damaged_samples(copy, tmp_path):
    """Older versions of `datasets` saved paths alone; what leads out of the set may be any file of the user's."""
    (copy / "images").mkdir()
    (copy / "images" / "near.png").write_bytes(image_bytes(7))
    (tmp_path / "secret.png").write_bytes(image_bytes(8))
    (copy / "linked.png").symlink_to(tmp_path / "secret.png")
    cells = [
        {"bytes": None, "path": "images/near.png"},
        {"bytes": None, "path": "images/gone.png"},
        {"bytes": None, "path": "https://host/x.png?signature=secret"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "x.png"},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": "linked.png"},
        {"bytes": None, "path": "a\0b"},
        {"bytes": None, "path": "images"},
    ]

    def change(table):
        column = pyarrow.array(cells + table.column("img").to_pylist()[len(cells) :], table.schema.field("img").type)
        return table.set_column(table.schema.get_field_index("img"), table.schema.field("img"), column)

    change_table(copy / "data-00000-of-00002.arrow", change)
    source = open_source(str(copy))
    config = replace(CONFIG, on_bad_sample="replace")
    batches = list(islice(train_loader(source, config), COUNT // 4))
    causes = {problem["key"]: problem["cause"] for batch in batches for problem in batch["problems"]}
    for key in ("6", "7", "8"):
        assert "which leads out of the data set; save it again with its images in it" in causes.pop(key)
    assert "null" in causes.pop("9") and "regular file" in causes.pop("10")
    assert causes == {
        "1": "its file images/gone.png cannot be read: No such file or directory",
        "2": "no image, but the address https://host/x.png",
        "3": "no image",
        "4": "no image",
        "5": "an empty image",
    }
    assert sum(float(batch["weight"].sum()) for batch in batches) == COUNT - 10
    reader = source.open_reader()
    place = next(index for index in range(COUNT) if reader.key(0, index) == "0")
    assert reader.read(0, place).image == image_bytes(7)
    with pytest.raises(SampleError, match=r"copy: sample '\d+': .*on_bad_sample=replace"):
        rows(train_loader(source), COUNT // 4)


def test_rows_without_a_label_are_counted_and_a_data_set_without_any_serves_pretraining(copy, tmp_path):
    from datasets import load_from_disk

    def change(table):
        column = pyarrow.array([None, -1, *table.column("class").to_pylist()[2:]], "int64")
        return table.set_column(table.schema.get_field_index("class"), table.schema.field("class"), column)

    load_from_disk(str(copy)).remove_columns("class").save_to_disk(str(tmp_path / "none"))
    change_table(copy / "data-00001-of-00002.arrow", change)
    with pytest.raises(ShardError, match=r"2 of 240 samples have no readable label \(a column of class labels\)"):
        train_loader(open_source(str(copy)))
    source = open_source(str(tmp_path / "none"))
    assert source.label_range is None and source.classes is None
    next(iter(train_loader(source, transform=Transform(needs_label=False))))


IMAGE, CLASS, INT = {"_type": "Image"}, {"names": ["a"], "_type": "ClassLabel"}, {"dtype": "int32", "_type": "Value"}
TEXT, NESTED = {"dtype": "string", "_type": "Value"}, [{"dtype": "int64", "_type": "Value"}]


def test_columns_are_found_by_their_types():
    assert find_columns({"a": TEXT, "b": IMAGE, "c": INT, "d": CLASS, "e": NESTED}, "x") == ("b", "d")
    assert find_columns({"b": IMAGE, "c": INT, "a": TEXT}, "x") == ("b", "c")
    assert find_columns({"b": IMAGE, "a": TEXT}, "x") == ("b", None)
    assert find_columns({"b": IMAGE, "m": {"dtype": "int32", "shape": [2, 2], "_type": "Array2D"}}, "x") == ("b", None)
    with pytest.raises(
        ShardError, match=r"x has no column of type Image, Array2D or Array3D; .*: a \(string\), e \(nested\); cast"
    ):
        find_columns({"a": TEXT, "e": NESTED}, "x")
    with pytest.raises(ShardError, match=r"2 columns that may be the images: a, b; its columns: a \(Image\), b"):
        find_columns({"a": IMAGE, "b": IMAGE}, "x")
    with pytest.raises(ShardError, match=r"2 columns that may be the labels: c, d; .* keep one of them .select"):
        find_columns({"a": IMAGE, "c": CLASS, "d": CLASS, "e": INT}, "x")
    with pytest.raises(ShardError, match="2 columns that may be the labels: width, height"):
        find_columns({"a": IMAGE, "width": INT, "height": INT}, "x")


def test_several_splits_are_named_instead_of_read(saved, tmp_path):
    from datasets import DatasetDict, load_from_disk

    one = load_from_disk(str(saved)).select(range(3))
    DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ShardError, match="data.eval_shards .* data sets; name one of them: .*both/train, .*test"):
        open_source(str(tmp_path / "both"), "data.eval_shards")
    assert open_source(f"{tmp_path}/both/test").num_samples == 3


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_an_error_and_ends_no_process(saved, copy, seed):
    """pyarrow believes a file's lengths and offsets: it read beyond its memory, or aborted."""
    path = copy / "data-00000-of-00002.arrow"
    good = path.read_bytes()
    draw = random.Random(seed)

    def body() -> None:
        signal.alarm(60)
        for _ in range(25):
            place = draw.choice([draw.randrange(4000), draw.randrange(len(good))])
            flipped = bytearray(good)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with contextlib.suppress(ShardError, SampleError):
                reader = open_source(str(copy)).open_reader()
                for index in range(0, COUNT, 7):
                    with contextlib.suppress(SampleError):
                        reader.read(0, index)

    process = forked(body, stderr=subprocess.PIPE)
    done = finished(process)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"_data_files": [{"filename": "../secret.arrow"}]}, {"_data_files": [{"filename": "/etc/passwd"}]},
        {"_data_files": [{"name": 1}]}, {"_data_files": {}}, {"_data_files": []}, {"_data_files": 5},
        {"_fingerprint": 5}, {"_fingerprint": None}, {"_data_files": [{"filename": "x\0"}]},
    ],
)  # fmt: skip
def test_a_state_that_leads_elsewhere_or_is_none_is_refused(copy, change):
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(ShardError, match=r"copy: state.json: .*; copy or save it again"):
        open_source(str(copy))


@pytest.mark.parametrize("content", ["[" * 10**5, "[]", "null", '{"features": [1]}', '{"features": 3}', "\ud800"])
def test_an_info_that_is_none_is_refused(copy, content):
    (copy / "dataset_info.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ShardError, match=r"dataset_info.json|no column of type Image"):
        open_source(str(copy))


def cut(path: Path, bytes_off: int) -> None:
    path.write_bytes(path.read_bytes()[:-bytes_off])


def forget_fields(directory: Path) -> None:
    info = json.loads((directory / "dataset_info.json").read_text())
    info["features"]["img"]["_type"] = "Value"
    info["features"]["id"]["_type"] = "Image"
    (directory / "dataset_info.json").write_text(json.dumps(info))


def forget_labels(directory: Path) -> None:
    info = json.loads((directory / "dataset_info.json").read_text())
    info["features"]["kind"] = info["features"].pop("class")
    (directory / "dataset_info.json").write_text(json.dumps(info))


def name_classes(*names: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        info = json.loads((directory / "dataset_info.json").read_text())
        info["features"]["class"]["names"] = list(names)
        (directory / "dataset_info.json").write_text(json.dumps(info))

    return change


def with_indices(directory: Path) -> None:
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "x.arrow"}]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: cut(d / "data-00001-of-00002.arrow", 8), "00001-of-00002.arrow: cut off: .* rows are missing; copy"),
        (lambda d: cut(d / "data-00001-of-00002.arrow", 999), "data-00001-of-00002.arrow cannot be read: .*; copy or"),
        (lambda d: (d / "data-00000-of-00002.arrow").write_bytes(b""), "data-00000-of-00002.arrow cannot be read"),
        (lambda d: (d / "data-00000-of-00002.arrow").unlink(), "data-00000-of-00002.arrow cannot be read: .*No such"),
        (lambda d: (d / "dataset_info.json").unlink(), "copy: dataset_info.json is missing; copy or save it again"),
        (lambda d: (d / "state.json").write_text("{"), "copy: state.json cannot be read"),
        (forget_fields, "the column 'id' is string, not a struct of bytes and path"),
        (forget_labels, "arrow: there is no column 'kind', which dataset_info.json names; copy or save it again"),
        (name_classes("ape", "cat"), "copy' has labels up to 2, but names 2 classes; name each, and save it again"),
        (name_classes("ape", "e\u0301", "\u00e9"), "has two classes called '\u00e9'; give each its own name"),
        (with_indices, "rows of which a list says the order; save it again with a newer"),
    ],
    ids=[
        "cut between",
        "cut within",
        "emptied",
        "file gone",
        "info gone",
        "no JSON",
        "type",
        "no labels",
        "few names",
        "doubled",
        "list",
    ],
)
def test_damaged_directories_are_refused_by_name(copy, damage, message):
    damage(copy)
    with pytest.raises(ShardError, match=message):
        open_source(str(copy))


def test_classes_are_matched_by_their_names(copy, tmp_path):
    """A data set has its own order, and may name classes of which it has no rows."""
    name_classes("dog", "cafe\u0301", "ape", "never seen")(copy)
    source = matched(open_source(str(copy)), "data.eval_shards", ("ape", "caf\u00e9", "cow", "dog"), 4, "x", print)
    reader = source.open_reader()
    labels = {int(sample.key) // 80: sample.targets["label"] for sample in (reader.read(0, i) for i in range(COUNT))}
    assert labels == {0: 3, 1: 1, 2: 0} and source.classes == ("ape", "caf\u00e9", "cow", "dog")


def test_a_resume_takes_the_copy_and_refuses_other_rows(saved, copy):
    from datasets import load_from_disk

    state = train_loader(open_source(str(saved))).state_dict(24, 0)
    train_loader(open_source(str(copy))).check_state(state)
    load_from_disk(str(saved)).select(range(COUNT - 1)).save_to_disk(str(copy / "less"))
    with pytest.raises(ConfigError, match="not the shards of the checkpoint"):
        train_loader(open_source(str(copy / "less"))).check_state(state)

    def relabelled(table):
        column = pyarrow.array([2, *table.column("class").to_pylist()[1:]], "int64")
        return table.set_column(table.schema.get_field_index("class"), table.schema.field("class"), column)

    change_table(copy / "data-00000-of-00002.arrow", relabelled)  # under the old fingerprint
    with pytest.raises(ConfigError, match="not the shards of the checkpoint"):
        train_loader(open_source(str(copy))).check_state(state)
    source = open_source(str(copy))
    change_table(copy / "data-00001-of-00002.arrow", lambda table: table.slice(1))
    with pytest.raises(ShardError, match="data-00001-of-00002.arrow changed since the run started"):
        rows(train_loader(source), 1)


def test_without_pyarrow_the_remedy_is_named(saved, monkeypatch):
    source = open_source(str(saved))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python itself does to forbid an import
    for use in (lambda: open_source(str(saved)), source.open_reader):
        with pytest.raises(ConfigError, match=r"need pyarrow, .* pip install 'pyarrow>=16'"):
            use()


@pytest.mark.slow
def test_datasets_is_neither_imported_nor_asked_anything_of_the_network(saved):
    code = f"""
import socket, sys
def refuse(*arguments): raise AssertionError("a connection")
socket.socket.connect = socket.getaddrinfo = refuse
from swinv2_train.data.sources.base import open_source
source = open_source({str(saved)!r})
assert source.open_reader().read(0, 5).image
print({{"datasets", "pandas", "huggingface_hub"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


# --------------------------------------------------------------------------------------------------------------------
# Columns of arrays


def saved_arrays(directory: Path, arrays: list[Any], kind: Any, **columns: Any) -> Path:
    from datasets import Dataset, Features, Value

    features = Features({"x": kind, **{name: Value("int64") for name in columns}})
    Dataset.from_dict({"x": arrays, **columns}, features=features).save_to_disk(str(directory))
    return directory


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32"])
def test_a_column_of_arrays_is_read_as_npy_files_are(dtype, tmp_path):
    from datasets import Array2D, Array3D

    rng = np.random.default_rng(0)
    three = [(200 * rng.random((4, 5, 6))).astype(dtype) for _ in range(7)]
    reader = open_source(
        str(saved_arrays(tmp_path / "three", three, Array3D((4, 5, 6), dtype), y=range(7)))
    ).open_reader()
    for index in range(7):
        sample = reader.read(0, index)
        number = int(sample.key)
        assert sample.extension == "npy" and sample.targets == {"label": number}
        found = np.load(io.BytesIO(sample.image), allow_pickle=False)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, three[number])
    two = [three[0][: 2 + number, :, 0] for number in range(3)]  # each of its own height
    reader = open_source(str(saved_arrays(tmp_path / "two", two, Array2D((None, 5), dtype)))).open_reader()
    for index in range(3):
        sample = reader.read(0, index)
        np.testing.assert_array_equal(np.load(io.BytesIO(sample.image)), two[int(sample.key)])


def test_arrays_that_are_rounded_or_incomplete_are_refused(tmp_path):
    from datasets import Array3D

    path = saved_arrays(tmp_path / "double", [np.zeros((2, 2, 2))], Array3D((2, 2, 2), "float64"))
    with pytest.raises(ShardError, match="the column 'x' holds double, not one of uint8, uint16, int16, float16"):
        open_source(str(path))
    path = saved_arrays(tmp_path / "holes", [np.zeros((2, 2, 2), "float32")] * 3, Array3D((2, 2, 2), "float32"))

    def with_holes(table: Any) -> Any:
        rows = [[[[1, None], [3, 4]]] * 2, None, [[[1, 2], [3, 4]], [[1, 2]]]]
        field = table.schema.field("x")
        return pyarrow.table([pyarrow.array(rows, field.type)], schema=pyarrow.schema([field]))

    change_table(next(path.glob("*.arrow")), with_holes)
    reader = open_source(str(path)).open_reader()
    for index in range(3):
        match = {"0": "some of its values are missing", "1": "no array", "2": "2 lengths"}[reader.key(0, index)]
        with pytest.raises(SampleError, match=match):
            reader.read(0, index)


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Five images and their label images in two files of rows, with a class of each image beside."""
    from datasets import ClassLabel, Dataset, Features, Image

    directory = tmp_path / "pairs"
    features = Features({"image": Image(), "scene": ClassLabel(names=["in", "out"]), "annotation": Image()})
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": image_bytes(i), "path": f"{i}.png"} for i in range(5)],
        "scene": [i % 2 for i in range(5)],
        "annotation": [{"bytes": encoded(pixel_pair(i)[1]), "path": None} if i != 3 else None for i in range(5)],
    }
    Dataset.from_dict(columns, features=features).save_to_disk(str(directory), num_shards=2)
    return directory


def test_a_second_column_of_images_is_that_of_label_images_where_it_is_named(pairs):
    said: list[str] = []
    (pairs / "classes.txt").write_text("sky\nground\n")
    source = open_source(str(pairs), progress=said.append, label_folders=["image", "annotation"])
    assert said == [f"{pairs}: 5 rows; images in the column 'image', label images in 'annotation'"]
    assert source.unsegmented == (1,) and source.label_range is None and source.classes == ("sky", "ground")
    reader = pickle.loads(pickle.dumps(source)).open_reader()
    for index in range(5):
        sample = reader.read(0, index)
        number = int(sample.key)
        assert sample.image == image_bytes(number)
        assert sample.targets == ({} if number == 3 else {"segmentation": encoded(pixel_pair(number)[1])})
    other = open_source(str(pairs), label_folders=["annotation", "image"])
    assert other.digest != source.digest


def test_without_names_two_columns_of_images_are_refused_with_the_remedy(pairs):
    with pytest.raises(
        ShardError, match=r"2 columns that may be the images: .*data\.label_folders=\[image,annotation\]"
    ):
        open_source(str(pairs))
    for names in (["image", "mask"], ["image", "scene"]):
        with pytest.raises(ShardError, match=rf"{names[1]}' of type Image; its columns: image \(Image\), scene"):
            open_source(str(pairs), label_folders=names)
