"""Worker processes that make batches, and their end."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from swinv2_train.config import ConfigError, DataConfig, MachineError
from swinv2_train.config.pixels import CLIP_EXTENSIONS
from swinv2_train.config.shown import MESSAGE_CHARACTERS, NOTES, shown
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.opening import open_clip
from swinv2_train.data.loading.shared_memory import Batch, BatchMemory, PlacedBatch, SentBatch
from swinv2_train.data.sample import Sample, lacking
from swinv2_train.data.transforms.bands import Bands, decode_bands
from swinv2_train.data.transforms.decode import DecodeError, decode_image
from swinv2_train.runtime import available_cores

_WORDS = "{shard}: sample '{key}': {cause}"
_log = getLogger(__name__)
_ANSWERED_BY_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_LEAVE = signal.SIGALRM
"""Ends a worker that waits for something: it lets go of its command, its files and its locks."""
_PATIENCE_SEC = 1.0
"""For a worker to end of itself, and again when it was told to."""
_PR_SET_PDEATHSIG = 1
MOST_WORKERS = 8
"""That a rank has where data.num_workers is null."""


class WorkerError(MachineError):
    """A worker process failed or died; the text holds its traceback, where there is one."""


class Fetch(ABC):
    """A picklable maker of batches, of which every worker has a copy."""

    out: Mapping[str, Tensor] = {}
    """Where the next batch is to be put; empty: anywhere."""

    bands: Bands | None = None
    """How files are read as values; None = as photographs."""

    told_of_damage = "damaged sample replaced"
    """What the log says of one that follows data.on_bad_sample=replace."""

    def __init__(self) -> None:
        self._notes: set[str] = set()
        self._said: set[str] = set()

    def __getitems__(self, request: Any) -> Batch | ConfigError | MachineError:
        """The batch, or the error to raise in the main process."""
        try:
            return self.batch(request)
        except (ConfigError, MachineError) as error:
            return error
        except Exception as error:
            fault = lacking(error)
            if fault is None:
                raise
            return MachineError(f"a batch cannot be made: {fault}")

    @abstractmethod
    def batch(self, request: Any) -> Batch:
        """The batch that is asked for, with "keys", "num_bad" and "problems"; "notes" is what is to be said once."""

    def decoded(self, sample: Sample) -> Tensor:
        """The image: uint8 (3, H, W), or the values of its bands.  Raises DecodeError; MachineError, which names the
        sample.
        """
        if sample.extension in CLIP_EXTENSIONS:
            raise DecodeError(f"a .{sample.extension} file is a clip; set model.frames to read clips")
        try:
            if self.bands is not None:
                return decode_bands(sample.image, sample.extension, self.bands, notes=self._notes)
            return decode_image(sample.image, sample.extension, notes=self._notes)
        except MachineError as error:
            raise MachineError(f"{sample.shard}: sample '{sample.key}': {error}") from error

    def opened(self, sample: Sample, decoder: str) -> Clip:
        """The clip, of which nothing is decoded yet.  Raises DecodeError."""
        return open_clip(sample.image, sample.extension, sample.times, decoder)

    def noted(self) -> Batch:
        """The entry "notes" of a batch: what this process has not said before; nothing where there is none."""
        new = sorted(self._notes - self._said)
        self._said.update(new)
        return {"notes": new} if new else {}

    def memory(self, ahead: int) -> BatchMemory | None:
        """For all batches under way, of which `ahead` have not arrived yet; None: each is sent in memory of its own."""
        return None


def with_workers(data: DataConfig, cores: int) -> DataConfig:
    """`data` with a number of workers: where it has none, one for each of a rank's cores but one, 1 to MOST_WORKERS."""
    return replace(data, num_workers=min(MOST_WORKERS, max(1, cores - 1))) if data.num_workers is None else data


class Workers:
    """Runs a Fetch over requests, here or in worker processes, and ends those processes in every case."""

    def __init__(self, owner: object, told: set[str] | None = None) -> None:
        """told: what others that share it have said of files and samples, and is not said again."""
        self._running: dict[str, Any] = {}
        self._told, self._said = told, set[str]() if told is None else told
        # Workers ignore SIGTERM, so they must be told to end before multiprocessing's own exit handler joins them.
        # The registry keeps `_running` alive: nothing in it may lead back to `owner`, or that would never be freed.
        weakref.finalize(owner, _stop, self._running)

    def run(self, fetch: Fetch, requests: Iterable[Any], config: DataConfig) -> Iterator[Batch]:
        results: Iterator[Any]
        workers = with_workers(config, available_cores()).num_workers or 0  # one that no rank made has the machine
        if workers == 0:
            results = map(fetch.__getitems__, requests)
        else:
            if "loader" not in self._running:
                warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
                prefetch = max(config.prefetch_batches, 1)
                memory = fetch.memory(workers * prefetch)
                asked: Any = _Requests(requests, memory)  # DataLoader's types know lists alone
                self._running["loader"] = DataLoader(
                    _InWorker(fetch, memory),
                    batch_sampler=asked,
                    num_workers=workers,
                    prefetch_factor=prefetch,
                    persistent_workers=True,
                    collate_fn=_same,
                    worker_init_fn=_init_worker,
                    pin_memory=torch.cuda.is_available(),
                    generator=torch.Generator().manual_seed(0),  # else the global generator would be drawn from
                )
            results = self._started()
        for result in _told(results):
            if isinstance(result, Exception):
                self.close()
                raise result
            for note in result.pop("notes", ()):
                if note not in self._said:
                    self._said.add(note)
                    getLogger(NOTES).warning("%s", shown(note, MESSAGE_CHARACTERS))
            for problem in result["problems"]:
                text = shown(_WORDS.format(**problem), MESSAGE_CHARACTERS)
                if self._told is None or text not in self._told:
                    _log.warning("%s: %s", fetch.told_of_damage, text)
                if self._told is not None:
                    self._told.add(text)
            yield result

    def _started(self) -> Iterator[Any]:
        """The batches of the worker processes, which are started where they are not yet."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED_BY_MAIN)  # a new worker ignores them too late
        try:
            return iter(self._running["loader"])
        except OSError as error:
            if error.errno == errno.ENOSPC:  # semaphores lie there
                raise MachineError(f"data.num_workers: no data worker can be started ({error}); {_room()}") from error
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def close(self) -> None:
        _stop(self._running)


def _told(results: Iterator[Any]) -> Iterator[Any]:
    """The results; the death of a worker process is told in our words."""
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            raise worker_death(error) or error from error
        yield result


def worker_death(error: BaseException) -> WorkerError | None:
    """What torch says of a worker process that has ended, in our words; None for another error.

    torch notices it wherever the training process happens to be.
    """
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
    if found is None:
        return None
    how = found[2].split(".")[0].strip()
    if "Bus error" in how:
        return WorkerError(
            f"a data worker (pid {found[1]}) {how}: its shared memory or a file under it is gone; {_room()}"
        )
    return WorkerError(
        f"a data worker (pid {found[1]}) {how}; where nobody killed it, the machine ran out of memory (see dmesg): "
        "lower data.num_workers, data.prefetch_batches or train.micro_batch_size; the same command resumes"
    )


def _room() -> str:
    try:
        shared = os.statvfs("/dev/shm")
        size, free = (blocks * shared.f_frsize / 2**20 for blocks in (shared.f_blocks, shared.f_bavail))
        has = f"the shared memory /dev/shm has {size:,.0f} MiB, {free:,.0f} of them free"
    except OSError:
        has = "there is no shared memory, /dev/shm"
    return (
        f"{has}: enlarge it (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm), or set data.num_workers=0"
    )


def _stop(running: dict[str, Any]) -> None:
    """End the workers: of themselves, or, where they wait for a command or a server, by force."""
    loader: DataLoader[Any] | None = running.pop("loader", None)
    iterator: Any = getattr(loader, "_iterator", None)
    if iterator is None:
        return
    workers = iterator._workers
    # set() takes a lock that the workers share; one that is killed, or told to leave, at that moment takes it along
    iterator._workers_done_event._flag.release()
    iterator._workers_done_event = threading.Event()  # which torch sets again
    for requests in iterator._index_queues:
        requests.put(None)
    for number in (_LEAVE, signal.SIGKILL):
        if _ended(workers):
            break
        signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]  # or it would be an error
        iterator._worker_pids_set = False
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid, number)
    iterator._shutdown_workers()


def _ended(workers: Sequence[Any]) -> bool:
    deadline = time.monotonic() + _PATIENCE_SEC
    while any(worker.is_alive() for worker in workers):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


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

    def __getitems__(self, asked: tuple[Any, int | None]) -> Batch | PlacedBatch | SentBatch | Exception:
        try:
            return self._batch(*asked)
        except Exception as error:  # noqa: BLE001  one that cannot be pickled would never arrive, and be waited for
            text = "".join(traceback.format_exception(error)).rstrip()
            first = " ".join(str(error).split())[:500]
            if isinstance(error, OSError | RuntimeError) and ("shared memory" in first or "/torch_" in first):
                first = f"{first}; {_room()}"
            return WorkerError(f"a data worker failed: {type(error).__name__}: {first}\n{text}")

    def _batch(self, request: Any, slot: int | None) -> Batch | PlacedBatch | SentBatch | Exception:
        self.fetch.out = {} if self.memory is None or slot is None else self.memory.tensors(slot)
        batch = self.fetch.__getitems__(request)
        if isinstance(batch, Exception):
            return batch
        if self.memory is None or slot is None or batch["weight"] is not self.fetch.out.get("weight"):
            return SentBatch(batch)
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
    signal.signal(_LEAVE, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_ANSWERED_BY_MAIN, _LEAVE})
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # a worker that waits does not see that the training process was killed
        libc.prctl(_PR_SET_PDEATHSIG, int(_LEAVE), 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # before it could be told
        _leave(_LEAVE, None)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)
