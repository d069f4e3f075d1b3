"""Labels of a table beside the images: what a row says, which image it is of, and which tables are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.sample import LABEL, LABELS, VALUES, SampleError
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.label_choice import with_labels_of
from tests.support.configs import composed
from tests.support.images import image_bytes
from tests.support.shard_files import write_plain_tar

NAMES = ("a/one", "a/two", "b/three")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of three images."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(number))
    return str(folder)


class Opened:
    """A source with the labels of a table: what each image has, by its key, and what was said."""

    def __init__(self, images: str, path: str, kind: str, *overrides: str, key: str = "data.shards") -> None:
        text = (f"data.shards={images}", f"data.labels={path}", *overrides)
        data = composed(["task=classify", "task.rand_augment=null", "run_dir=unused", *text]).data
        self.said: list[str] = []
        self.source = with_labels_of(open_source(images), key, data, kind, 3, self.said.append)

    def all(self, source: Any = None) -> dict[str, Any]:
        reader = (source or self.source).open_reader()
        found = {}
        for shard, count in enumerate(self.source.counts):
            for index in range(count):
                targets = reader.read(shard, index).targets
                found[reader.key(shard, index)] = next((np.array(each).tolist() for each in targets.values()), None)
        return found


def write(folder: Path, text: str | bytes, name: str = "labels.csv") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_class_by_name_and_paths_with_and_without_endings(images, tmp_path):
    """The classes are all that the file names, so that two splits of one file number them alike."""
    rows = "file,class\na/one.PNG,dog\n./a/two.png,cat\nb/three,dog\nelsewhere.jpg,bird\n"
    opened = Opened(images, write(tmp_path, rows), LABEL)
    assert opened.source.classes == ("bird", "cat", "dog") and opened.source.used_labels == {1, 2}
    assert opened.all() == {"a/one": 2, "a/two": 1, "b/three": 2}
    assert sum(opened.source.unlabelled) == 0
    assert opened.said == [f"note: 1 of 4 rows of {tmp_path}/labels.csv are of no image of data.shards"]


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile;class\r\na/one;2\r\na/two;0\r\nb/three;10\r\n",
        "file\tclass\na/one\t2\n\na/two\t 0\nb/three\t10.0\n",
        '"file","class"\n"a/one","2"\n"a/two","0"\n"b/three","10"',
        "file,class\na\\one,2\na\\two,0\nb/three,10\n",
    ],
    ids=["byte order mark, semicolons, CRLF", "tabs, blank lines and blanks", "quotes", "backslashes"],
)
def test_forms_of_csv(images, tmp_path, text):
    opened = Opened(images, write(tmp_path, text), LABEL)
    assert opened.all() == {"a/one": 2, "a/two": 0, "b/three": 10}
    assert opened.source.classes is None and opened.source.label_range == (0, 10)


def test_a_quoted_cell_may_hold_line_breaks_and_separators(images, tmp_path):
    text = 'note,file,class\n"two\nlines, and; more",a/one,x\n"a ""word""",a/two,y\n,b/three,x\n'
    opened = Opened(images, write(tmp_path, text), LABEL, "data.labels_key=file", "data.labels_columns=[class]")
    assert opened.all() == {"a/one": 0, "a/two": 1, "b/three": 0}
    with pytest.raises(ConfigError, match=r"line 3, column 'class': 'x' is no finite number"):
        Opened(images, str(tmp_path / "labels.csv"), VALUES, "data.labels_key=file", "data.labels_columns=[class]")


def test_images_without_a_row_and_empty_cells_have_no_label(images, tmp_path):
    """Then data.on_bad_sample decides, as for any image without a label."""
    opened = Opened(images, write(tmp_path, "file,class\na/one,1\na/two,\n"), LABEL)
    assert opened.all() == {"a/one": 1, "a/two": None, "b/three": None} and opened.source.unlabelled == (2,)
    assert opened.said == [
        f"note: 2 of 3 images of data.shards have no label in {tmp_path}/labels.csv, 'b/three' among them"
    ]
    opened = Opened(images, write(tmp_path, "file,x,y\na/one,1,\na/two,,\nb/three,0.5,-2e3\n"), VALUES)
    found = opened.all()
    assert found["a/two"] is None and found["b/three"] == [0.5, -2000.0]
    assert found["a/one"][0] == 1 and math.isnan(found["a/one"][1])


def test_several_classes_in_a_cell(images, tmp_path):
    """An empty cell says that none applies; a class that is named twice applies once."""
    text = "file,classes\na/one,dog|cat|dog\na/two,\nb/three, cat |\n"
    opened = Opened(images, write(tmp_path, text), LABELS)
    assert opened.source.classes == ("cat", "dog")
    assert opened.all() == {"a/one": [1, 0], "a/two": [], "b/three": [0]} and sum(opened.source.unlabelled) == 0
    opened = Opened(images, write(tmp_path, text.replace("|", " ")), LABELS, "data.labels_separator=' '")
    assert opened.all() == {"a/one": [1, 0], "a/two": [], "b/three": [0]}


def test_a_column_for_each_class(images, tmp_path):
    """An empty cell is a class that is not known to apply, -1 - c; a row of such cells alone is no label."""
    text = "file,cat,dog\na/one,1,\na/two,0,True\nb/three,,\n"
    opened = Opened(images, write(tmp_path, text), LABELS)
    assert opened.source.classes == ("cat", "dog")
    assert opened.all() == {"a/one": [0, -2], "a/two": [1], "b/three": None} and opened.source.unlabelled == (1,)


def test_columns_of_a_model_with_other_classes_are_matched_by_name(images, tmp_path):
    """Of a class that is no column nothing is known; in lists of classes it is known not to apply."""
    path = write(tmp_path, "file,cat,dog\na/one,1,\na/two,0,1\nb/three,1,1\n")
    opened = Opened(images, path, LABELS)
    other = opened.source.relabelled([2, 0], ("dog", "bird", "cat"))
    assert {key: sorted(each) for key, each in opened.all(other).items()} == {
        "a/one": [-2, -1, 2], "a/two": [-2, 0], "b/three": [-2, 0, 2],
    }  # fmt: skip
    assert other.digest != opened.source.digest and other.classes == ("dog", "bird", "cat")
    opened = Opened(images, write(tmp_path, "file,classes\na/one,cat\na/two,\nb/three,dog|cat\n"), LABELS)
    other = opened.source.relabelled([2, 0], ("dog", "bird", "cat"))
    assert opened.all(other) == {"a/one": [2], "a/two": [], "b/three": [0, 2]}


def test_parquet_holds_numbers_lists_and_nulls(images, tmp_path):
    columns = {
        "key": ["b/three", "a/two", "a/one"], "size": [1.5, None, 3.0], "age": [7, 8, 9],
        "tags": [["x", "y"], [], None], "code": [3, 0, None],
    }  # fmt: skip
    path = str(tmp_path / "labels.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    opened = Opened(images, path, VALUES, "data.labels_columns=[age,size]")
    found = opened.all()
    assert found["b/three"] == [7, 1.5] and found["a/one"] == [9, 3] and math.isnan(found["a/two"][1])
    assert Opened(images, path, LABELS, "data.labels_columns=[tags]").all() == {
        "a/one": None, "a/two": [], "b/three": [0, 1],
    }  # fmt: skip
    assert Opened(images, path, LABEL, "data.labels_columns=[code]").all() == {"a/one": None, "a/two": 0, "b/three": 3}
    content = Path(path).read_bytes()
    write(tmp_path, content[:-20], "cut.parquet")
    with pytest.raises(ConfigError, match=r"data.labels \(.*cut.parquet\) is no whole Parquet file"):
        Opened(images, str(tmp_path / "cut.parquet"), VALUES)
    with pytest.raises(ConfigError, match="is a Parquet file; let its name end in .parquet"):
        Opened(images, write(tmp_path, content), VALUES)


@pytest.mark.parametrize("kind", [LABEL, LABELS])
def test_nan_beside_numbers_is_no_class(images, tmp_path, kind):
    """As a class of its own it would make names of all numbers, in another order than theirs."""
    opened = Opened(images, write(tmp_path, "file,class\na/one,10\na/two,NaN\nb/three,2\n"), kind)
    assert opened.source.classes is None and opened.source.label_range == (2, 10)
    assert opened.all()["a/two"] is None and sum(opened.source.unlabelled) == 1
    named = Opened(images, write(tmp_path, "file,class\na/one,roti\na/two,nan\nb/three,roti\n"), kind)
    assert named.source.classes == ("nan", "roti"), "a bread"


def test_parquet_of_other_programs(images, tmp_path):
    """Texts that are not called so, nan for null, dictionaries, decimals, nulls in lists, and keys that are floats."""
    keys = pyarrow.array([b"a/one.png", b"a/two.png", b"b/three.png"], pyarrow.binary())
    columns = {
        "key": keys,
        "bytes": pyarrow.array([b"dog", None, b"cat"], pyarrow.binary()),
        "float": pyarrow.array([3.0, math.nan, 0.0], pyarrow.float64(), from_pandas=False),
        "dictionary": pyarrow.array(["dog", None, "cat"]).dictionary_encode(),
        "decimal": pyarrow.array([3, None, 0], pyarrow.decimal128(6, 2)),
        "list": pyarrow.array([["dog", None], None, ["cat"]]),
        "list of bytes": pyarrow.array([[b"dog"], None, [b"cat"]], pyarrow.list_(pyarrow.binary())),
    }
    path = str(tmp_path / "labels.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    by_name, by_number = {"a/one": 1, "a/two": None, "b/three": 0}, {"a/one": 3, "a/two": None, "b/three": 0}
    for column, expected in (("bytes", by_name), ("float", by_number), ("dictionary", by_name), ("decimal", by_number)):
        opened = Opened(images, path, LABEL, f"data.labels_columns=[{column}]")
        assert opened.all() == expected, column
        assert opened.source.classes == (("cat", "dog") if expected is by_name else None)
    for column in ("list", "list of bytes"):
        opened = Opened(images, path, LABELS, f"data.labels_columns=['{column}']")
        assert opened.all() == {"a/one": [1], "a/two": None, "b/three": [0]} and opened.source.classes == ("cat", "dog")
    folder = tmp_path / "numbered"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    pyarrow.parquet.write_table(pyarrow.table({"key": [1.0, 0.0], "x": [5, 7]}), path)
    assert Opened(str(folder), path, VALUES).all() == {"0": [7], "1": [5]}
    pyarrow.parquet.write_table(pyarrow.table({"key": [1.0, math.nan], "x": [5, 7]}), path)
    with pytest.raises(ConfigError, match=r"row 2, column 'key' is empty; it names the image"):
        Opened(str(folder), path, VALUES)


REFUSED = {
    "twice": ("file,class\na/one,1\nb/three,2\na/one.png,1\n", r"line 4, column 'file': 'a/one.png' is in line 2"),
    "no key": ("file,class\na/one,1\n,2\n", r"line 3, column 'file' is empty; it names the image"),
    "ragged": ("file,class\na/one,1\na/two,1,2\n", r"line 3 has 3 cells, and the first line names 2 columns"),
    "open quote": ('file,class\n"a/one,1\n', r"line 2: unexpected end of data; mend the quotes"),
    "empty": ("", r"is empty; its first line names the columns"),
    "one column": ("file\na/one\n", r"names the images and none is left for labels; name them: data.labels_key"),
    "no match": ("file,class\nx/one,1\n", r"no row is of an image of data.shards: the images are called .* 'x/one'"),
    "no header": ("a/one.png,1\na/two.png,0\nb/three.png,1\n", r"its first line is of the image 'a/one'; put a line"),
    "two columns": ("file,class,age\na/one,1,2\n", r"has the columns class, age for one class of an image; name one"),
    "utf-16": ("file,class\na/one,1\n".encode("utf-16"), r"is UTF-16; save it as CSV in UTF-8"),
    "latin-1": ("file,class\na/one,\xe9\n".encode("latin-1"), r"is no UTF-8 text \(byte 17\); save it as CSV in UTF-8"),
    "huge": ("file,class\na/one,99999999999\n", r"column 'class': a class is a number below 2\^31, or a name"),
}  # fmt: skip


@pytest.mark.parametrize("text,error", REFUSED.values(), ids=REFUSED.keys())
def test_a_table_that_does_not_fit_is_refused(images, tmp_path, text, error):
    with pytest.raises(ConfigError, match=r"^data.labels \(.*labels.csv\).*" + error):
        Opened(images, write(tmp_path, text), LABEL)


def test_numbers_and_flags_that_are_none_are_named_with_their_line(images, tmp_path):
    path = write(tmp_path, "file;x;y\na/one;1;2\na/two;1,5;2\n")
    with pytest.raises(
        ConfigError, match=r"line 3, column 'x': '1,5' is no finite number; write decimals with a point"
    ):
        Opened(images, path, VALUES)
    with pytest.raises(ConfigError, match=r"line 3, column 'x': '1,5' is neither 0 nor 1 nor empty"):
        Opened(images, path, LABELS)
    with pytest.raises(ConfigError, match=r"line 2, column 'x': 'inf' is no finite number"):
        Opened(images, write(tmp_path, "file,x\na/one,inf\n"), VALUES)
    with pytest.raises(ConfigError, match=r"has no column 'z'; there are file, x"):
        Opened(images, path.replace("labels.csv", "labels.csv"), VALUES, "data.labels_columns=[z]")
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        Opened(images, str(tmp_path / "none.csv"), VALUES)


def test_evaluation_images_may_have_a_table_of_their_own(images, tmp_path):
    train, other = write(tmp_path, "file,x\na/one,1\n"), write(tmp_path, "file,x\na/one,2\n", "other.csv")
    for overrides, expected in (((), 1), ((f"data.eval_labels={other}",), 2)):
        opened = Opened(images, train, VALUES, *overrides, key="data.eval_shards")
        assert opened.all()["a/one"] == [expected]
    assert Opened(images, train, VALUES, f"data.eval_labels={other}").all()["a/one"] == [1]


def test_a_key_that_two_shards_have_is_refused(tmp_path):
    """Nobody knows of which one the row is."""
    for number in (0, 1):
        write_plain_tar(tmp_path / f"s-{number}.tar", [("one.png", image_bytes(number))])
    with pytest.raises(ConfigError, match="two images of data.shards have the key 'one'; rename one"):
        Opened(f"{tmp_path}/s-*.tar", write(tmp_path, "file,x\none,1\n"), VALUES)


def test_json_beside_the_images_of_shards(tmp_path):
    """Classes by number or by the names of classes.txt; null is a number that is not known."""
    members: list[tuple[str, bytes]] = []
    contents = [{"labels": ["dog", 0], "values": [1, None, 2.5]}, {"labels": [2]}, {"values": [1, True, 2]}]
    for number, content in enumerate(contents):
        members += [(f"{number}.png", image_bytes(number)), (f"{number}.json", json.dumps(content).encode())]
    write_plain_tar(tmp_path / "s-0.tar", members)
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    data = composed(["task=classify", "task.rand_augment=null", "run_dir=unused", "data.shards=unused"]).data

    def reader(kind: str, numbers: list[int] | None = None) -> Any:
        source = with_labels_of(open_source(f"{tmp_path}/s-*.tar"), "data.shards", data, kind, 3, print)
        if numbers is not None:
            source = source.relabelled(numbers, ("bird", "dog", "cat"))
        return source.open_reader()

    assert reader(LABELS).read(0, 0).targets["labels"].tolist() == [1, 0]
    assert reader(LABELS, [2, 1, 0]).read(0, 0).targets["labels"].tolist() == [1, 2]
    assert reader(LABELS, [2, 1, 0]).read(0, 1).targets["labels"].tolist() == [0]
    with pytest.raises(SampleError, match=r"'2': its .json has no list \"labels\""):
        reader(LABELS).read(0, 2)
    with pytest.raises(SampleError, match=r"'1': its .json has the class 2, which is none of the model's"):
        reader(LABELS, [2, 1, -1]).read(0, 1)
    np.testing.assert_array_equal(reader(VALUES).read(0, 0).targets["values"], [1, math.nan, 2.5])
    with pytest.raises(SampleError, match="has the value True, which is no number"):
        reader(VALUES).read(0, 2)


def test_a_source_without_such_labels_is_refused(images):
    data = composed(["task=classify", "task.rand_augment=null", "run_dir=unused", "data.shards=unused"]).data
    with pytest.raises(ConfigError, match=r"data.shards has no values, which task.target asks for; name a table"):
        with_labels_of(open_source(images), "data.shards", data, VALUES, 1, print)


def test_a_large_table_is_aligned_with_its_images_whatever_their_order():
    """Against a loop, for every kind."""
    from swinv2_train.data.sources.labels import Labels

    rng = np.random.default_rng(0)
    rows = [rng.integers(-4, 4, rng.integers(0, 4)).tolist() for _ in range(50)]
    places = rng.integers(-1, 50, 200)
    flat, ends = np.array(sum(rows, []), np.int32), np.cumsum([len(row) for row in rows])
    several = Labels(LABELS, flat, ends, np.zeros(50, bool), None).of(places)
    single = Labels(LABEL, np.arange(50)).of(places)
    values = Labels(VALUES, np.arange(100.0).reshape(50, 2)).of(places)
    for place, row in enumerate(places.tolist()):
        if row < 0:
            assert several.target(place) == single.target(place) == values.target(place) == {}
        else:
            assert several.target(place)["labels"].tolist() == rows[row]
            assert single.target(place)["label"] == row and values.target(place)["values"].tolist() == [
                2 * row,
                2 * row + 1,
            ]
