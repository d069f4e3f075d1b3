"""The process group of a run: from torchrun, from SLURM or of one process alone."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import itertools
import os
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from swinv2_train.config import ConfigError, OutageError
from swinv2_train.distributed import slurm
from swinv2_train.distributed.collectives import World, _active, gather_objects
from swinv2_train.runtime.seeds_and_threads import core_numbers, core_quota

_KINDS: dict[str, type[ConfigError]] = {"away": OutageError, "wrong": ConfigError}
"""What goes before the text by which a rank tells the others why none of them can start: the kind of its error."""
_ANSWER = datetime.timedelta(seconds=10)
_stores: dict[tuple[str, int], TCPStore] = {}
"""By address and port."""
_in_batch = False
"""Whether this process' threads are scheduled as :func:`_schedule_batch` has it, and not as its user has."""
_groups = itertools.count()
"""The groups that this process has joined; every rank of a run has joined as many."""


def init_distributed(timeout_sec: int) -> World:
    """Join the process group that torchrun or srun announces, or make a group of one.

    timeout_sec: seconds after which a waiting collective ends the run, in this group and in every group made later.
    Uses NCCL with an accelerator, gloo without.  Also writes RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE to the
    environment, where DeepSpeed looks for them.  It takes LOCAL_RANK for the number of this process' accelerator, so
    on CUDA that is what LOCAL_RANK becomes: 0 where a task of SLURM sees its own accelerator alone.
    Raises ConfigError when the announced ranks make no sense, OutageError when some did not come or were not reached.
    """
    environment = _announced_ranks()
    rank, world_size = environment["RANK"], environment["WORLD_SIZE"]
    local_rank, local_world_size = environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size):
        raise ConfigError(
            f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_world_size} in the "
            "environment do not fit together; start with torchrun or srun, or unset them to run one process"
        )
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        if local_rank >= visible and not slurm.own_accelerator(visible, local_world_size):
            raise ConfigError(
                f"{local_world_size} processes on this host but {visible} accelerators; "
                "start at most one process for each (torchrun --nproc-per-node, srun --ntasks-per-node)"
            )
        device = torch.device("cuda", min(local_rank, visible - 1))  # 0 where a task sees its own alone
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    world = World(rank, local_rank, world_size, local_world_size, device)
    os.environ.update({name: str(value) for name, value in environment.items()})
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed demands that both say the same
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device.index)
    timeout = datetime.timedelta(seconds=timeout_sec)
    _limit_later_groups(timeout)
    atexit.register(_remove_empty_log_folders)
    if device.type == "cpu":
        atexit.register(_let_gloo_finish)
        _schedule_batch(world_size > 1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" and world_size > 1 else None,  # NCCL fails here, not in a first step
    )
    place = (socket.gethostname(), core_numbers())
    return replace(world, cores=share_of_cores(place, gather_objects(place), core_quota()))


def share_of_cores(place: tuple[str, list[int]], places: list[tuple[str, list[int]]], quota: float) -> int:
    """The cores of a rank, at least 1: a core on which n ranks may run counts as an nth.

    place: its host and the numbers of the cores that it may run on: all of the host's under torchrun, its own under
    srun with --cpus-per-task.  places: of all ranks.  quota: the cores' worth of time that the host's ranks have
    together.
    """
    here = [set(cores) for host, cores in places if host == place[0]]
    share = sum(1 / sum(core in others for others in here) for core in place[1])
    return max(1, int(min(share + 1e-6, quota / len(here))))


def _limit_later_groups(timeout: datetime.timedelta) -> None:
    """DeepSpeed's copies of the world are made without a timeout: torch's default would cut NCCL's off at 10 minutes,
    before a hang is diagnosed, and gloo's at 30.
    """
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def _schedule_batch(on: bool) -> None:
    """Let this thread, and those it starts from now on, wait for a core until who has it ends his turn, or no more.

    This is Linux's SCHED_BATCH, for ranks on a CPU.  Under the usual policy gloo's thread for what comes in takes the
    core from the one that sends, which holds the lock that both need, and asks for that in a loop until its own turn is
    over: with two ranks on two cores that is most of a small collective (benchmarks/small_collectives_cpu_202611.md).
    Any other policy is its user's, and stays.
    """
    global _in_batch
    if on == _in_batch or (on and not (hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER)):
        return
    with contextlib.suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH if on else os.SCHED_OTHER, os.sched_param(0))
        _in_batch = on


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    if _active():
        dist.destroy_process_group()
        _schedule_batch(False)


def _announced_ranks() -> dict[str, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from torchrun, from srun (2 tasks or more), or of a single
    process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        ranks = slurm.step_ranks()
        given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
        if given and ranks is None:
            missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
            raise ConfigError(
                f"{given[0]} ({os.environ[given[0]]}) is in the environment and {missing} is not; "
                f"start with torchrun or srun, or unset {given[0]} to run one process"
            )
        if ranks is None:
            return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        host, port = slurm.meeting_point()
        os.environ.setdefault("MASTER_ADDR", host)
        os.environ.setdefault("MASTER_PORT", str(port))
        return ranks
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ]
    try:
        found = {name: int(os.environ[name]) for name in names}
    except ValueError as error:
        raise ConfigError(f"{sorted(names)} in the environment must be whole numbers: {error}") from error
    found.setdefault("LOCAL_RANK", 0)
    of_deepspeed = os.environ.get("LOCAL_SIZE", "")  # its launcher's name for it
    here = int(of_deepspeed) if of_deepspeed.isdigit() else found["LOCAL_RANK"] + 1
    found.setdefault("LOCAL_WORLD_SIZE", here)
    return found


def _remove_empty_log_folders() -> None:
    """At exit: torchrun makes a folder in the temporary one for what its ranks write, and leaves it there, empty."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    rank_folder, attempt, run, own = Path(error_file).parents[:4] if error_file.count("/") > 4 else [Path()] * 4
    if own.name.startswith("torchelastic_") and own.parent == Path(tempfile.gettempdir()):
        with contextlib.suppress(OSError):  # not empty: another rank is still there, or its logs are
            for folder in (rank_folder, attempt, run, own):
                folder.rmdir()


def _let_gloo_finish() -> None:
    """At exit: gloo's thread frees the tensors of the last collective and needs the interpreter's lock for it.

    When the interpreter is already gone by then, the thread aborts the process ("terminate called without an active
    exception", in one of four runs of two short-lived ranks) and a complete run counts as failed.  Sleeping gives the
    lock away.
    """
    time.sleep(0.1)


def _store(rank: int, world_size: int, timeout: datetime.timedelta) -> Store:
    """The key-value store where the ranks find each other.

    torchrun's agent hosts one store for all attempts of a job, and torch reuses the addresses that the ranks of the
    last attempt left in it: with gloo every restart then fails to connect.  So each attempt has its own prefix, and
    within it each run of a program that trains several times.
    """
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return HashStore()  # in this process; a file's would stay behind in the temporary folder
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing in the environment of rank {rank}; start with torchrun")
    host = os.environ["MASTER_ADDR"]
    try:
        port = int(os.environ["MASTER_PORT"])
    except ValueError as error:
        raise ConfigError(f"MASTER_PORT ({os.environ['MASTER_PORT']}) must be a port's number") from error
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        address = socket.gethostbyname(host)
        store = _tcp_store(address, port, world_size, is_master, timeout)
    except socket.gaierror as error:
        kind = OutageError if error.errno == socket.EAI_AGAIN else ConfigError  # the name server did not answer
        raise kind(
            f"MASTER_ADDR ({host}) has no address on {socket.gethostname()}: {error.strerror}; "
            "set MASTER_ADDR to an address of rank 0's host that every rank can reach"
        ) from error
    except dist.DistNetworkError as error:
        if is_master:
            raise ConfigError(
                f"rank 0 cannot listen on MASTER_PORT ({port}): {str(error).splitlines()[0]}; "
                "another program has it: set MASTER_PORT to a free port"
            ) from error
        raise OutageError(
            f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at MASTER_ADDR ({host}), MASTER_PORT ({port}): "
            f"{str(error).splitlines()[0]}; is rank 0 running there, and no firewall between?"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed = PrefixStore(f"attempt_{attempt}_group_{next(_groups)}", store)
    _rendezvous(prefixed, rank, world_size, timeout)
    return prefixed


def _tcp_store(address: str, port: int, world_size: int, is_master: bool, timeout: datetime.timedelta) -> TCPStore:
    """Kept while the process lives: the ranks of a program that trains again meet there again."""
    if (address, port) not in _stores:
        _stores[address, port] = TCPStore(
            address, port, world_size, is_master=is_master, timeout=timeout, wait_for_workers=False
        )
    store = _stores[address, port]
    store.set_timeout(timeout)
    return store


def _rendezvous(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> None:
    """The same error on every rank that can be reached, unless each of 0 .. world_size - 1 comes once and says the
    same: an OutageError where some did not come, else a ConfigError.

    Collectives among ranks of different numbers would wait until the time is up, and not say for whom.
    """
    host = socket.gethostname()
    come = "start all ranks of a run, and of this run alone, with one torchrun or srun"
    try:
        if store.add(f"arrived_{rank}", 1) > 1:
            text = f"two processes call themselves RANK {rank}, one of them on {host}; {come}"
            store.set("verdict", f"wrong: {text}")
            raise ConfigError(text)
        store.set(f"rank_{rank}", f"{world_size} on {host}")
        if rank == 0:
            verdict = _verdict(store, world_size, host, timeout, come)
            store.set("verdict", verdict)
            if verdict:
                _let_others_hear(store, world_size)
        else:
            store.wait(["verdict"], timeout + _ANSWER)
            verdict = store.get("verdict").decode()
            store.set(f"heard_{rank}", "")
    except dist.DistError as error:
        raise OutageError(
            f"rank {rank} on {host} lost the store of rank 0's host while the ranks met: {str(error).splitlines()[0]}; "
            "what was said there?"
        ) from error
    if verdict:
        kind, _, text = verdict.partition(": ")
        raise _KINDS[kind](text)


def _verdict(store: Store, world_size: int, host: str, timeout: datetime.timedelta, remedy: str) -> str:
    """What rank 0 finds wrong with those who came, behind what kind of error it is; or nothing."""
    ranks = [f"rank_{rank}" for rank in range(world_size)]
    try:
        store.wait(ranks, timeout)
    except dist.DistStoreError:
        absent = ", ".join(str(rank) for rank, name in enumerate(ranks) if not store.check([name]))
        waited_sec = timeout.total_seconds()
        return f"away: of {world_size} ranks these did not come within {waited_sec:.0f} s: {absent}; {remedy}"
    said = [store.get(name).decode() for name in ranks]
    others = [f"rank {rank} has {text}" for rank, text in enumerate(said) if text.split()[0] != str(world_size)]
    return f"wrong: rank 0 has WORLD_SIZE {world_size} on {host}, {', '.join(others)}; {remedy}" if others else ""


def _let_others_hear(store: Store, world_size: int) -> None:
    """Rank 0's end may be the store's; the ranks that came are to know first why."""
    came = [rank for rank in range(1, world_size) if store.check([f"rank_{rank}"])]
    with contextlib.suppress(dist.DistError):
        store.wait([f"heard_{rank}" for rank in came], _ANSWER)
