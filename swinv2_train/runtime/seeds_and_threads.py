"""Seeds, CPU threads and the memory allocator of a process."""

from __future__ import annotations

import ctypes
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed python, numpy and torch (CPU and every CUDA device) with a number that belongs to (seed, rank).

    Ranks get distinct streams, so stochastic depth differs between them.  Initial weights do not come from here
    (training/initial_values.py).
    """
    import torch

    words = np.random.SeedSequence([seed, rank]).generate_state(3, dtype=np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def keep_random_state(device: torch.device) -> Callable[[], None]:
    """Remember the random states of python, numpy and torch (CPU and this device); returns what puts them back."""
    import torch

    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return put_back


def tune_allocator() -> bool:
    """Let this process keep the memory that it frees; returns whether the C library can (glibc).

    A training step on a CPU asks for the same large tensors again and again.  By default glibc gives each back to the
    system and gets new pages, every one of which faults (benchmarks/speed_cpu_avx512_202611.md has a row for the
    difference).
    """
    return _set_allocator(mmap_max=0, trim_threshold=-1, top_pad=64 * 2**20)


def release_memory() -> None:
    """Give back what this process has freed and kept, on a device too, and undo tune_allocator."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if _set_allocator(mmap_max=65536, trim_threshold=128 * 2**10, top_pad=128 * 2**10):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def _set_allocator(mmap_max: int, trim_threshold: int, top_pad: int) -> bool:
    """By mallopt(3)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    accepted = [mallopt(which, value) == 1 for which, value in ((-4, mmap_max), (-1, trim_threshold), (-2, top_pad))]
    return all(accepted)


def core_numbers() -> list[int]:
    """The CPU cores that this process may run on, by its affinity mask."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def core_quota() -> float:
    """The cores' worth of time that a container has (cgroup v2); infinity where it is not limited."""
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, _, period = quota_file.read_text().strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(quota) > 0:
            return int(quota) / int(period)
    return math.inf


def available_cores() -> int:
    """CPU cores this process may use: its affinity mask, and a container's quota."""
    return max(1, int(min(len(core_numbers()), core_quota())))


def set_threads(num_threads: int | None, cores: int) -> int:
    """Give torch num_threads CPU threads, or one for each of a rank's cores when None.  Returns the number.

    torchrun sets OMP_NUM_THREADS=1 for more than one process per node; this call overrides it for torch.
    """
    import torch

    threads = num_threads if num_threads is not None else cores
    torch.set_num_threads(threads)
    return threads
