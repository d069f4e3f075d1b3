"""The fused kernels beside the reference, forward and backward, on what a run will use, before they serve.

A card, compiler or Triton that they do not work on so costs speed and no run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from swinv2_train.models.kernels import cpu_attention, failures
from swinv2_train.models.kernels.failures import Case
from swinv2_train.models.kernels.requirements import missing_for_triton
from swinv2_train.models.precision import without_autocast
from swinv2_train.models.sequential import Chunks, sequential_window_attention
from swinv2_train.models.windows import WindowGrid, num_offsets

LIMIT_SEC = 300.0
"""For all cases of a start together; compiling takes seconds for each."""
ENDING_SEC = 20.0
"""How long a stop waits for the case under way."""
HEADS = 2
_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Of the largest entry."""
_KERNELS = sorted([*Path(__file__).parent.glob("*.py"), *cpu_attention.SOURCES])
Attention = Callable[[Tensor, Tensor, Tensor, WindowGrid, int], Tensor]
_good: set[tuple[Case, str]] = set()
_bad: dict[tuple[Case, str], str] = {}


def problems_of(
    cases: Iterable[Case], device: torch.device, fused: Attention, limit_sec: float | None = None
) -> dict[Case, str]:
    """What is wrong with the kernels on this device, by case; those that are not named are good.

    fused: dispatch.fused_window_attention.  limit_sec: None = LIMIT_SEC.
    Each is tried once in a process.  What was good in an earlier process on this host, with this card, these versions
    and sources, is not tried again; what failed is.  After limit_sec what is not done counts as failed: its thread is
    left behind, since a compiler or a kernel that hangs cannot be interrupted.  Draws none of the run's random numbers.
    """
    cases, limit_sec = list(dict.fromkeys(cases)), LIMIT_SEC if limit_sec is None else limit_sec
    known = {case for case in cases if (case, device.type) in _good or (case, device.type) in _bad}
    waiting = [case for case in cases if case not in known and not _was_good(case, device)]
    for case in waiting:
        _bad[case, device.type] = f"the trial was not done within {limit_sec:g} s"

    given_up = threading.Event()

    def work() -> None:
        for case in waiting:
            if given_up.is_set():
                return
            problem = _trial(case, device, fused)
            if problem is None:
                _good.add((case, device.type))
                _bad.pop((case, device.type), None)
                _remember(case, device)
            else:
                _bad[case, device.type] = problem

    if waiting:
        thread = threading.Thread(target=work, name="kernel trial", daemon=True)
        with failures.raised():
            thread.start()
            try:
                thread.join(limit_sec)
            except BaseException:  # a stop: a process must not end while a thread of it is in the driver
                given_up.set()
                thread.join(ENDING_SEC)
                raise
    return {case: _bad[case, device.type] for case in cases if (case, device.type) in _bad}


def is_good(case: Case, device: torch.device) -> bool:
    """Whether this process knows that the kernels are good at it."""
    return (case, device.type) in _good


def forget() -> None:
    """Let everything be tried again in this process."""
    _good.clear()
    _bad.clear()


def _trial(case: Case, device: torch.device, fused: Attention) -> str | None:
    """One case beside the reference; what goes wrong, or None."""
    grid = case.grid
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, *grid.size, 3 * HEADS * case.head_dim, generator=generator).to(device, case.dtype)
    scale = torch.full((HEADS, 1, 1), 10.0, device=device)
    table = torch.rand(num_offsets(grid.window), HEADS, generator=generator).to(device)
    chunk = Chunks(None, 64.0).windows_at_a_time(grid, HEADS, case.dtype)
    results = []
    try:
        with torch.enable_grad(), without_autocast(device):
            for serves in (True, False):
                q, s, t = (x.detach().requires_grad_() for x in (qkv, scale, table))
                arguments = (q, s, t, grid, HEADS)
                out = fused(*arguments) if serves else sequential_window_attention(*arguments, chunk)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, s, t))])
        differences = [_difference(ours, theirs) for ours, theirs in zip(*results, strict=True)]
    except Exception as error:  # noqa: BLE001  whatever a compiler or driver raises
        return _with_missing(failures.cause_of(error), device)
    good = all(difference <= _BOUNDS[case.dtype] for difference in differences)  # not if one is not a number
    return None if good else f"the kernels are {max(differences):.2g} from the reference"


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one, as a share of the reference's largest value, which may be 0: alone in its window a token's
    logit weighs nothing, and no gradient leads to scale and bias.
    """
    largest = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (largest or 1.0)


def _with_missing(cause: str, device: torch.device) -> str:
    """A cause, and what this machine lacks: of a header that is not there Triton says only that gcc returned 1."""
    missing = missing_for_triton() if device.type == "cuda" else {}
    return "; ".join([cause, *(f"{name}: {problem}" for name, problem in missing.items())])


# What was good in an earlier process ----------------------------------------------------------------------------------


def _was_good(case: Case, device: torch.device) -> bool:
    file = _file(case, device)
    good = file is not None and file.exists()
    if good:
        _good.add((case, device.type))
    return good


def _remember(case: Case, device: torch.device) -> None:
    if (file := _file(case, device)) is not None:
        with contextlib.suppress(OSError):
            file.touch()


def _file(case: Case, device: torch.device) -> Path | None:
    """An empty file that says so; None where there is no place for it.

    In $TRITON_CACHE_DIR, which launch files put on the node's own disk, else where the CPU's kernel is kept.  The host
    is part of its name, because compilers and drivers are the node's.
    """
    given = os.environ.get("TRITON_CACHE_DIR")
    directory = (
        cpu_attention.private_directory(Path(given) / "swinv2_train") if given else cpu_attention.cache_directory()
    )
    if directory is None:
        return None
    what = repr((case, socket.gethostname(), _card(device), torch.__version__, _triton(), _sources()))
    return directory / f"kernels_good_{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def _card(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)} {torch.version.cuda}"
    return cpu_attention.fingerprint() or "?"


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _sources() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in _KERNELS)).hexdigest()
