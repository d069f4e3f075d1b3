"""Which folders are classes, their order, and the list beside shards."""

from __future__ import annotations

import pytest

from swinv2_train.data.class_names import (
    class_names_text,
    in_order,
    is_left_out,
    listed,
    read_class_names,
    read_run_classes,
)
from swinv2_train.data.sample import ShardError


def test_numbers_are_ordered_as_numbers_and_forms_of_one_name_are_one_class():
    """ImageNet-V2's folders are 0 to 999; macOS writes é as two characters, other systems as one."""
    assert in_order(["10", "9", "11", "0"]) == ("0", "9", "10", "11")
    assert in_order(["b", "10", "a", "2", "n01"]) == ("2", "10", "a", "b", "n01")
    assert in_order(["cafe\u0301", "caf\u00e9", "bar"]) == ("bar", "caf\u00e9")
    assert in_order(["Z", "a"]) == ("Z", "a")
    assert in_order(["1", "01", "\u00b2", "9" * 5000])[:2] == ("01", "1")  # ² is no number, and nothing is too long


@pytest.mark.parametrize(
    "name",
    ["@eaDir", ".AppleDouble", "__MACOSX", "lost+found", "#recycle", "$RECYCLE.BIN", ".ipynb_checkpoints", ".git",
     "System Volume Information", "@Recycle", "#snapshot", "._a.jpg"],
)  # fmt: skip
def test_what_storage_boxes_and_systems_leave_is_no_class(name):
    assert is_left_out(name)


@pytest.mark.parametrize("name", ["recycle", "found", "cat", "#1", "@home", "$5", "snapshot"])
def test_what_a_user_named_is_kept(name):
    assert not is_left_out(name)


def test_a_list_beside_shards_is_read_as_it_was_written(tmp_path):
    names = ("a b", "caf\u00e9", "d\udcff", "\u2028x", "#1")
    path = tmp_path / "classes.txt"
    assert read_class_names(path) is None
    path.write_text(class_names_text(names), "utf-8", "surrogateescape")
    assert read_class_names(path) == names
    path.write_bytes(b"\xef\xbb\xbfcat\r\ndog")  # an editor of another system
    assert read_class_names(path) == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [("cat\ndog\ncat\n", "lists 'cat' twice"), ("cat\n\ndog\n", "has an empty line"), ("", "has an empty line")],
)
def test_a_list_that_cannot_be_one_is_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(ShardError, match=rf"classes.txt {message}; it is a list of the classes' names"):
        read_class_names(tmp_path / "classes.txt")


def test_names_are_shown_without_control_characters_and_not_at_length():
    """A name may be any text that somebody else chose."""
    assert listed(["a\x1b[31m\n"]) == r"a\x1b[31m\n" and len(listed(["x" * 10**6])) <= 60
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_a_runs_list_that_cannot_be_read_is_none(tmp_path):
    assert read_run_classes(tmp_path) == []
    for content in ("[1]", "{", '"ab"', "[" * 10**5):
        (tmp_path / "classes.json").write_text(content)
        assert read_run_classes(tmp_path) == []
