"""A source's labels in a model's numbering: by name where both have names, and never in silence otherwise."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.shards.transfers import RetryPolicy
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.sources.matched import check_pixel_classes, matched
from tests.support.images import image_bytes
from tests.support.shard_server import serve

MODEL = ("ant", "bee", "cat", "dog")


def folder(path: Path, *classes: str, empty: tuple[str, ...] = ()) -> Source:
    """Two images a class."""
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(2):
            (path / name / f"{number}.png").write_bytes(image_bytes(number))
    for name in empty:
        (path / name).mkdir(parents=True)
    return open_source(str(path))


def shards(path: Path, names: tuple[str, ...] | None, labels: tuple[int, ...]) -> Source:
    path.mkdir(parents=True, exist_ok=True)
    if names is not None:
        (path / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    rows = [(f"k{number}_{label}", image_bytes(number), "png", label) for number, label in enumerate(labels)]
    write_shards(rows, str(path / "t"), 2)
    return open_manifest(f"{path}/t-*.tar")


def read(source: Source) -> dict[str, int | None]:
    """Each sample's label as a reader in another process gives it."""
    reader = pickle.loads(pickle.dumps(source)).open_reader()
    samples = [reader.read(shard, i) for shard, count in enumerate(source.counts) for i in range(count)]
    return {sample.key: sample.targets.get("label") for sample in samples}


def match(source: Source, names: tuple[str, ...] | None = MODEL, count: int | None = 4) -> tuple[Source, list[str]]:
    said: list[str] = []
    return matched(source, "data.eval_shards", names, count, "the model's classes", said.append), said


def test_a_folder_that_lacks_a_class_keeps_the_numbers_of_the_others(tmp_path):
    """The report: 100 % on the validation images and 0 % on a test folder without the first class."""
    source, said = match(folder(tmp_path / "t", "bee", "dog"))
    assert read(source) == {"bee/0": 1, "bee/1": 1, "dog/0": 3, "dog/1": 3} and said == []
    assert (source.classes, source.label_range, source.unlabelled) == (MODEL, (1, 3), (0,))


def test_shards_in_another_order_get_the_models_numbers(tmp_path):
    """Also twice: the probe takes what the evaluation has opened."""
    source, said = match(shards(tmp_path / "t", ("dog", "cat", "ant"), (0, 1, 2, 0)))
    assert read(source) == {"k0_0": 3, "k1_1": 2, "k2_2": 0, "k3_0": 3} and said == []
    assert source.label_range == (0, 3) and source.used_labels == {0, 2, 3}
    again, _ = match(source, ("cat", "dog", "ant", "bee"))
    assert read(again) == {"k0_0": 1, "k1_1": 0, "k2_2": 2, "k3_0": 1}
    assert again.digest == source.digest


def test_the_same_classes_are_left_as_they_are(tmp_path):
    source = folder(tmp_path / "t", *MODEL)
    assert match(source)[0] is source
    fewer = shards(tmp_path / "f", MODEL[:2], (0, 1))
    assert match(fewer)[0].classes == MODEL and read(match(fewer)[0]) == read(fewer)


def test_an_unknown_class_is_refused_and_named(tmp_path):
    """But one without images is none."""
    with pytest.raises(ShardError, match=r"data.eval_shards has 2 classes that are none of the model's classes "
                       r"\(cow, eel\); there are ant, bee, cat, dog"):  # fmt: skip
        match(folder(tmp_path / "a", "bee", "cow", "eel"))
    with pytest.raises(ShardError, match=r"none of the model's classes \(cow\)"):
        match(shards(tmp_path / "b", ("ant", "cow"), (0, 1)))
    assert read(match(folder(tmp_path / "c", "bee", empty=("cow",)))[0]) == {"bee/0": 1, "bee/1": 1}
    assert read(match(shards(tmp_path / "d", ("ant", "bee", "cow", "dog"), (0, 3, 1, 1)))[0])["k1_3"] == 3


def test_where_a_side_has_no_names_the_numbers_are_taken_and_one_line_says_so(tmp_path):
    unnamed = shards(tmp_path / "a", None, (0, 3))
    source, said = match(unnamed)
    assert source is unnamed and len(said) == 1
    assert "data.eval_shards names no classes: its labels 0..3 are taken" in said[0]
    assert match(unnamed, None)[0] is unnamed
    named = folder(tmp_path / "b", "x", "y")
    source, said = match(named, None)
    taken = "the model's classes have no names: those of data.eval_shards (x, y) are taken as their numbers, in order"
    assert source is named and said == [
        f"warning: {taken}, which is wrong unless the last of the 4 are those that are not among these 2"
    ]
    assert match(named, None, 2)[1] == [f"note: {taken}"]
    flat = open_source(str(tmp_path / "b" / "x"))
    assert match(flat) == (flat, [])


def test_folders_called_by_numbers_are_the_classes_of_these_numbers(tmp_path):
    """ImageNet-V2 has folders 0 to 999, whatever the model calls its classes; a part of it lacks some."""
    source, said = match(folder(tmp_path / "t", "0", "2", "11"), None, 12)
    assert set(read(source).values()) == {0, 2, 11} and read(source)["11/0"] == 11
    assert len(said) == 1 and "calls its classes by numbers (0, 2, 11)" in said[0]
    words = tuple(f"w{number:02d}" for number in range(12))
    assert read(match(open_source(str(tmp_path / "t")), words, 12)[0])["11/0"] == 11
    numbers = tuple(map(str, range(12)))  # a model that was trained on such folders
    assert read(match(open_source(str(tmp_path / "t")), numbers, 12)[0])["2/0"] == 2
    with pytest.raises(ShardError, match="its class folders are numbers, and 11 is none of the 4 of the model's"):
        match(open_source(str(tmp_path / "t")), MODEL)
    with pytest.raises(ShardError, match=r"none of the model's classes \(11\)"):
        match(open_source(str(tmp_path / "t")), numbers[:5], 5)
    from_one = match(folder(tmp_path / "one", "1", "2", "3"), None, 3)[0]
    assert read(from_one)["3/0"] == 2
    (said,) = match(open_source(str(tmp_path / "one")))[1]  # of four classes the last may be missing, or the first
    assert said.startswith("warning") and "of which 0 is the first: rename the folders where they count from 1" in said


def test_imagenets_folders_meet_models_that_say_it_in_words(tmp_path):
    """Published weights call n01440764 "tench, Tinca tinca": all of them are the same classes in the same order."""
    source = folder(tmp_path / "t", "n01440764", "n01443537")
    found, said = match(source, ("tench", "goldfish"), 2)
    assert read(found)["n01443537/0"] == 1 and "have other names" in said[0]
    with pytest.raises(ShardError, match="none of the model's classes"):
        match(source, ("tench", "goldfish", "shark"), 3)


def test_unicode_forms_of_one_name_are_one_class(tmp_path):
    """A model trained on Linux, images copied by a Mac."""
    source, said = match(folder(tmp_path / "t", "e\u0301te\u0301", "zoo"), ("\u00e9t\u00e9", "a", "zoo"), 3)
    assert set(read(source).values()) == {0, 2} and said == []
    both = folder(tmp_path / "b", "e\u0301", "\u00e9")
    assert both.classes == ("\u00e9",) and set(read(both).values()) == {0}


@pytest.mark.parametrize("theirs", [("bee", "ant"), ("ant", "cow"), ("Ant",)])
def test_label_images_of_other_classes_are_refused(theirs):
    """A model that is right on masks whose list has two names exchanged was scored as wrong, without a word."""
    with pytest.raises(ShardError, match=r"data.eval_shards calls class . of its pixels or objects '\w+', which is '"):
        check_pixel_classes(theirs, MODEL, "data.eval_shards", "the model's classes")


def test_label_images_of_fewer_classes_or_without_names_are_taken():
    for theirs, names in ((MODEL[:2], MODEL), (MODEL, MODEL[:2]), (None, MODEL), (MODEL, None)):
        check_pixel_classes(theirs, names, "data.eval_shards", "the model's classes")


def test_an_empty_class_folder_is_a_class_and_said(tmp_path):
    """It is in a model's list, so that a later split with images of it keeps its meaning."""
    folder(tmp_path / "t", "a", "c", empty=("b", "@eaDir", ".cache"))
    said: list[str] = []
    source = open_source(str(tmp_path / "t"), progress=said.append)
    assert source.classes == ("a", "b", "c") and source.used_labels == {0, 2}
    (line,) = [each for each in said if each.startswith("warning")]
    assert "no image in the class folders b; they count as classes" in line


def test_shards_of_several_folders_name_the_same_classes(tmp_path):
    shards(tmp_path / "a", ("x", "y"), (0, 1))
    shards(tmp_path / "b", ("y", "x"), (0, 1))
    shards(tmp_path / "c", None, (0, 1))
    pattern = "::".join(f"{tmp_path}/{name}/t-*.tar" for name in "ab")
    for other, message in (
        ("b", r"a/classes.txt and .*b/classes.txt name other classes"),
        ("c", r"a/classes.txt names the classes, but there is no .*c/classes.txt"),
    ):
        source = open_manifest(pattern.replace("/b/", f"/{other}/"))
        assert source.num_samples == 4  # who needs no names, as SimMIM, is served
        with pytest.raises(ShardError, match=message):
            match(source)


def test_a_list_that_is_too_short_for_the_labels_is_refused(tmp_path):
    """It is the list of other shards."""
    with pytest.raises(ShardError, match=r"classes.txt names 2 classes, but data.shards has labels up to 2"):
        match(shards(tmp_path / "a", ("x", "y"), (0, 2)))


def test_names_come_along_from_an_address(tmp_path):
    """classes.txt lies beside the shards there too; a bucket without one has numbers."""
    shards(tmp_path / "there", ("dog", "ant"), (0, 1))
    cache = ShardCache(str(tmp_path / "cache"), 2**20, RetryPolicy(stall_sec=5.0, give_up_sec=5.0))
    with serve(tmp_path / "there") as server:
        names = json.loads((tmp_path / "there" / "manifest.json").read_text())["shards"]
        source, said = match(open_manifest("::".join(f"{server.url}/{name}" for name in names), cache=cache))
        assert read(source) == {"k0_0": 3, "k1_1": 0} and said == []
        (tmp_path / "there" / "classes.txt").unlink()
        assert open_manifest("::".join(f"{server.url}/{name}" for name in names), cache=cache).classes is None
