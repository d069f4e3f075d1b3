"""Every way to start ranks on one machine, with paths that shells and grammars take apart."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from swinv2_train.runtime import read_environment
from tests.support.commands import command, losses
from tests.support.shard_files import ODD_NAME

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_torchrun_sh_trains_under_any_name_and_ends_as_its_ranks_do(python, shards, tmp_path):
    """Data and run lie in a folder with a space, quotes, =, (, ~, &, a line break and the like in its name.

    Then wrong input: exit code 2, and one line where torchrun has thirty.
    """
    folder = tmp_path / ODD_NAME
    (folder / "shards").mkdir(parents=True)
    for path in Path(shards[0].partition("=")[2]).parent.glob("train*"):
        shutil.copy(path, folder / "shards")
    data = (f"data.shards={folder}/shards/train-*.tar", "data.eval_shards=null")
    launch = str(ROOT / "launch" / "torchrun.sh")
    words = (launch, *command(folder / "run", *data, "train.max_steps=1"))
    done = run(*words, NPROC_PER_NODE="1", PYTHON=python)
    assert done.returncode == EXIT_DONE, done.stderr
    assert list(losses(folder / "run")) == [1] and (folder / "run" / "report.html").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["run", "shards"]
    done = run(*words, "optim.lr=-1", NPROC_PER_NODE="2", PYTHON=python)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.startswith("error: optim.lr") and done.stderr.count("\n") == 1, done.stderr


def test_a_run_goes_on_under_other_launchers(python, shards, tmp_path):
    """deepspeed's own, and torch's by its old name; both add words of their own to the command."""
    deepspeed = (python, "-c", "from deepspeed.launcher.runner import main; main()", "--num_gpus", "2")
    torch = (python, "-m", "torch.distributed.launch", "--nproc-per-node", "2")
    for steps, launcher in ((1, deepspeed), (2, torch)):
        words = command(tmp_path / "run", *shards, f"train.max_steps={steps}")
        done = run(*launcher, "--module", "swinv2_train.train", *words)
        assert done.returncode == EXIT_DONE, done.stdout + done.stderr
        assert list(losses(tmp_path / "run")) == list(range(1, steps + 1))
    assert [start["world_size"] for start in read_environment(tmp_path / "run")] == [2, 2]
