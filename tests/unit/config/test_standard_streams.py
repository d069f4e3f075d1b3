"""A command that was started without standard streams (cron, a daemon, `>&-`) works, and writes into no other file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from swinv2_train.config.standard_streams import hold_standard_streams
from tests.support.processes import finished, forked


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_held_open(tmp_path, closed):
    """The first word on stdout ended a training; with stderr closed it would have gone into the next file opened."""

    def body() -> None:
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        hold_standard_streams()
        with open(tmp_path / "file", "w") as file:
            assert file.fileno() > 2
            print("words", flush=True)
            print("words", file=sys.stderr, flush=True)
            os.write(1, b"of a library")
            os.write(2, b"of a library")
            assert sys.stdin.read() == ""
        (tmp_path / "done").touch()

    assert finished(forked(body, stdin=-3)).returncode == 0
    assert (tmp_path / "done").exists() and Path(tmp_path / "file").read_text() == ""
