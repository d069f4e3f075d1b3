"""Which rank is waited for, from every rank's own time.  Real ranks: tests/distributed/test_hang.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from swinv2_train.monitoring import stragglers
from swinv2_train.monitoring.stragglers import STREAK_LENGTH, ComputeTimer, StragglerStreak, slowest
from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stragglers, "time", clock)
    return clock


def test_own_time_counts_what_is_asked_for_and_leaves_torch_as_it_was(clock):
    own, plain = ComputeTimer(torch.device("cpu")), Work.wait
    with own.measured():
        clock.sleep(0.1)
        with own.excluded():
            clock.sleep(0.2)
        assert Work.wait is not plain
    assert Work.wait is plain and own.read() == pytest.approx(0.1)
    with own.measured(False):
        clock.sleep(0.05)
    assert own.read() == 0.0


def test_a_synchronous_collective_of_nccl_is_a_wait_though_there_is_no_work_to_wait_for(run_distributed, clock):
    """torch runs it on the stream that computes since 2.8; the wait for a slow rank counted as each rank's own time."""

    def command(world):
        plain = vars(ProcessGroup)["allreduce"]

        def synchronous(group, tensors, options):
            plain.__get__(group)(tensors, options).wait()
            clock.sleep(0.2)

        ProcessGroup.allreduce = synchronous
        timer = ComputeTimer(torch.device("cpu"))
        with timer.measured():
            clock.sleep(0.1)
            dist.all_reduce(torch.ones(1))
        ProcessGroup.allreduce = plain
        dist.all_reduce(torch.ones(1))  # what was put back serves
        dist.barrier()
        return timer.read()

    for own in run_distributed(command, 2):
        assert own == pytest.approx(0.1)


def test_the_slowest_rank_is_that_of_computation_and_data_together():
    found = slowest([1.0, 1.1, 1.0], [0.0, 0.0, 0.5])
    assert (found.rank, found.own_sec, found.median_sec, found.data_wait_sec) == (2, 1.5, 1.1, 0.5)
    assert found.lags and "rank 2 is the slowest: 1.5 s of its own a step, 0.5 of them waiting for data" in str(found)
    assert not slowest([1.0, 1.2], [0.0, 0.0]).lags
    assert slowest([1.0, 1.3], [0.0, 0.0]).lags, "of two ranks one can stand out"


def test_a_rank_is_worth_a_word_when_it_lags_again_and_again():
    """Once per row; another rank, or none, begins a new one."""
    slow, other, even = (slowest(times, [0.0] * 3) for times in ([2.0, 1, 1], [1, 2.0, 1], [1.0, 1, 1]))
    streak = StragglerStreak()
    assert [streak.add(each) for each in (slow, slow, other, slow, slow, slow, slow)] == [False] * 5 + [True, False]
    assert [streak.add(each) for each in (even, *[slow] * STREAK_LENGTH)] == [False] * STREAK_LENGTH + [True]
    assert [StragglerStreak().add(even) for _ in range(5)] == [False] * 5
