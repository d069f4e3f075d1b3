"""Files that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.storage.atomic import replace_text, replacing, replacing_output


def test_a_file_has_its_name_only_when_it_is_complete_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before the rename leaves what was there."""
    path, seen = tmp_path / "file.bin", []
    path.write_bytes(b"old")
    flush = os.fsync

    def watched(descriptor: int) -> None:
        seen.append(path.read_bytes())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with replacing(path) as file:
        file.write(b"new")
    assert (seen, path.read_bytes()) == ([b"old"], b"new")
    replace_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert [each.name for each in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("write", [replacing, replacing_output])
def test_what_fails_is_gone_again(tmp_path: Path, write: Any) -> None:
    """On a full disk it would take the space of the next attempt."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="mine"), write(path) as file:
        file.write(b"half")
        raise RuntimeError("mine")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.bin"]


def test_an_output_s_folders_come_and_go_with_it_and_a_refusal_names_the_path(tmp_path: Path) -> None:
    """A user has named the path; what a program has named fails as the system says."""
    with pytest.raises(OSError, match="No such file"), replacing(tmp_path / "new" / "file.bin"):
        pass
    with pytest.raises(RuntimeError), replacing_output(tmp_path / "new" / "deep" / "file.bin"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder" / "file.bin").mkdir(parents=True)
    refused = pytest.raises(ConfigError, match=r"file\.bin: cannot be written \(Is a directory\); choose another path")
    with refused, replacing_output(tmp_path / "folder" / "file.bin") as file:
        file.write(b"new")
