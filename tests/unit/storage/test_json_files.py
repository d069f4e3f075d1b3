"""JSON that anybody may have written: bounded, checked, and refused in one message."""

from __future__ import annotations

import json
import os
import time

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.storage.json_files import (
    choice,
    file_name,
    flag,
    listing,
    mapping,
    number,
    optional,
    parse_json,
    read_json,
    record,
    row,
    text,
    whole,
)

SHAPE = record(
    {"step": whole(), "files": mapping(record({"bytes": whole()}), names=file_name())},
    may={"loss": optional(number()), "state": choice("running", "done"), "pair": row(whole(), flag()),
         "names": listing(text(5), most=3)},
)  # fmt: skip


def test_what_has_the_shape_is_given_as_it_is(tmp_path):
    """What a later version adds is not looked at."""
    value = {"step": 3, "files": {"a/b": {"bytes": 1}}, "loss": None, "state": "done", "pair": [1, True], "new": [{}]}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json", 1000, SHAPE) == value


WRONG = {
    "{": "cannot be read",
    "": "cannot be read",
    "[" * 100_000: "cannot be read",
    '{"step": ' + "9" * 5000 + "}": "cannot be read",
    "[1]": r"the content \(a list of 1 values\) must be an object",
    "null": r"the content \(null\) must be an object",
    "{}": "step is missing",
    '{"step": -1}': r"step \(-1\) must be a whole number from 0",
    '{"step": true}': r"step \(true\) must be a whole number",
    '{"step": 1.5}': r"step \(1.5\) must be a whole number",
    '{"step": "1"}': "step",
    '{"step": 1e400}': r"step \(Infinity\)",
    '{"step": ' + "9" * 1000 + "}": r"step \(a number of 3,322 bits\)",
    '{"step": 1, "files": []}': r"files \(a list of 0 values\) must be an object",
    '{"step": 1, "files": {"../x": {"bytes": 1}}}': "the name files.../x",
    '{"step": 1, "files": {"/etc/passwd": {"bytes": 1}}}': "the name of a file beside it",
    '{"step": 1, "files": {"a/../../b": {"bytes": 1}}}': "the name of a file beside it",
    '{"step": 1, "files": {"a\\u0000": {"bytes": 1}}}': "the name of a file beside it",
    '{"step": 1, "files": {"' + "x" * 5000 + '": {"bytes": 1}}}': "the name of a file beside it",
    '{"step": 1, "files": {"a": {}}}': "files.a.bytes is missing",
    '{"step": 1, "files": {}, "loss": NaN}': r"loss \(NaN\) must be a number",
    '{"step": 1, "files": {}, "state": "owned"}': r'state \("owned"\) must be one of running, done',
    '{"step": 1, "files": {}, "state": []}': "state",
    '{"step": 1, "files": {}, "pair": [1]}': "pair .* must be a list of 2 values",
    '{"step": 1, "files": {}, "pair": [1, 1]}': r"pair\[1\] \(1\) must be true or false",
    '{"step": 1, "files": {}, "names": ["a", "b", "c", "d"]}': "names .* must be a list of 0 to 3 values",
    '{"step": 1, "files": {}, "names": ["aaaaaaaaaa"]}': r"names\[0\] .* must be text of at most 5 characters",
    '{"step": 1, "files": {}, "names": ["\\u001b[2J"]}': None,
}


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
def test_what_has_another_shape_is_refused_by_file_place_and_value(tmp_path, content):
    if WRONG[content] is None:
        assert parse_json(content, "x", SHAPE)["names"] == ["\x1b[2J"]
        return
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"x.json: .*{WRONG[content]}.*; fetch it again") as caught:
        read_json(tmp_path / "x.json", 10**6, SHAPE, "fetch it again")
    assert len(str(caught.value)) < 600


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    """A fifo would be waited for, /dev/zero read for ever, a sparse file of a terabyte fill the memory."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    started = time.process_time()
    for name, match in (("fifo", "no regular file"), ("zero", "no regular file"), ("sparse", "more than 1,000 bytes")):
        with pytest.raises(ConfigError, match=match):
            read_json(tmp_path / name, 1000, SHAPE)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing", 1000, SHAPE)
    assert time.process_time() - started < 1
