"""What a run leaves in the temporary folder: nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.processes import finished, forked_code

ALONE = """
import atexit, os, tempfile
tempfile.tempdir = None
for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
from swinv2_train.distributed import init_distributed, shutdown_distributed
init_distributed(60)
shutdown_distributed()
atexit._run_exitfuncs()
"""


def run(folder: Path, **environment: str) -> None:
    process = forked_code(
        ALONE, environment={"TMPDIR": str(folder), **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    done = finished(process)
    assert done.returncode == 0, done.stdout


def test_a_process_that_is_alone_leaves_no_store_behind(tmp_path: Path) -> None:
    """134 folders of one file each had gathered in a day."""
    run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written", [False, True])
def test_torchruns_log_folder_goes_when_it_is_empty(written: bool, tmp_path: Path) -> None:
    """torchrun makes it and forgets it; what ranks wrote there is the user's."""
    ours, other = (tmp_path / "torchelastic_abc" / "run" / "attempt_0" / rank for rank in ("0", "1"))
    for folder in (ours, other):
        folder.mkdir(parents=True)
        if written:
            (folder / "stdout.log").write_text("said")
    environment = {"TORCHELASTIC_ERROR_FILE": str(ours / "error.json")}
    run(tmp_path, **environment)
    assert ours.exists() is written and other.exists()
    run(tmp_path, TORCHELASTIC_ERROR_FILE=str(other / "error.json"))
    assert (list(tmp_path.iterdir()) == []) is not written
