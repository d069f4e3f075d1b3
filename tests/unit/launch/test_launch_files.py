"""The launch files without a scheduler; tests/slurm runs them under a real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.config.load import known_keys
from tests.support.shard_files import ODD_NAME

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "launch").iterdir())
AS_TASK = 'while [[ "$1" == --* ]]; do shift; done; "$@"'
"""The command that srun is given, without srun's own options."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_launch_files_hold_no_value_of_the_training(path):
    """Every one comes from conf/ or the command line; run_dir is named here, because a job must know it."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    keys = "|".join(re.escape(key) for key in known_keys() if key != "run_dir")
    groups = "|".join(folder.name for folder in conf_dir().iterdir() if folder.is_dir())
    assert [line for line in lines if re.search(rf"(?<![\w.-])({keys}|{groups})=", line)] == []
    assert subprocess.run(["bash", "-n", path]).returncode == 0 and os.access(path, os.X_OK)


def test_a_copy_of_the_code_knows_its_commit(tmp_path):
    """launch/train.sbatch runs a copy in the run directory; environment.json still names what it was copied from."""
    shutil.copytree(ROOT / "swinv2_train", tmp_path / "swinv2_train", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "commit.txt").write_text("4" * 40 + "\n")
    for changes in ("", "diff --git a b\n"):
        (tmp_path / "changes.patch").write_text(changes)
        command = "import json; from swinv2_train.runtime import git_commit; print(json.dumps(git_commit()))"
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
        output = subprocess.check_output([sys.executable, "-c", command], env=environment, text=True)
        assert json.loads(output) == {"commit": "4" * 40, "dirty": bool(changes)}


def test_torchrun_is_started_for_one_machine_and_for_several(tmp_path):
    """The command that launch/torchrun.sh becomes, printed by a stand-in for Python."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    python.chmod(0o755)

    def words(**variables: str) -> list[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
        command = [ROOT / "launch" / "torchrun.sh", "data.shards='a b/{0..3}.tar'", "optim.betas=[0.9, 0.95]"]
        return subprocess.check_output(command, env=environment, text=True).splitlines()

    alone = words(NPROC_PER_NODE="8")
    assert alone[:5] == ["-m", "swinv2_train.monitoring.torchrun", "--standalone", "--nproc-per-node", "8"]
    assert alone[-3:] == ["swinv2_train.train", "data.shards='a b/{0..3}.tar'", "optim.betas=[0.9, 0.95]"]
    several = " ".join(words(NNODES="4", NODE_RANK="3", MASTER_ADDR="node1", MAX_RESTARTS="2"))
    assert "--nnodes 4 --node-rank 3 --master-addr node1 --master-port 29500" in several
    assert "--max-restarts 2" in several and "SIGUSR1" in several


def test_memory_of_a_card_grows_in_place_unless_the_user_says_otherwise(job, tmp_path):
    """What reaches the tasks; a user's own setting stays, by its old name too."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTORCH_ALLOC_CONF"\n')
    python.chmod(0o755)
    for own, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:99"}, "max_split_size_mb:99"),
    ):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "NPROC_PER_NODE": "1", **own}
        said = subprocess.check_output([ROOT / "launch" / "torchrun.sh"], env=environment, text=True)
        assert said.strip() == expected
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\necho "$PYTORCH_ALLOC_CONF" > "{tmp_path}/seen"\n')
    job(AS_TASK)
    assert (tmp_path / "seen").read_text().strip() == "expandable_segments:True"


@pytest.mark.parametrize(
    ("visible", "processes"),
    [("0", 1), ("2,3,5", 3), ("GPU-8932f937,MIG-f2a4", 2), ("", 1), ("-1", 1), ("NoDevFiles", 1), ("0,-1,2", 1)],
)
def test_torchrun_starts_a_process_for_every_gpu_that_is_shown(visible, processes, tmp_path):
    """And not for those that the machine has: ranks without one of their own would be refused."""
    for name, text in {"python": 'echo "$@"', "nvidia-smi": "seq -f 'GPU %g: NVIDIA' 0 7"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def started(**variables: str) -> str:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), **variables}
        return subprocess.check_output([ROOT / "launch" / "torchrun.sh"], env=environment, text=True)

    assert f"--nproc-per-node {processes} " in started(CUDA_VISIBLE_DEVICES=visible)
    assert "--nproc-per-node 8 " in started()
    assert "--nproc-per-node 4 " in started(CUDA_VISIBLE_DEVICES=visible, NPROC_PER_NODE="4")


def test_kernels_are_compiled_on_a_disk_of_the_node(tmp_path):
    """By torchrun.sh and, under srun, by every task; what is set stays, and nobody else's folder is used."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$TRITON_CACHE_DIR $TORCHINDUCTOR_CACHE_DIR"\n')
    python.chmod(0o755)

    def folders(**variables: str) -> list[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
        return subprocess.check_output([ROOT / "launch" / "torchrun.sh"], env=environment, text=True).split()

    own = tmp_path / f"swinv2-{os.getuid()}"
    assert folders(TMPDIR="/nowhere", SLURM_TMPDIR=str(tmp_path)) == [f"{own}/triton", f"{own}/inductor"]
    assert own.stat().st_mode & 0o777 == 0o700
    assert folders(TMPDIR=str(tmp_path), TRITON_CACHE_DIR="/mine") == ["/mine", f"{own}/inductor"]
    assert folders(TMPDIR="/proc/nowhere") == []
    own.rmdir()
    own.symlink_to("/usr")
    assert folders(TMPDIR=str(tmp_path)) == []


@pytest.fixture
def job(tmp_path) -> Callable[..., tuple[bool, int]]:
    """job(TASK, overrides...): train.sbatch itself, with stand-ins for srun and scontrol; requeued?, exit code."""
    for folder in ("swinv2_train", "conf", "run", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')

    def run(task: str, *overrides: str, **variables: str) -> tuple[bool, int]:
        (tmp_path / "bin" / "srun").write_text(f'#!/bin/bash\necho "$@" > started\n({task})\nexit $?\n')
        for program in (tmp_path / "bin").iterdir():
            program.chmod(0o755)
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "swinv2",
            "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "SLURM_CPUS_ON_NODE": "1", **variables,
        }  # fmt: skip
        (tmp_path / "requeued").unlink(missing_ok=True)
        named = any(override.startswith("run_dir=") for override in overrides)
        command = [ROOT / "launch" / "train.sbatch", *([] if named else ["run_dir=run"]), *overrides]
        done = subprocess.run(command, cwd=tmp_path, env=environment)
        return (tmp_path / "requeued").exists(), done.returncode

    return run


@pytest.mark.parametrize(
    ("task", "goes_on"),
    [
        ("exit 0", False),
        ("exit 1", False),
        ("exit 2", False),
        ("exit 3", True),
        ("kill -USR1 $$", True),
        ("kill -TERM $$", True),
        ("mkdir -p run/checkpoints/step_00000007; exit 1", True),
        ("mkdir -p run/checkpoints/step_00000007; exit 2", False),
        ("""sleep 0.1; echo '{"state": "stopped"}' > run/status.json; exit 1""", True),
        ("""echo '{"state": "stopped"}' > run/status.json; touch -d '1 hour ago' run/status.json; exit 1""", False),
        ("""sleep 0.1; echo '{"state": "failed", "outage": true}' > run/status.json; exit 1""", True),
        ("""sleep 0.1; echo '{"state": "failed", "outage": false}' > run/status.json; exit 1""", False),
    ],
)
def test_a_job_goes_on_after_a_stop_and_after_progress_alone(task, goes_on, job):
    """What it makes of each end of its tasks."""
    requeued, code = job(task)
    assert requeued is goes_on and (code == 0) is (task == "exit 0")


def test_five_starts_without_a_checkpoint_are_enough(job):
    """A time limit shorter than a start takes would requeue for ever; a checkpoint begins the count again."""
    assert [job("exit 3")[0] for _ in range(3)] == [True] * 3
    assert job("mkdir -p run/checkpoints/step_00000007; exit 3")[0]
    assert [job("kill -USR1 $$")[0] for _ in range(5)] == [True] * 4 + [False]


def test_a_restart_keeps_its_overrides(job, tmp_path):
    """Also where the file of a sweep has changed meanwhile."""
    job("exit 3", "optim.lr=0.1", "data.shards='a b/{0..3}.tar'")
    job("exit 3", "optim.lr=0.2")
    assert "optim.lr=0.1 data.shards='a b/{0..3}.tar' run_dir=run" in (tmp_path / "started").read_text()


def test_every_task_of_srun_compiles_on_its_node(job, tmp_path):
    """The command that srun is given, run as a task would: its caches, and its overrides whole."""
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\necho "$TRITON_CACHE_DIR" > {tmp_path}/told\nfor word; do echo "$word"; done >> {tmp_path}/told\n'
    )
    job(f"export SLURM_TMPDIR={tmp_path}; {AS_TASK}", "data.shards='a b/{0..3}.tar'")
    cache, *words = (tmp_path / "told").read_text().splitlines()
    assert cache == f"{tmp_path}/swinv2-{os.getuid()}/triton"
    assert words == ["-m", "swinv2_train.train", "data.shards='a b/{0..3}.tar'", "run_dir=run"]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (ODD_NAME, ODD_NAME), (f"{ODD_NAME}/", ODD_NAME), ("'quoted'", "quoted"), ('"a b"', "a b"),
        (r"'it\'s'", "it's"), ("it's", "it's"), ("~/x", "HOME/x"), ("-x", "-x"), ("null", "null"), ("'\"'", '"'),
        ("back\\", "back\\"),
    ],
)  # fmt: skip
def test_the_job_and_the_command_mean_the_same_run_dir(typed, name, job, tmp_path, monkeypatch):
    """The script keeps the code there and looks for checkpoints there; what it hands on is read as Hydra's grammar."""
    monkeypatch.setenv("HOME", str(tmp_path / "HOME"))
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done > "{tmp_path}/told"\n')
    wanted = tmp_path / name
    saves = f"mkdir -p {shlex.quote(str(wanted))}/checkpoints/step_00000007; exit 1"
    assert job(f"({AS_TASK}); {saves}", f"run_dir={typed}", "optim.lr=0.1", HOME=str(tmp_path / "HOME")) == (True, 1)
    assert (wanted / "code" / "7" / "launch" / "train.sbatch").is_file()
    run_dir = (tmp_path / "told").read_text().split("\0")[-2]
    monkeypatch.chdir(tmp_path)
    config = compose_overrides([run_dir, "data.shards=x"])
    assert Path(config.run_dir).resolve() == wanted.resolve()


def test_a_run_dir_with_a_colon_is_refused(job, tmp_path):
    """PYTHONPATH would be cut there, and the job run whatever package is installed."""
    assert job("exit 0", "run_dir=a:b") == (False, 2) and not (tmp_path / "a:b").exists()
