"""Lists of clips or images with labels: read as a folder is, in the order of packing; what they lack is said."""

from __future__ import annotations

import pytest

from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.virtual_shards import packing_order
from tests.support.clips import frames_file


@pytest.fixture
def listed(tmp_path):
    """Six clips below two folders, and what writes a list of them: its path."""
    for number in range(6):
        path = tmp_path / "videos" / f"{'ab'[number % 2]} c" / f"{number}.frames"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(frames_file(2, first=number))

    def write(text: str, name: str = "train.txt") -> str:
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / "lists" / name).write_text(text)
        return str(tmp_path / "lists" / name)

    return write


def lines(between: str = " ", root: str = "../videos") -> str:
    return "".join(f"{root}/{'ab'[number % 2]} c/{number}.frames{between}{number % 3}\n" for number in range(6))


@pytest.mark.parametrize("between", [" ", "\t", "   "], ids=["space", "tab", "spaces"])
def test_files_and_labels_are_those_of_the_lines(listed, between):
    """Paths with spaces and from the list's folder on, in the order in which they would be packed."""
    source = open_source(listed(lines(between)))
    assert source.counts == source.clips == (6,) and source.unlabelled == (0,) and source.label_range == (0, 2)
    reader = source.open_reader()
    for index, number in enumerate(packing_order(6)):
        sample = reader.read(0, index)
        assert sample.image == frames_file(2, first=number) and sample.targets == {"label": number % 3}
        assert sample.key == f"{'ab'[number % 2]} c/{number}" and sample.extension == "frames"


def test_commas_and_absolute_paths_are_read(listed, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(3):
        (plain / f"{number}.frames").write_bytes(frames_file(2, first=number))
    text = "".join(f"{plain}/{number}.frames,{number}\n" for number in range(3))
    one, two = open_source(listed(text, "a.csv")), open_source(listed(text.replace(",", " "), "b.txt"))
    assert one.digest == two.digest and one.num_samples == 3
    assert open_source(listed(text.replace(",2", ",1"), "c.csv")).digest != one.digest


def test_a_missing_file_is_said_and_is_damage(listed):
    said: list[str] = []
    source = open_source(listed(lines() + "../videos/gone.frames 1\n"), progress=said.append)
    assert len(said) == 1 and "1 of its 7 files are not there, such as" in said[0] and "gone.frames" in said[0]
    reader, missing = source.open_reader(), packing_order(7).index(6)
    with pytest.raises(SampleError, match="sample 'gone': no such file"):
        reader.read(0, missing)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no file; it must hold lines 'path label'"),
        ("a.frames\n", r"line 1 .a.frames. is not 'path label'"),
        ("a.frames b\n", r"line 1 .a.frames b. is not 'path label'"),
        ("a.frames -1\n", "is not 'path label'"),
        ("x y\n\na.doc 1\n", "line 1"),
        ("a.doc 1\n", r"a.doc, which is neither an image nor a clip by its ending .\.doc"),
        ("a.frames 1\nb.jpg 1\n", "names 1 clips and 1 images; a list is of one kind"),
        ("a.frames 1\n", "none of its 1 files is there, such as"),
    ],
)
def test_what_is_no_list_is_refused(listed, text, said):
    with pytest.raises(ShardError, match=said):
        open_source(listed(text))


def test_a_file_that_is_named_twice_is_refused(listed):
    with pytest.raises(ShardError, match="two images have the name"):
        open_source(listed(lines() + lines().splitlines()[0]))


def test_keys_of_shards_and_folders_are_refused(listed):
    path = listed(lines())
    with pytest.raises(ShardError, match=r"data.verify \(True\) is of shards or folders.*set data.verify=false"):
        open_source(path, verify=True)
    with pytest.raises(ShardError, match=r"data.image_member \(mp4\) is of shards or folders"):
        open_source(path, image_member="mp4")
