"""The process around a run: seeds, threads, stop signals, exit codes, and the record of where a run was started.

torch is imported inside the functions, so that a wrong configuration is answered before that costs its seconds.
"""

from __future__ import annotations

import ctypes
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 3

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RECORDED_PACKAGES = (
    "swinv2-train", "torch", "deepspeed", "fairscale", "webdataset", "wandb", "hydra-core", "omegaconf", "numpy",
    "pillow", "simplejpeg", "timm", "safetensors",
)  # fmt: skip
_GIB = 1024**3


# --------------------------------------------------------------------------------------------------------------------
# Seeds and threads


def seed_everything(seed: int, rank: int) -> None:
    """Seed python, numpy and torch (CPU and every CUDA device) with a number that belongs to (seed, rank).

    Ranks get distinct streams, so stochastic depth differs between them.  Initial weights do not come from here
    (tasks/initial.py).
    """
    import torch

    words = np.random.SeedSequence([seed, rank]).generate_state(3, dtype=np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def tune_allocator() -> bool:
    """Let this process keep the memory that it frees; returns whether the C library can (glibc).

    A training step on a CPU asks for the same large tensors again and again.  By default glibc gives each back to the
    system and gets new pages, every one of which faults (benchmarks/speed_cpu_202611.md has a row for the difference).
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 * 2**20))
    accepted = [mallopt(which, value) == 1 for which, value in settings]
    return all(accepted)


def available_cores() -> int:
    """CPU cores this process may use: its affinity mask, and a container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, _, period = quota_file.read_text().strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(quota) > 0:
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def set_threads(num_threads: int | None, local_world_size: int) -> int:
    """Give torch num_threads CPU threads, or an equal share of this host's cores when None.  Returns the number.

    torchrun sets OMP_NUM_THREADS=1 for more than one process per node; this call overrides it for torch.
    """
    import torch

    threads = num_threads if num_threads is not None else max(1, available_cores() // max(1, local_world_size))
    torch.set_num_threads(threads)
    return threads


# --------------------------------------------------------------------------------------------------------------------
# Stop on request


class StopRequest:
    """Turns SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and a time limit into a flag that the training loop reads between steps.

    So does the death of torchrun, which ends its ranks by a signal unless it is killed itself.  Without torchrun a
    parent that ends means nothing: the shell of a nohup or an srun may.  A further signal only sets the flag again, so
    an impatient second Ctrl-C cannot tear a checkpoint.  Each rank sees its own signals: the loop agrees over the ranks
    (``distributed.any_rank(stop.requested is not None)``).

        with StopRequest() as stop:
            ...
            if any_rank(stop.requested is not None): save and leave with EXIT_STOPPED
    """

    def __init__(self, after_sec: float | None = None) -> None:
        """after_sec: seconds from now after which a stop is requested; None = never."""
        self._deadline = math.inf if after_sec is None else time.monotonic() + after_sec
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        """Name of the last stop signal, e.g. "SIGTERM", or another reason; None while nothing asks to stop."""
        if self._signal is None and self._torchrun not in (None, os.getppid()):
            return "the death of torchrun"
        return self._signal or ("the time limit" if time.monotonic() >= self._deadline else None)

    def install(self) -> Self:
        """Install the handlers; main thread only (a rule of Python's signal module)."""
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def uninstall(self) -> None:
        """Put the handlers back that were there before install."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, *exc_info: object) -> None:
        if self._signal is None:
            self.uninstall()
        else:  # the process is about to end, and an impatient signal must not change how
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------------------------
# One run in a directory


class RunDirLock:
    """Keeps a second run out of a run directory while this process lives; its end, however it comes, lets go.

    The lock is the kernel's, on the directory itself, and no file.  A file system without locks goes without.
    """

    def __init__(self, run_dir: Path, wait_sec: float = 30.0) -> None:
        """wait_sec: how long to wait for a run that is about to end, as one that is writing its last checkpoint."""
        self._run_dir = run_dir
        self._wait_sec = wait_sec
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, where the directory exists and it is not ours yet.  Rank 0 only.

        Raises BlockingIOError when another run holds it for longer than wait_sec.
        """
        if self._descriptor is not None or not self._run_dir.is_dir():
            return
        descriptor = os.open(self._run_dir, os.O_RDONLY)
        deadline = time.monotonic() + self._wait_sec
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise BlockingIOError(
                        f"run_dir ({self._run_dir}) is in use by another run; end that first, or choose another run_dir"
                    ) from None
                time.sleep(0.1)
            except OSError:  # no locks here
                break
        self._descriptor = descriptor

    def release(self) -> None:
        """Let another run in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


# --------------------------------------------------------------------------------------------------------------------
# Where a run was started


def environment_record(world_size: int) -> dict[str, Any]:
    """What a reader needs to repeat or to judge a run: versions, commit, hardware, number of ranks, time, command.

    Versions come from the installed metadata (nothing is imported for them); null means not installed or not known.
    """
    import torch

    return {
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "world_size": world_size,
        "git": git_commit(),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in RECORDED_PACKAGES},
    }


def record_environment(run_dir: Path, world_size: int) -> dict[str, Any]:
    """Append this start's record to RUN_DIR/environment.json, a list with one entry per start.  Call it on rank 0.

    The file is replaced atomically.  An unreadable file (a torn copy, say) stays beside it as environment.json.damaged.
    """
    path = run_dir / "environment.json"
    record = environment_record(world_size)
    starts = read_environment(run_dir)
    if path.exists() and not starts:
        path.replace(path.with_name("environment.json.damaged"))
    starts.append(record)
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(starts, indent=2) + "\n")
    return record


def read_environment(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all starts of a run, oldest first; empty when the file is missing or unreadable."""
    path = run_dir / "environment.json"
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_text())
    except ValueError:
        return []
    return starts if isinstance(starts, list) else []


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old text or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would take the room of the next attempt
        raise


def git_commit() -> dict[str, Any] | None:
    """{"commit": hash, "dirty": bool} of the repository that tracks this very file, or that launch/train.sbatch took
    this copy from; None for an installed one.
    """
    folder = Path(__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        commit_file = folder.parent / "commit.txt"
        if not commit_file.is_file():
            return None
        changes = folder.parent / "changes.patch"
        return {"commit": commit_file.read_text().strip(), "dirty": changes.stat().st_size > 0}
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:  # a repository before its first commit
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None when git is missing, slow or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], check=False, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    """An installed package's version, from its metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": device.name, "memory_gib": round(device.total_memory / _GIB, 1)} for device in devices]
