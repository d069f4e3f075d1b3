"""What SLURM's variables mean, as srun sets them; tests/slurm starts the real thing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.distributed import init_distributed, slurm
from swinv2_train.distributed.slurm import first_host, meeting_point, own_accelerator, step_ranks, tasks_per_node

TASK = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu-[003-004]", "SLURM_STEP_TASKS_PER_NODE": "1,3",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_a_task_of_srun_knows_its_place_also_on_uneven_nodes():
    """One task on the first node and three on the second: LOCAL_WORLD_SIZE is this node's, not the first one's."""
    assert step_ranks(TASK) == {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 3}


@pytest.mark.parametrize(
    "environment", [{}, TASK | {"SLURM_STEP_NUM_TASKS": "1"}, BATCH_SCRIPT | {"SLURM_NTASKS": "1"}],
    ids=["no SLURM", "one task", "batch script of one task"],
)  # fmt: skip
def test_a_lone_process_is_alone(environment):
    assert step_ranks(environment) is None


def test_a_batch_script_without_srun_is_refused():
    """SLURM calls it task 0 of 4, and it would wait for the other three."""
    with pytest.raises(ConfigError, match="batch script of a SLURM job of 4 tasks .* start with srun"):
        step_ranks(BATCH_SCRIPT)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node7", "node7"), ("node[003-007,9],other", "node003"), ("a,b", "a"), ("rack[1-2]-gpu[5-6]", "rack1-gpu5"),
     ("10.0.0.[4-5]", "10.0.0.4")],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_tasks_per_node_are_read_for_every_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_jobs_steps_and_restarts_meet_at_ports_of_their_own():
    """On one node at the same time: a thousand jobs of an array, the steps of a job, a rank that outlives a requeue."""
    jobs = [meeting_point(TASK | {"SLURM_JOB_ID": str(job)}) for job in range(80_000, 81_000)]
    steps = [meeting_point(TASK | {"SLURM_STEP_ID": str(step)}) for step in range(100)]
    restarts = [meeting_point(TASK | {"SLURM_RESTART_COUNT": str(count)}) for count in range(100)]
    for points in (jobs, steps, restarts):
        assert len(set(points)) == len(points)
        assert all(host == "gpu-003" and 1024 < port < 32768 for host, port in points)
    assert meeting_point(TASK) == meeting_point(TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})


@pytest.mark.parametrize(
    ("visible", "tasks", "on_node", "own"),
    [(1, 4, "4", True), (4, 4, "4", False), (1, 4, "1", False), (1, 1, "1", False)],
)
def test_a_task_with_its_own_gpu_alone_is_told_from_too_many_tasks(visible, tasks, on_node, own):
    assert own_accelerator(visible, tasks, {"SLURM_GPUS_ON_NODE": on_node}) is own


def test_the_command_prints_what_torchrun_needs_and_imports_nothing_else():
    """-IS: a Python that finds the standard library alone."""
    environment = os.environ | TASK | {"SLURM_NODEID": "1"}
    done = subprocess.run([sys.executable, "-IS", slurm.__file__], env=environment, capture_output=True, text=True)
    host, port = meeting_point(TASK)
    assert done.stdout == f"NNODES=2 NODE_RANK=1 MASTER_ADDR={host} MASTER_PORT={port}\n"


@pytest.fixture
def two_ranks(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_a_port_that_another_program_has_is_named(two_ranks, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"rank 0 cannot listen on MASTER_PORT \({port}\).* to a free port"):
            init_distributed(5)


def test_a_host_without_an_address_is_named(two_ranks, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR \(no-such-host.invalid\) has no address .* rank 0's host"):
        init_distributed(5)
