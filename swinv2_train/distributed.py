"""The process group, from torchrun, from srun or alone, and the few collectives that the rooms above need.

A single process also gets a real group of one, because DeepSpeed needs one.  Every function below works without a
group too and then speaks for one process, so that tools and tests can use the same code.
"""

from __future__ import annotations

import atexit
import datetime
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from swinv2_train import slurm
from swinv2_train.config import ConfigError


@dataclass(frozen=True)
class World:
    """Who this process is among all ranks."""

    rank: int
    """0 .. world_size - 1 over all hosts."""
    local_rank: int
    """0 .. local_world_size - 1 on this host; also the number of its accelerator."""
    world_size: int
    """Processes of the run."""
    local_world_size: int
    """Processes of the run on this host."""
    device: torch.device
    """Where this rank computes."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks and writes."""
        return self.rank == 0


class RankError(RuntimeError):
    """Another rank failed; the message names the ranks and what they said."""


def init_distributed(timeout_sec: int) -> World:
    """Join the process group that torchrun or srun announces, or make a group of one.

    timeout_sec: seconds after which a waiting collective ends the run.  Uses NCCL with an accelerator, gloo without.
    Also writes RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE to the environment, where DeepSpeed looks for them.
    Raises ConfigError when the announced ranks make no sense.
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
    timeout = datetime.timedelta(seconds=timeout_sec)
    if device.type == "cpu":
        atexit.register(_let_gloo_finish)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return world


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    if _active():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    any_rank(False)  # an all_reduce, since NCCL's own barrier has to guess the device


def any_rank(flag: bool) -> bool:
    """True on every rank when flag is true on at least one."""
    return bool(highest(int(flag)))


def highest(value: int) -> int:
    """The largest of all ranks' values, on every rank."""
    if not _active():
        return value
    box = torch.tensor([value], dtype=torch.int32, device=_device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box.item())


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks.  values: any shape, the same on every rank.  Returns a new tensor on values' own device."""
    total = values.detach().clone()
    if _active():
        on_device = total.to(_device())
        dist.all_reduce(on_device, op=dist.ReduceOp.SUM)
        total = on_device.to(values.device)
    return total


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Every rank's tensor, (ranks, ...) on values' own device.  values: of the same shape and dtype on every rank."""
    if not _active():
        return values.unsqueeze(0)
    found = torch.empty(dist.get_world_size(), *values.shape, dtype=values.dtype, device=_device())
    dist.all_gather(list(found.unbind()), values.to(_device()).contiguous())
    return found.to(values.device)


def exchange(values: torch.Tensor) -> torch.Tensor:
    """Row r goes to rank r, and row r of the result came from it.  values: (ranks, ...), of the same shape on each."""
    if not _active():
        return values
    sent = values.to(_device()).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.to(values.device)


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Rank src's object on every rank (pickled between ranks of this one run)."""
    if not _active():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src, device=_device())
    return box[0]


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object, in the order of ranks, on every rank (pickled between ranks of this one run)."""
    if not _active():
        return [obj]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, obj)
    return everyone


def raise_together(error: BaseException | None) -> None:
    """Raise on all ranks when any rank holds an error, so that none waits for it in the next collective.

    error: what this rank caught, or None.  The message names the ranks and what each said; it is a ConfigError when
    every error is one, else the rank's own error (where it has one) or a RankError.
    """
    if not _active():
        if error is not None:
            raise error
        return
    mine = None if error is None else (isinstance(error, ConfigError), _text_of(error))
    everyone = gather_objects(mine)
    ranks_by_text: dict[str, list[int]] = {}
    for rank, entry in enumerate(everyone):
        if entry is not None:
            ranks_by_text.setdefault(entry[1], []).append(rank)
    if not ranks_by_text:
        return
    if all(entry is None or entry[0] for entry in everyone):
        if len(ranks_by_text) == 1 and all(entry is not None for entry in everyone):
            raise ConfigError(next(iter(ranks_by_text))) from error
        raise ConfigError(_listed(ranks_by_text)) from error
    raise RankError(_listed(ranks_by_text)) from error


# --------------------------------------------------------------------------------------------------------------------


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where the group's collectives take their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _text_of(error: BaseException) -> str:
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


def _listed(ranks_by_text: dict[str, list[int]]) -> str:
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
        for text, ranks in ranks_by_text.items()
    )


def _announced_ranks() -> dict[str, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from torchrun, from srun (2 tasks or more), or alone."""
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
    found.setdefault("LOCAL_WORLD_SIZE", found["LOCAL_RANK"] + 1)
    return found


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
    last attempt left in it: with gloo every restart then fails to connect.  So each attempt has its own prefix.
    """
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return FileStore(str(Path(tempfile.mkdtemp(prefix="swinv2_train_")) / "store"), 1)
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
        store = TCPStore(address, port, world_size, is_master=is_master, timeout=timeout, wait_for_workers=False)
    except socket.gaierror as error:
        raise ConfigError(
            f"MASTER_ADDR ({host}) has no address on {socket.gethostname()}: {error.strerror}; "
            "set MASTER_ADDR to an address of rank 0's host that every rank can reach"
        ) from error
    except dist.DistNetworkError as error:
        if is_master:
            raise ConfigError(
                f"rank 0 cannot listen on MASTER_PORT ({port}): {str(error).splitlines()[0]}; "
                "another program has it: set MASTER_PORT to a free port"
            ) from error
        raise ConfigError(
            f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at MASTER_ADDR ({host}), MASTER_PORT ({port}): "
            f"{str(error).splitlines()[0]}; is rank 0 running there, and no firewall between?"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed = PrefixStore(f"attempt_{attempt}", store)
    _meet(prefixed, rank, world_size, timeout)
    return prefixed


def _meet(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> None:
    """ConfigError on every rank that can be reached, unless each of 0 .. world_size - 1 comes once and says the same.

    Collectives among ranks of different numbers would wait until the time is up, and not say for whom.
    """
    host = socket.gethostname()
    come = "start all ranks of a run, and of this run alone, with one torchrun or srun"
    if store.add(f"arrived_{rank}", 1) > 1:
        text = f"two processes call themselves RANK {rank}, one of them on {host}; {come}"
        store.set("verdict", text)
        raise ConfigError(text)
    store.set(f"rank_{rank}", f"{world_size} on {host}")
    if rank == 0:
        store.set("verdict", _verdict(store, world_size, host, timeout, come))
    else:
        store.wait(["verdict"], timeout + datetime.timedelta(seconds=10))
    if text := store.get("verdict").decode():
        raise ConfigError(text)


def _verdict(store: Store, world_size: int, host: str, timeout: datetime.timedelta, remedy: str) -> str:
    """What rank 0 finds wrong with those who came, or nothing."""
    ranks = [f"rank_{rank}" for rank in range(world_size)]
    try:
        store.wait(ranks, timeout)
    except dist.DistStoreError:
        absent = ", ".join(str(rank) for rank, name in enumerate(ranks) if not store.check([name]))
        return f"of {world_size} ranks these did not come within {timeout.total_seconds():.0f} s: {absent}; {remedy}"
    said = [store.get(name).decode() for name in ranks]
    others = [f"rank {rank} has {text}" for rank, text in enumerate(said) if text.split()[0] != str(world_size)]
    return f"rank 0 has WORLD_SIZE {world_size} on {host}, {', '.join(others)}; {remedy}" if others else ""
