"""launch/train.sbatch on a real cluster of two nodes: stopped, requeued, preempted, shrunk, and the numbers stay.

The order matters for the time it takes: what a later test waits for runs beside the earlier ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config.command_line import load_run_config
from swinv2_train.monitoring.run_log import read_metrics
from tests.slurm.cluster import NODES, ROOT, Cluster, wait_until
from tests.support.commands import SMALL, keys_per_step, losses
from tests.support.shard_files import ODD_NAME
from tests.support.shard_server import serve

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
PRETRAIN = (
    "experiment=cifar10_simmim", *SMALL, "train.micro_batch_size=2", "train.checkpoint_every_steps=1000",
    "data.record_keys=true",
)  # fmt: skip
STEPS = 40
TOLERANCE = 2e-5  # other sums on another number of processes: measured worst 2.4e-6, growing over the 40 steps


class Job(NamedTuple):
    """A submitted run."""

    number: int
    run_dir: Path


def steps_of(run_dir: Path) -> int:
    """The last step that the run has logged; 0 before the first."""
    return max((line["step"] for line in read_metrics(run_dir)), default=0) if run_dir.is_dir() else 0


def wait_for_step(cluster: Cluster, job: Job, step: int) -> None:
    def reached() -> bool:
        assert cluster.state(job.number) not in ("FAILED", "CANCELLED", "COMPLETED"), cluster.output(job.number)
        return steps_of(job.run_dir) >= step

    wait_until(reached, 90, f"step {step} of job {job.number}")


def wait_for_start(cluster: Cluster, job: Job, number: int) -> None:
    """Until the job is about to train for the so manieth time."""
    wait_until(lambda: cluster.output(job.number).count(" processes") >= number, 90, f"start {number}")


def starts_of(run_dir: Path) -> list[int]:
    """World sizes of all starts."""
    return [start["world_size"] for start in json.loads((run_dir / "environment.json").read_text())]


@pytest.fixture(scope="module")
def undisturbed(cluster, shards, tmp_path_factory) -> Job:
    """A run of ZeRO-3 on two nodes that nobody disturbs, by real interpreters."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / ODD_NAME
    overrides = (*PRETRAIN, *shards, f"train.max_steps={STEPS}", f"run_dir={run_dir}")
    return Job(cluster.train(*overrides, options=("--nodes=2",), interpreter=True), run_dir)


@pytest.fixture(scope="module")
def finetuning(cluster, shards, undisturbed, tmp_path_factory) -> Job:
    """A chain: fine-tuning that waits for the end of the pre-training."""
    run_dir = tmp_path_factory.mktemp("finetuning") / "run"
    overrides = ("experiment=cifar10_finetune", f"task.init_from={undisturbed.run_dir}", *SMALL, *shards)
    options = ("--nodes=1", f"--dependency=afterok:{undisturbed.number}")
    return Job(cluster.train(*overrides, "train.max_steps=2", f"run_dir={run_dir}", options=options), run_dir)


@pytest.fixture(scope="module")
def limited(cluster, shards, tmp_path_factory) -> Job:
    """A run that is longer than its time limit of a minute, and is told half a minute before."""
    run_dir = tmp_path_factory.mktemp("limited") / "run"
    options = ("--nodes=1", "--time=1", "--signal=USR1@60")
    overrides = (*PRETRAIN, *shards, "train.max_steps=100000", "train.picture_every_steps=100000")
    return Job(cluster.train(*overrides, f"run_dir={run_dir}", options=options), run_dir)


def test_a_job_of_two_nodes_leaves_its_run_with_code_and_configuration(cluster, undisturbed, finetuning, limited):
    """One task a node, no torchrun; the run directory's name holds quotes, a line break and the like."""
    cluster.wait(undisturbed.number, "COMPLETED")
    run_dir = undisturbed.run_dir
    assert sorted(losses(run_dir)) == list(range(1, STEPS + 1)) and starts_of(run_dir) == [2]
    assert (run_dir / "config.yaml").exists() and (run_dir / "report.html").exists()
    code = run_dir / "code" / str(undisturbed.number)
    assert (code / "swinv2_train" / "train.py").read_text() == (ROOT / "swinv2_train" / "train.py").read_text()
    assert (code / "conf" / "train.yaml").exists() and (code / "overrides.txt").exists()
    commit = json.loads((run_dir / "environment.json").read_text())[0]["git"]["commit"]
    assert commit == (code / "commit.txt").read_text().strip() and len(commit) == 40


def test_one_torchrun_a_node_does_the_same(cluster, undisturbed, shards, tmp_path):
    """LAUNCHER=torchrun: the signal passes through it, its exit code of 1 is understood, the losses are the same."""
    overrides = (*PRETRAIN, *shards, f"train.max_steps={STEPS}", f"run_dir={tmp_path / 'run'}")
    job = Job(cluster.train(*overrides, options=("--nodes=2",), LAUNCHER="torchrun"), tmp_path / "run")
    wait_for_step(cluster, job, 5)
    cluster.run("scancel", "--signal=USR1", str(job.number))
    cluster.wait(job.number, "COMPLETED")
    assert starts_of(job.run_dir) == [2, 2], cluster.output(job.number)
    assert losses(job.run_dir) == losses(undisturbed.run_dir)


def test_a_job_at_its_time_limit_goes_on_in_its_next_one(cluster, limited):
    """--signal=USR1@60: a checkpoint, the same job again, no step lost; scancel ends it for good, with a checkpoint."""
    wait_until(lambda: "requeued, newest checkpoint: step_" in cluster.output(limited.number), 90, "time limit")
    cluster.run("scontrol", "update", f"jobid={limited.number}", "timelimit=UNLIMITED")
    reached = newest_checkpoint(limited.run_dir)
    assert reached is not None and "stopped by SIGUSR1 after step" in cluster.output(limited.number)
    wait_for_step(cluster, limited, steps_of(limited.run_dir) + 1)
    assert f"resuming from {reached}" in cluster.output(limited.number)
    cluster.run("scancel", str(limited.number))
    cluster.wait(limited.number, "CANCELLED")
    wait_until(lambda: newest_checkpoint(limited.run_dir) != reached, 20, "checkpoint at scancel")
    found = losses(limited.run_dir)
    assert sorted(found) == list(range(1, max(found) + 1))


def test_nights_of_preemption_change_no_number(cluster, undisturbed, shards, tmp_path):
    """Requeued by hand, told by a signal, pushed aside by a job that matters more: the same losses bit for bit."""
    run_dir = tmp_path / "run"
    overrides = (*PRETRAIN, *shards, f"train.max_steps={STEPS}", "train.checkpoint_every_steps=3", f"run_dir={run_dir}")
    job = Job(cluster.train(*overrides, options=("--nodes=2",)), run_dir)
    wait_for_step(cluster, job, 4)
    cluster.run("scontrol", "requeue", str(job.number))
    wait_for_start(cluster, job, 2)
    cluster.run("scancel", "--signal=USR1", str(job.number))
    wait_for_start(cluster, job, 3)
    large = ("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null")
    cluster.wait(cluster.run("sbatch", "--parsable", *large, "--wrap=srun true"), "COMPLETED")
    cluster.wait(job.number, "COMPLETED")
    output = cluster.output(job.number)
    assert cluster.field(job.number, "Restarts") == "3" and starts_of(job.run_dir) == [2, 2, 2, 2], output
    assert "stopped by SIGUSR1 after step" in output and "stopped by SIGTERM after step" in output, output
    assert losses(job.run_dir) == losses(undisturbed.run_dir)
    assert keys_per_step(job.run_dir) == keys_per_step(undisturbed.run_dir)


def test_a_job_whose_server_is_away_is_requeued_until_it_is_back(cluster, shards, tmp_path):
    """An address that answers 503: exit code 1 with the mark of an outage, the same job again, and then it trains."""
    folder = Path(shards[0].partition("=")[2]).parent
    with serve(folder) as server:
        for path in folder.iterdir():
            server.faults[path.name] = ["always 503"]
            server.head_faults[path.name] = ["always 503"]
        run_dir = tmp_path / "run"
        overrides = (
            *PRETRAIN, f"data.shards={server.url}/train-{{000000..000002}}.tar", "data.eval_shards=null",
            f"data.cache_dir={tmp_path / 'cache'}", "data.fetch_give_up_sec=1", "train.max_steps=2",
        )  # fmt: skip
        job = Job(cluster.train(*overrides, f"run_dir={run_dir}", options=("--nodes=1",)), run_dir)
        wait_until(lambda: "requeued" in cluster.output(job.number), 90, "outage")
        server.faults.clear()
        server.head_faults.clear()
        cluster.wait(job.number, "COMPLETED")
    output = cluster.output(job.number)
    assert "HTTP 503" in output and "ended with 1: requeued, newest checkpoint: \n" in output, output
    assert sorted(losses(run_dir)) == [1, 2] and starts_of(run_dir) == [1]
    restarts = int(cluster.field(job.number, "Restarts"))
    assert restarts >= 1 and output.count("ended with 1: requeued") == restarts, output


def test_a_chain_goes_on_when_the_first_run_is_complete(cluster, undisturbed, finetuning):
    cluster.wait(finetuning.number, "COMPLETED")
    assert f"weights from {undisturbed.run_dir}/checkpoints/step_{STEPS:08d}" in cluster.output(finetuning.number)


def test_an_array_is_a_sweep(cluster, shards, tmp_path):
    """Two runs at once on the same two nodes, two ranks each there: own directories, overrides and meeting points."""
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("optim.lr=0.001 optim.betas=[0.8,0.9]\noptim.lr=0.002 'optim.betas=[0.7, 0.9]'\n")
    overrides = (*PRETRAIN, *shards, "train.max_steps=2", f"run_dir={tmp_path}")
    job = cluster.train(*overrides, options=("--nodes=2", "--gpus-per-node=2", "--array=1-2"), SWEEP=str(sweep))
    for index in (1, 2):
        cluster.wait(f"{job}_{index}", "COMPLETED")
        assert starts_of(tmp_path / str(index)) == [4]
    configs = [load_run_config(tmp_path / str(index)) for index in (1, 2)]
    assert [config.optim.lr for config in configs] == [0.001, 0.002]
    assert [config.optim.betas for config in configs] == [[0.8, 0.9], [0.7, 0.9]]


def test_a_run_goes_on_with_the_nodes_that_are_left(cluster, undisturbed, shards, tmp_path):
    """--nodes=1-2, and one is taken down: the same images in every step, on one process instead of two."""
    run_dir = tmp_path / "run"
    overrides = (*PRETRAIN, *shards, f"train.max_steps={STEPS}", "train.checkpoint_every_steps=3", f"run_dir={run_dir}")
    wait_until(lambda: cluster.node_states() == ["idle", "idle"], 60, "two idle nodes")  # or it starts on one
    job = Job(cluster.train(*overrides, options=("--nodes=1-2",)), run_dir)
    wait_for_step(cluster, job, 5)
    cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    try:
        cluster.wait(job.number, "COMPLETED")
        assert starts_of(run_dir) == [2, 1], cluster.output(job.number)
        assert keys_per_step(run_dir) == keys_per_step(undisturbed.run_dir)
        ours, theirs = losses(run_dir), losses(undisturbed.run_dir)
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step][0] / theirs[step][0] - 1) for step in theirs) < TOLERANCE
    finally:
        cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=resume")
