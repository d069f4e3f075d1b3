"""The process group comes up where it should, survives a restart, and no rank waits for one that failed."""

from __future__ import annotations

import datetime
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from swinv2_train.config import ConfigError
from swinv2_train.distributed import (
    RankError,
    all_reduce_sum,
    any_rank,
    barrier,
    broadcast_object,
    init_distributed,
    process_group,
    raise_together,
    shutdown_distributed,
)
from swinv2_train.distributed.slurm import meeting_point
from tests.support.harness import RankFailed, run_distributed


@pytest.mark.smoke
def test_collectives_join_what_the_ranks_say():
    def run(world):
        barrier()
        total = all_reduce_sum(torch.tensor([world.rank + 1.0, 10.0]))
        return total.tolist(), any_rank(world.rank == 1), any_rank(False), broadcast_object({"from": world.rank}, 1)

    assert run_distributed(run, 2) == [([3.0, 20.0], True, False, {"from": 1})] * 2


def test_everything_works_without_a_group_too():
    barrier()
    assert any_rank(True)
    assert not any_rank(False)
    assert all_reduce_sum(torch.tensor(2)).item() == 2
    assert broadcast_object("x") == "x"
    raise_together(None)
    with pytest.raises(KeyError):
        raise_together(KeyError("x"))


def test_single_process_gets_a_group_of_one():
    def run(_world):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
        world = init_distributed(30)
        result = world.world_size, world.rank, world.is_main, dist.get_world_size(), os.environ["LOCAL_RANK"]
        shutdown_distributed()
        assert not dist.is_initialized()
        return result

    assert run_distributed(run, 1, init=False) == [(1, 0, True, 1, "0")]


@pytest.mark.smoke
def test_error_of_one_rank_is_raised_on_all_and_names_it():
    def run(world):
        try:
            raise_together(OSError("disk full") if world.rank == 1 else None)
        except RankError as error:
            return str(error)

    assert run_distributed(run, 2) == ["rank 1: OSError: disk full"] * 2


@pytest.mark.smoke
def test_user_errors_stay_user_errors_and_are_said_once():
    def run(world):
        texts = []
        for error in (ConfigError("bad key"), ConfigError("bad shard") if world.rank else None):
            try:
                raise_together(error)
            except ConfigError as caught:
                texts.append(str(caught))
        raise_together(None)
        return texts

    assert run_distributed(run, 2) == [["bad key", "rank 1: bad shard"]] * 2


def test_ranks_of_a_restarted_job_find_each_other():
    """Trap 7: torchrun's agent keeps one store over restarts, and with it the addresses of dead ranks.  Rank 1 dies by
    SIGKILL in the first attempt; the second attempt uses the same store, and rank 1 is slow to come back."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20))

    def attempt(_world, restarts):
        os.environ["MASTER_PORT"] = str(store.port)
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
        if os.environ["RANK"] == "1" and restarts:
            time.sleep(0.5)  # without a prefix, rank 0 now reads the address of the dead rank 1
        world = init_distributed(5)
        total = all_reduce_sum(torch.tensor(world.rank)).item()
        if world.rank == 1 and not restarts:
            os.kill(os.getpid(), signal.SIGKILL)
        return total

    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert run_distributed(attempt, 2, 0, init=False, may_die=True, environment=agent)[1] is None
    assert run_distributed(attempt, 2, 1, init=False, environment=agent) == [1, 1]


def test_ranks_that_do_not_fit_together_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="RANK=2 WORLD_SIZE=2 .* do not fit together; start with torchrun"):
        init_distributed(5)


def test_missing_address_is_named(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="MASTER_ADDR missing in the environment of rank 0; start with torchrun"):
        init_distributed(5)


def test_ranks_are_read_from_srun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "to be removed again")
        monkeypatch.delenv(name)
    for name, value in {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NODELIST": "gpu-[003-004],other",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_ID": "20007",
        "SLURM_STEP_ID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert process_group._announced_ranks() == {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}
    host, port = meeting_point()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (host, str(port)) and host == "gpu-003"


@pytest.mark.smoke
def test_harness_reports_hung_and_failed_ranks():
    """The helper that all distributed tests stand on must not pass by itself."""

    def fail(world):
        if world.rank == 1:
            raise ValueError("broken on purpose")

    def hang(world):
        time.sleep(30 * world.rank)

    with pytest.raises(RankFailed, match=r"(?s)rank 1: Traceback.*broken on purpose"):
        run_distributed(fail, 2)
    with pytest.raises(RankFailed, match="rank 1: still running after 1 s"):
        run_distributed(hang, 2, timeout_sec=1, init=False)
