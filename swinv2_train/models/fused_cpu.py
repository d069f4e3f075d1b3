"""Windowed cosine attention on a CPU: fused_cpu.cpp, compiled on first use by the machine's C++ compiler.

Legend: B batch, H W tokens per side, C channels, nW windows per image, N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from swinv2_train.models.windows import WindowGrid, window_regions, window_tokens

DTYPES = (torch.float32, torch.bfloat16)
MAX_TOKENS = 1024  # of a window: a thread holds four N x N float32 matrices, 16 MiB
ITEMS = 96  # pieces of work of a call, at least: a chunk of windows and a head each; fixed, whatever the machine
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
SOURCE = Path(__file__).with_suffix(".cpp")


class _Sizes(ctypes.Structure):
    names = ("batch", "map", "windows", "rows", "cols", "heads", "dim", "chunks")
    _fields_ = [(name, ctypes.c_long) for name in names]


def problem() -> str | None:
    """Why there is no compiled kernel on this machine, in a few words; None where there is one."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        return None, "there is no C++ compiler (g++, clang++, or what CXX names)"
    try:
        with tempfile.TemporaryDirectory() as private:
            kept = _cache_directory()
            library = (kept or Path(private)) / f"fused_cpu_{_fingerprint(compiler)}.so"
            if not library.exists():
                part = library.with_suffix(f".{os.getpid()}")
                subprocess.run([compiler, *FLAGS, "-o", part, SOURCE], check=True, capture_output=True, timeout=120)
                part.replace(library)  # whole or absent, however many processes compile it at once
            return ctypes.CDLL(str(library)), None
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        last = said.decode(errors="replace").strip().splitlines()[-1] if said else error
        return None, f"{compiler} could not compile it: {last}"


def _cache_directory() -> Path | None:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/swinv2_train, or in ~/.cache; None if it cannot be written."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "swinv2_train"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK) else None


def _fingerprint(compiler: str) -> str:
    """Of all that a compiled kernel follows from, the processor too: homes are shared between machines."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    cpu = Path("/proc/cpuinfo")
    features = {line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))}
    what = (SOURCE.read_text(), FLAGS, version, platform.machine(), sorted(features))
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


class _Call:
    """The arguments that forward and backward share, and the tensors they point into."""

    def __init__(self, qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, heads: int) -> None:
        tokens, regions = window_tokens(grid, qkv.device), window_regions(grid, qkv.device)
        windows = tokens.shape[0]
        self.chunks = min(qkv.shape[0] * windows, math.ceil(ITEMS / heads))
        self.table = table.t().contiguous()  # (h, offsets)
        sizes = _Sizes(
            qkv.shape[0], math.prod(grid.size), windows, *grid.window, heads, qkv.shape[-1] // (3 * heads), self.chunks
        )
        self.tensors = (qkv, scale, self.table, tokens.contiguous(), regions.contiguous())
        self.arguments = (int(qkv.dtype == torch.bfloat16), ctypes.byref(sizes), *map(_address, self.tensors))


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def forward(qkv: Tensor, scale: Tensor, table: Tensor, out: Tensor, lse: Tensor, grid: WindowGrid, heads: int) -> None:
    """Write the attention of qkv (B, H, W, 3C) into out (B, H, W, C), and the logarithms of the softmax's denominators
    into lse (B*nW, h, N).  All contiguous; otherwise as :func:`swinv2_train.models.fused.fused_window_attention`."""
    call, (library, _) = _Call(qkv, scale, table, grid, heads), _load()
    assert library is not None, "ask problem() first"
    threads = torch.get_num_threads()
    library.window_attention_forward(*call.arguments, _address(out), _address(lse), threads)


def backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, table: Tensor, lse: Tensor, grad_qkv: Tensor,
    grid: WindowGrid, heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradient of qkv into grad_qkv; returns those of scale (h,) and table ((2rows-1)(2cols-1), h)."""
    call, (library, _) = _Call(qkv, scale, table, grid, heads), _load()
    assert library is not None, "ask problem() first"
    scale_parts = lse.new_empty(call.chunks, heads)
    table_parts = lse.new_zeros(call.chunks, *call.table.shape)
    library.window_attention_backward(
        *call.arguments, *map(_address, (grad, lse, grad_qkv, scale_parts, table_parts)), torch.get_num_threads()
    )
    return scale_parts.sum(0), table_parts.sum(0).t().contiguous()
