"""Who announces how many ranks there are: torchrun, srun, and other launchers."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from swinv2_train.distributed import World, init_distributed, shutdown_distributed
from swinv2_train.distributed.process_group import _announced_ranks, share_of_cores
from swinv2_train.engine.deepspeed.startup import import_deepspeed


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_ranks_of_a_host_are_what_its_launcher_says(name, monkeypatch):
    """deepspeed's launcher calls them LOCAL_SIZE; without it rank 0 thought itself alone and took all cores."""
    for other in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(other, raising=False)
    for key, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", name: "4"}.items():
        monkeypatch.setenv(key, value)
    assert _announced_ranks() == {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}


@pytest.mark.parametrize(("visible", "device"), [(1, 0), (4, 2)], ids=["--gpus-per-task", "--gpus-per-node"])
def test_deepspeed_is_told_the_device_that_a_task_of_slurm_sees(visible, device, monkeypatch):
    """DeepSpeed takes LOCAL_RANK for a device: with --gpus-per-task=1 every task but the first asked for one that it
    does not see."""
    from deepspeed.runtime import engine as deepspeed_engine

    task = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "gpu", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    }  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    ours, groups = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", ours.append)
    monkeypatch.setattr("swinv2_train.distributed.process_group._store", lambda *arguments: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **more: groups.append((arguments, more)))
    world = init_distributed(60)
    assert (world.local_rank, world.device) == (2, torch.device("cuda", device)) and ours == [world.device]
    assert groups[0][0] == ("nccl",) and groups[0][1]["device_id"] == world.device

    theirs = []
    accelerator = SimpleNamespace(set_device=theirs.append, device_name="cuda:{}".format)
    monkeypatch.setattr(deepspeed_engine, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(deepspeed_engine, "dist", SimpleNamespace(get_world_size=lambda: 4, get_rank=lambda: 2))
    engine = torch.nn.Module.__new__(deepspeed_engine.DeepSpeedEngine)
    torch.nn.Module.__init__(engine)
    engine._configure_with_arguments(None, None)
    engine._set_distributed_vars(None)
    assert theirs == [device] and engine.device == world.device
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(device)  # zero.Init reads it


def test_every_group_that_is_made_later_has_the_runs_time_limit(run_distributed):
    """DeepSpeed clones the world without a timeout; torch's own ends NCCL after 10 minutes, before a hang is named."""

    def command(world):
        shutdown_distributed()
        init_distributed(77)
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(auto_mpi_discovery=False)
        groups = [deepspeed.utils.groups._clone_world_group(), dist.new_group([0])]
        own = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        return [*own, dist.distributed_c10d._get_default_timeout("nccl").total_seconds()]

    assert run_distributed(command, 1) == [[77.0] * 3]


@pytest.mark.parametrize(
    ("places", "quota", "expected"),
    [
        ([("a", range(8))] * 4, math.inf, [2, 2, 2, 2]),  # torchrun: all ranks may run everywhere
        ([("a", range(8)), ("a", range(8, 16))], math.inf, [8, 8]),  # srun --cpus-per-task=8
        ([("a", range(8)), ("b", range(8))], math.inf, [8, 8]),
        ([("a", range(6)), ("a", range(4, 8))], math.inf, [5, 3]),  # two of each are the other's too
        ([("a", range(2))] * 3, math.inf, [1, 1, 1]),
        ([("a", range(64))] * 2, 12.5, [6, 6]),  # a container's share of the machine
        ([("a", range(3))] * 3, 3.0, [1, 1, 1]),
    ],
)
def test_a_rank_has_the_cores_that_no_other_rank_may_use_and_its_share_of_the_rest(places, quota, expected):
    """srun gives every task cores of its own, of which no other rank has a share."""
    places = [(host, list(cores)) for host, cores in places]
    assert [share_of_cores(place, places, quota) for place in places] == expected


@pytest.mark.parametrize("own", [os.SCHED_OTHER, os.SCHED_IDLE, os.SCHED_BATCH])
def test_ranks_of_a_cpu_wait_for_their_turn_and_a_process_alone_is_left_as_it_was(own, run_distributed):
    """gloo's threads take the core from one another otherwise, and spin for a lock that the other holds."""

    def command(world: World) -> tuple[set[int], set[int], int]:
        os.sched_setscheduler(0, own, os.sched_param(0))
        others = {*os.listdir("/proc/self/task")} - {str(os.getpid())}
        init_distributed(60)
        dist.new_group([0, 1])
        during = {os.sched_getscheduler(int(thread)) for thread in {*os.listdir("/proc/self/task")} - others}
        dist.barrier()  # or one leaves while the other still connects
        shutdown_distributed()
        after = os.sched_getscheduler(0)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        init_distributed(60)
        return during, {os.sched_getscheduler(0)}, after

    ranks = os.SCHED_BATCH if own == os.SCHED_OTHER else own
    assert run_distributed(command, 2, init=False) == [({ranks}, {own}, own)] * 2
