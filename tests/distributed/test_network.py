"""torchrun on two hosts with a network between them that loses packets, breaks for seconds, and breaks for good."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config.arguments import last_of_each
from tests.support.commands import SMALL, finish, losses, start, wait_for_step
from tests.support.network import INTERFACE, TwoHosts
from tests.support.warm_python import warm_python

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 12
PRETRAIN = (
    "experiment=cifar10_simmim", *SMALL, f"train.max_steps={STEPS}", "train.micro_batch_size=8",
)  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as hosts:
            yield hosts
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces and TUN devices are not permitted here: {error}")


@pytest.fixture
def pythons(hosts, tmp_path) -> Iterator[list[str]]:
    """A Python of each host, that starts without imports."""
    folders = [tmp_path / f"python_{host}" for host in range(2)]
    servers = [warm_python(folder, lambda host=host: hosts.enter(host)) for host, folder in enumerate(folders)]
    yield [str(folder / "python") for folder in folders]
    for server in servers:
        server.kill()
        server.wait()


def torchrun(hosts: TwoHosts, pythons: list[str], port: int, *overrides: str) -> list[subprocess.Popen[str]]:
    """launch/torchrun.sh on both hosts, one rank each; gloo takes the interface that it is told."""
    processes, words = [], last_of_each(overrides)
    for host in range(2):
        variables = {
            "NNODES": "2", "NODE_RANK": str(host), "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": str(port),
            "NPROC_PER_NODE": "1", "PYTHON": pythons[host], "GLOO_SOCKET_IFNAME": INTERFACE,
            "SHUTDOWN_TIMEOUT_SEC": "20",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                hosts.command(host, str(ROOT / "launch/torchrun.sh"), *words), env=os.environ | variables,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )
        )  # fmt: skip
    return processes


def test_lost_packets_and_a_cut_of_ten_seconds_change_nothing(hosts, pythons, shards, tmp_path):
    """TCP sends again what is lost, one packet in twenty and then all; the run's losses are those of one host's."""
    alone = start(*PRETRAIN, *shards, f"run_dir={tmp_path / 'alone'}")
    assert finish(alone)[0] == 0
    hosts.loss = 0.05
    both = torchrun(hosts, pythons, 29511, *PRETRAIN, *shards, f"run_dir={tmp_path / 'both'}")
    wait_for_step(tmp_path / "both", 3, both[0])
    hosts.cut_for(10)
    for process in both:
        code, output = finish(process)
        assert code == 0, output
    assert hosts.carried > 1000 and hosts.lost > 50
    assert losses(tmp_path / "both") == losses(tmp_path / "alone") and len(losses(tmp_path / "both")) == STEPS


def test_a_network_that_stays_away_ends_the_run_cleanly_and_it_resumes(hosts, pythons, shards, tmp_path):
    """Both hosts end by themselves after process_group_timeout_sec and name it; the run goes on, here on one host."""
    run = (*PRETRAIN, *shards, f"run_dir={tmp_path / 'run'}", "runtime.process_group_timeout_sec=10")
    both = torchrun(hosts, pythons, 29512, *run, "train.max_steps=100000")
    wait_for_step(tmp_path / "run", 6, both[0])
    hosts.cut.set()
    outputs = [finish(process) for process in both]
    assert all(code != 0 for code, _ in outputs)
    assert any("failed" in output for _, output in outputs), outputs
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    steps = int(newest.name.removeprefix("step_")) + 2
    code, output = finish(start(*run, f"train.max_steps={steps}"))
    assert code == 0 and f"resuming from {newest}" in output, output
