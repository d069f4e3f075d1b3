"""A machine that has next to nothing: no home, no name for the user, few files, closed streams."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config.exit_codes import EXIT_DONE
from tests.support.commands import command

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
UNKNOWN_USER = ("unshare", "--user", "--map-user=54321")


def may_be_unknown() -> bool:
    """Whether a process may get a number of a user that the system does not know."""
    return shutil.which("unshare") is not None and subprocess.run([*UNKNOWN_USER, "true"], check=False).returncode == 0


@pytest.mark.parametrize("home", [None, "/proc"], ids=["no home", "a home that is read-only"])
def test_a_run_needs_no_home_no_name_no_streams_and_few_files(home, shards, tmp_path):
    """As in many containers and batch systems.  Real interpreters: packages look for homes when they are imported.

    A user that the system does not know (HOME unset, so that nobody knows a home either), 64 open files, stdin, stdout
    and stderr closed, a temporary folder that cannot be written: the run is whole.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HOME", "TMP"))}
    environment |= {"TMPDIR": "/proc"} | ({} if home is None else {"HOME": home})
    unknown = " ".join(UNKNOWN_USER) if home is None and may_be_unknown() else ""
    words = command(tmp_path / "run", *shards, "train.max_steps=2", "data.num_workers=2")
    script = f'ulimit -n 64; exec {unknown} "$@" <&- >&- 2>&-'
    train = ["bash", "-c", script, "bash", sys.executable, "-m", "swinv2_train.train", *words]
    done = subprocess.run(train, cwd=ROOT, env=environment, timeout=240, check=False)
    log = "".join(path.read_text() for path in sorted((tmp_path / "run" / "logs").glob("*")))
    assert done.returncode == EXIT_DONE, log
    assert newest_checkpoint(tmp_path / "run") is not None and (tmp_path / "run" / "report.html").exists()
    assert "Traceback" not in log, log
