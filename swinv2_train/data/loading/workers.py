"""Worker processes that make batches, and their end."""

from __future__ import annotations

import gc
import signal
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from swinv2_train.config import ConfigError, DataConfig
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown
from swinv2_train.data.loading.shared_memory import Batch, BatchMemory, PlacedBatch, fits

_WORDS = "{shard}: sample '{key}': {cause}"
_log = getLogger(__name__)
_ANSWERED_BY_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


Row = dict[str, Any]
"""A sample by name: tensors, all of fixed shape, and plain values, which stay in the host's memory."""


class Fetch(ABC):
    """A picklable maker of batches, of which every worker has a copy."""

    out: Mapping[str, Tensor] = {}
    """Where stacked() is to put the next batch; empty: anywhere."""

    @abstractmethod
    def __getitems__(self, request: Any) -> Batch | ConfigError:
        """The batch, or the error to raise in the main process (DataLoader would wrap it into a traceback)."""

    def memory(self, ahead: int) -> BatchMemory | None:
        """For all batches under way, of which `ahead` have not arrived yet; None: each is sent in memory of its own."""
        return None

    def stacked(self, rows: Sequence[Row], weights: Sequence[float]) -> Batch:
        """The rows' tensors as (B, ...), their plain values as lists, and "weight" float32 (B,)."""
        weight, tensors = torch.tensor(weights), tensors_of(rows[0])
        plain = {name: [row[name] for row in rows] for name in rows[0] if name not in tensors}
        if not fits(self.out, {**tensors, "weight": weight[0]}, len(rows)):
            # in a worker default_collate stacks into new shared memory at once, which saves a copy
            stacked = {name: default_collate([row[name] for row in rows]) for name in tensors}
            return {**stacked, **plain, "weight": weight}
        for name in tensors:
            torch.stack([row[name] for row in rows], out=self.out[name])
        self.out["weight"].copy_(weight)
        return {**self.out, **plain}


def tensors_of(row: Row) -> dict[str, Tensor]:
    """What of a row is stacked."""
    return {name: value for name, value in row.items() if isinstance(value, Tensor)}


class Workers:
    """Runs a Fetch over requests, here or in worker processes, and ends those processes in every case."""

    def __init__(self, owner: object) -> None:
        self._running: dict[str, Any] = {}
        # Workers ignore SIGTERM, so they must be told to end before multiprocessing's own exit handler joins them.
        # The registry keeps `_running` alive: nothing in it may lead back to `owner`, or that would never be freed.
        weakref.finalize(owner, _stop, self._running)

    def run(self, fetch: Fetch, requests: Iterable[Any], config: DataConfig) -> Iterator[Batch]:
        results: Iterator[Any]
        if config.num_workers == 0:
            results = map(fetch.__getitems__, requests)
        else:
            if "loader" not in self._running:
                warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
                prefetch = max(config.prefetch_batches, 1)
                memory = fetch.memory(config.num_workers * prefetch)
                asked: Any = _Requests(requests, memory)  # DataLoader's types know lists alone
                self._running["loader"] = DataLoader(
                    _InWorker(fetch, memory),
                    batch_sampler=asked,
                    num_workers=config.num_workers,
                    prefetch_factor=prefetch,
                    persistent_workers=True,
                    collate_fn=_same,
                    worker_init_fn=_init_worker,
                    pin_memory=torch.cuda.is_available(),
                    generator=torch.Generator().manual_seed(0),  # else the global generator would be drawn from
                )
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED_BY_MAIN)  # a new worker ignores them too late
            try:
                results = iter(self._running["loader"])
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for result in results:
            if isinstance(result, ConfigError):
                self.close()
                raise result
            for problem in result["problems"]:
                _log.warning("damaged sample replaced: %s", shown(_WORDS.format(**problem), MESSAGE_CHARACTERS))
            yield result

    def close(self) -> None:
        _stop(self._running)


def _stop(running: dict[str, Any]) -> None:
    loader: DataLoader[Any] | None = running.pop("loader", None)
    stop: Callable[[], None] | None = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if stop is not None:
        stop()


@dataclass(frozen=True)
class _Requests:
    """The requests, each with the slot of the shared memory that it is to fill; runs in the training process."""

    requests: Iterable[Any]
    memory: BatchMemory | None

    def __iter__(self) -> Iterator[tuple[Any, int | None]]:
        for request in self.requests:
            yield request, None if self.memory is None else self.memory.take()


class _InWorker(Dataset[Any]):
    """A Fetch that puts its batches where it is told to."""

    def __init__(self, fetch: Fetch, memory: BatchMemory | None) -> None:
        self.fetch, self.memory = fetch, memory

    def __getitems__(self, asked: tuple[Any, int | None]) -> Batch | PlacedBatch | ConfigError:
        request, slot = asked
        if self.memory is None or slot is None:
            self.fetch.out = {}
            return self.fetch.__getitems__(request)
        self.fetch.out = self.memory.tensors(slot)
        batch = self.fetch.__getitems__(request)
        if isinstance(batch, ConfigError) or batch["weight"] is not self.fetch.out["weight"]:
            return batch
        return self.memory.placed(slot, {name: value for name, value in batch.items() if name not in self.fetch.out})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memory": None}  # a process that is not forked does not have it


def _same(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    """Ctrl-C and the scheduler's signals reach the whole process group; the training process alone answers them."""
    gc.enable()  # where the training process collects between steps alone (training/garbage_collection.py)
    for number in _ANSWERED_BY_MAIN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ANSWERED_BY_MAIN)
