"""The process group, from torchrun, from srun or alone, and the few collectives that the packages above need.

A single process also gets a real group of one, because DeepSpeed needs one.  Every function below works without a
group too and then speaks for one process, so that tools and tests can use the same code.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from swinv2_train.config import ConfigError, MachineError, OutageError


@dataclass(frozen=True)
class World:
    """Who this process is among all ranks."""

    rank: int
    """0 .. world_size - 1 over all hosts."""
    local_rank: int
    """0 .. local_world_size - 1 on this host."""
    world_size: int
    """Processes of the run."""
    local_world_size: int
    """Processes of the run on this host."""
    device: torch.device
    """Where this rank computes."""
    cores: int = 1
    """CPU cores that are this rank's alone, or its share of those that it has together with others of its host."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks and writes."""
        return self.rank == 0


class RankError(RuntimeError):
    """Another rank failed; the message names the ranks and what they said."""


def barrier() -> None:
    """Wait until every rank is here."""
    any_rank(False)  # an all_reduce, since NCCL's own barrier has to guess the device


def any_rank(flag: bool) -> bool:
    """True on every rank when flag is true on at least one."""
    return bool(all_reduce_max(int(flag)))


def all_reduce_max(value: int) -> int:
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


def sum_with_gradient(values: torch.Tensor) -> torch.Tensor:
    """As all_reduce_sum, and so that the gradient of every rank's result comes to every rank's values.

    Ranks must come to its backward passes in the same order too.
    """
    total: torch.Tensor = _SumWithGradient.apply(values)
    return total


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient)


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Every rank's tensor, (ranks, ...) on values' own device.  values: of the same shape and dtype on every rank."""
    if not _active():
        return values.unsqueeze(0)
    found = torch.empty(dist.get_world_size(), *values.shape, dtype=values.dtype, device=_device())
    dist.all_gather(list(found.unbind()), values.to(_device()).contiguous())
    return found.to(values.device)


def all_to_all(values: torch.Tensor) -> torch.Tensor:
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
    mine = None if error is None else (_kind_of(error), _text_of(error))
    everyone = gather_objects(mine)
    ranks_by_text: dict[str, list[int]] = {}
    for rank, entry in enumerate(everyone):
        if entry is not None:
            ranks_by_text.setdefault(entry[1], []).append(rank)
    if not ranks_by_text:
        return
    if all(entry is None or entry[0] for entry in everyone):
        kinds = {entry[0] for entry in everyone if entry is not None}
        kind = OutageError if kinds == {OutageError} else ConfigError
        if len(ranks_by_text) == 1 and all(entry is not None for entry in everyone):
            raise kind(next(iter(ranks_by_text))) from error
        raise kind(_listed(ranks_by_text)) from error
    raise RankError(_listed(ranks_by_text)) from error


# --------------------------------------------------------------------------------------------------------------------


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where the group's collectives take their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _kind_of(error: BaseException) -> type[ConfigError] | None:
    """What it is to all ranks: a ConfigError, among these what is the machine's, or neither."""
    if isinstance(error, MachineError):
        return OutageError
    return ConfigError if isinstance(error, ConfigError) else None


def _text_of(error: BaseException) -> str:
    return str(error) if isinstance(error, ConfigError | MachineError) else f"{type(error).__name__}: {error}"


def _listed(ranks_by_text: dict[str, list[int]]) -> str:
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
        for text, ranks in ranks_by_text.items()
    )


def on_main(world: World, function: Callable[[], Any]) -> Any:
    """Rank 0's result of a function on every rank; what it raises, every rank raises.

    A file that cannot be read or written is the user's to fix, so an OSError becomes a ConfigError.
    """
    result: Any = None
    problem: str | None = None
    kind: type[ConfigError] | None = ConfigError
    if world.is_main:
        try:
            result = function()
        except (ConfigError, MachineError, OSError) as error:
            problem, kind = str(error), _kind_of(error) or ConfigError
        except Exception:
            broadcast_object((None, f"rank 0 failed:\n{traceback.format_exc()}", None))
            raise
    result, problem, kind = broadcast_object((result, problem, kind))
    if problem is not None:
        raise RuntimeError(problem) if kind is None else kind(problem)
    return result
