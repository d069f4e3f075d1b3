"""Ranks that were started differently are found before anything is done, and named."""

from __future__ import annotations

import os
import re
import socket

import pytest

from swinv2_train.config import ConfigError, OutageError
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, exit_code_of
from swinv2_train.distributed import collectives, init_distributed, same_start
from swinv2_train.distributed.same_start import check_agreement
from tests.support.configs import make_config
from tests.support.harness import run_distributed
from tests.support.processes import forked_code


def found(world, change):
    """The message of this rank, after change(rank) gave it a configuration."""
    config = change(world.rank)
    try:
        check_agreement(config)
    except ConfigError as error:
        return str(error)
    return None


def test_ranks_that_agree_say_nothing():
    """Folders on local disks may have other names on every host."""
    assert run_distributed(found, 2, lambda rank: make_config(data={"cache_dir": f"/disk{rank}"})) == [None, None]


def test_other_settings_versions_and_code_are_named():
    host = socket.gethostname()

    def change(rank):
        if rank == 1:  # of a process of its own
            same_start.version_of = lambda name: "9.9" if name == "torch" else "1"
            same_start._fingerprint = lambda: "other"
            return make_config(optim={"lr": 0.25})
        same_start.version_of = lambda name: "1"
        return make_config(optim={"lr": 0.5})

    messages = run_distributed(found, 2, change)
    assert messages[0] == messages[1]
    for part in (
        f"rank 1 ({host}) has optim.lr 0.25, rank 0 ({host}) has 0.5",
        f"rank 1 ({host}) has the package torch 9.9, rank 0 ({host}) has 1",
        f"rank 1 ({host}) has the code of swinv2_train other, rank 0",
        "start all of them with one command",
    ):
        assert part in messages[0]


def test_many_differences_are_cut_short():
    def change(rank):
        return make_config(
            optim={"lr": rank + 1.0, "weight_decay": rank * 1.0}, train={"log_every_steps": rank + 1},
            data={"num_workers": rank}, runtime={"num_threads": rank + 1, "gc_every_steps": rank + 1},
        )  # fmt: skip

    message = run_distributed(found, 2, change)[0]
    assert message.count("rank 1") == 5 and "; and 1 more;" in message


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_is_not_one_process(name, monkeypatch):
    """A forgotten variable would otherwise start as many runs as there are processes."""
    for each in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=rf"{name} \(1\) is in the environment and .* is not; start with torchrun"):
        init_distributed(5)


@pytest.mark.parametrize(
    ("sizes", "said", "code"),
    [
        ((2, 4), "rank 0 has WORLD_SIZE 2 on .*, rank 1 has 4 on", EXIT_USER_ERROR),
        ((3, 3), "of 3 ranks these did not come within 2 s: 2;", EXIT_FAILED),
    ],
)
def test_all_ranks_end_alike_when_they_cannot_meet(sizes, said, code):
    """A rank that is not there is no wrong input: the next start may find it.  Every rank is told before rank 0, and
    with it the store, is gone."""
    messages = run_distributed(lambda world: join(world.rank, sizes[world.rank]), 2, init=False)
    assert messages[0] == messages[1] and messages[0][0] == code and re.search(said, messages[0][1]), messages


def test_a_doubled_rank_is_named():
    """On at least one rank: the second rank 0 finds its port taken, by the first or by its store."""
    messages = run_distributed(lambda _: join(0, 2), 2, init=False)
    said = "two processes call themselves RANK 0|cannot listen on MASTER_PORT"
    assert any(code == EXIT_USER_ERROR and re.search(said, text) for code, text in messages), messages


def join(rank: int, world_size: int) -> tuple[int, str]:
    """What init_distributed ends with: an exit code and its words."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        init_distributed(2)
    except ConfigError as error:
        return exit_code_of(error), str(error)
    return EXIT_DONE, ""


def test_a_rank_whose_store_dies_says_so(monkeypatch):
    """Rank 0's process is killed while the others wait for its word: an outage, and no traceback of torch's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"""
import datetime, os
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", {port}, 2, is_master=True, wait_for_workers=False)
store.wait(["attempt_0_group_0/rank_1"], datetime.timedelta(seconds=30))
os._exit(9)
"""
    killed = forked_code(code)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OutageError, match=r"rank 1 on .* lost the store of rank 0's host while the ranks met"):
        init_distributed(20)
    assert killed.wait(10) == 9


@pytest.mark.parametrize(("errno", "kind"), [(socket.EAI_AGAIN, OutageError), (socket.EAI_NONAME, ConfigError)])
def test_a_name_server_that_does_not_answer_is_an_outage(errno, kind, monkeypatch):
    """A name that nobody has is wrong input; one that nobody tells now may be told to the next start."""

    def lookup(name):
        raise socket.gaierror(errno, "no answer")

    monkeypatch.setattr(socket, "gethostbyname", lookup)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (variables | {"MASTER_ADDR": "node1", "MASTER_PORT": "10007"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR \(node1\) has no address on .*: no answer") as raised:
        init_distributed(2)
    assert type(raised.value) is kind


def test_an_address_where_nobody_answers_is_named(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OutageError, match=rf"rank 1 on .* cannot reach rank 0 at MASTER_ADDR \(127.0.0.1\).*{port}"):
        init_distributed(2)
    monkeypatch.setenv("MASTER_PORT", "port")
    with pytest.raises(ConfigError, match=r"MASTER_PORT \(port\) must be a port's number"):
        init_distributed(2)
    assert not collectives._active()
