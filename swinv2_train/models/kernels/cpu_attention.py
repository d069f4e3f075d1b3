"""Windowed cosine attention on a CPU: cpu_attention.cpp, compiled on first use by the machine's C++ compiler, together
with the passes of cpu_passes.py.

Legend: B batch, H W tokens per side (T H W of a clip), C channels, nW windows per map, N tokens per window, h heads,
d head dim.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from swinv2_train.models.windows import WindowGrid, window_regions, window_tokens

DTYPES = (torch.float32, torch.bfloat16)
MAX_TOKENS = 1024  # of a window: a thread holds four N x N float32 matrices, 16 MiB
ITEMS = 96  # pieces of work of a call, a chunk of windows and a head each, where there are enough windows
CHUNK = 4  # windows of a chunk, at least: they share a head's bias.  Neither depends on the machine, as sums do on them
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
COMPILE_SEC = 300.0
"""The most that the compiler may take: 10 s on an idle machine, minutes on a busy one."""
SOURCES = [
    Path(__file__).with_name(name)
    for name in ("cpu_attention.cpp", "cpu_passes.cpp", "cpu_position.cpp", "cpu_vectors.h")
]


class _Sizes(ctypes.Structure):
    names = ("batch", "map", "windows", "frames", "rows", "cols", "heads", "dim", "chunks")
    _fields_ = [(name, ctypes.c_long) for name in names]


def problem() -> str | None:
    """Why there is no compiled kernel on this machine, in a few words; None where there is one.

    The first call may compile it, for up to COMPILE_SEC: who calls says so before, where will_compile() does.
    """
    return _load()[1]


def library() -> ctypes.CDLL:
    """The compiled kernels, where problem() has nothing against them."""
    found = _load()[0]
    assert found is not None, "ask problem() first"
    return found


def will_compile() -> bool:
    """Whether the first call of problem() has to compile the kernel, and does not find one of an earlier start."""
    found, directory = fingerprint(), cache_directory()
    return found is not None and (directory is None or _kept(_file(directory, found)) is None)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = _compiler()
    if not compiler:
        return None, "there is no C++ compiler (g++, clang++, or what CXX names)"
    try:
        directory, found = cache_directory(), _fingerprint(compiler)
        library = None if directory is None else _kept(_file(directory, found))
        if library is None:
            with tempfile.TemporaryDirectory() as private:
                built = _file(Path(private), found)
                _compile(compiler, built)
                library = ctypes.CDLL(str(built))  # stays when its file goes
                if directory is not None:
                    _keep(built, _file(directory, found))
        return library, None
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").split("\n")
        said = [line for line in lines if line.strip()] or [str(error)]
        return None, f"{' '.join(compiler)} could not compile it: {said[-1]}"


def _compile(compiler: list[str], built: Path) -> None:
    """Run the compiler, in a process group of its own: a Ctrl-C is the caller's to answer, and what ends the wait (a
    signal's handler that raises, the time limit) ends all that the compiler has started.
    """
    command = [*compiler, *FLAGS, "-o", str(built), *(str(path) for path in SOURCES if path.suffix == ".cpp")]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0))

    with ThreadPoolExecutor(1) as thread:  # handlers run in the main thread, where one could lose a start half done
        thread.submit(int).result()  # the thread lives, and is known, before there is anything to lose
        try:
            thread.submit(start).result()
            (process,) = started
            _, said = process.communicate(timeout=COMPILE_SEC)
        except BaseException:
            thread.shutdown()
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=said)


def _file(directory: Path, found: str) -> Path:
    return directory / f"fused_cpu_{found}.so"


def cache_directory() -> Path | None:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/swinv2_train, or in ~/.cache; None where others could write."""
    return private_directory(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "swinv2_train")


def private_directory(path: Path) -> Path | None:
    """The directory, made where it is missing; None where it cannot be, or others could write there."""
    try:
        directory = path.expanduser()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory if _is_ours(directory) else None
    except (OSError, RuntimeError):  # the second from expanduser, where a user has no home
        return None


def _compiler() -> list[str]:
    """The C++ compiler's command; empty where there is none."""
    return shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]


@functools.cache
def fingerprint() -> str | None:
    """A hash of all that the kernel of this machine follows from; None where there is no compiler."""
    try:
        return _fingerprint(compiler) if (compiler := _compiler()) else None
    except (OSError, subprocess.SubprocessError):
        return None


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put there what would be run."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _kept(path: Path) -> ctypes.CDLL | None:
    """A kernel that an earlier start compiled; None where there is none, or it cannot be loaded (a torn file)."""
    try:
        return ctypes.CDLL(str(path)) if _is_ours(path) else None
    except OSError:
        return None


def _keep(built: Path, path: Path) -> None:
    """Whole or not at all, however many processes and hosts do it at once; a full disk is no reason to stop.

    Written here and not by storage/atomic.py, because models import torch alone.
    """
    with contextlib.suppress(OSError):
        file, part = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(file, "wb") as target:
                target.write(built.read_bytes())
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)


def _fingerprint(compiler: list[str]) -> str:
    """A hash of all that a compiled kernel follows from, the processor too: homes are shared between machines."""
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    what = ([path.read_text() for path in SOURCES], FLAGS, compiler, version, platform.machine(), _processor())
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """Its model and the instructions that it reports; what -march=native compiles for follows from them."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})


class _Call:
    """The arguments that forward and backward share, and the tensors they point into."""

    def __init__(
        self, qkv: Tensor, scale: Tensor, table: Tensor, bias: Tensor | None, grid: WindowGrid, heads: int
    ) -> None:
        tokens, regions = window_tokens(grid, qkv.device), window_regions(grid, qkv.device)
        windows = tokens.shape[0]
        self.chunks = max(1, min(math.ceil(ITEMS / heads), qkv.shape[0] * windows // CHUNK))
        self.table = table.t().contiguous()  # (h, offsets)
        self.bias = bias
        frames, rows, cols = (1, *grid.window)[-3:]
        dim = qkv.shape[-1] // (3 * heads)
        sizes = _Sizes(qkv.shape[0], math.prod(grid.size), windows, frames, rows, cols, heads, dim, self.chunks)
        self.tensors = (qkv, scale, self.table, tokens.contiguous(), regions.contiguous())
        self.arguments = (int(qkv.dtype == torch.bfloat16), ctypes.byref(sizes), *map(address, self.tensors))


def address(x: Tensor | None) -> ctypes.c_void_p | None:
    """Where its numbers begin, as the library takes it."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def forward(
    qkv: Tensor, scale: Tensor, table: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    grid: WindowGrid, heads: int,
) -> None:  # fmt: skip
    """Write the attention of qkv (B, H, W, 3C) into out (B, H, W, C), and the logarithms of the softmax's denominators
    into lse (B*nW, h, N).  bias: (3C,) float32, what is added to qkv before, or None.  All contiguous; otherwise as
    dispatch.fused_window_attention."""
    call, threads = _Call(qkv, scale, table, bias, grid, heads), torch.get_num_threads()
    library().window_attention_forward(*call.arguments, address(out), address(lse), address(call.bias), threads)


def backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, table: Tensor, bias: Tensor | None, lse: Tensor, grad_qkv: Tensor,
    grid: WindowGrid, heads: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Write the gradient of qkv into grad_qkv; returns those of scale (h,), table (offsets, h) and bias (3C,)."""
    call = _Call(qkv, scale, table, bias, grid, heads)
    scale_parts = lse.new_empty(call.chunks, heads)
    table_parts = lse.new_zeros(call.chunks, *call.table.shape)
    bias_parts = None if bias is None else lse.new_empty(call.chunks, qkv.shape[-1])
    library().window_attention_backward(
        *call.arguments, *map(address, (grad, lse, grad_qkv, scale_parts, table_parts, bias, bias_parts)),
        torch.get_num_threads(),
    )  # fmt: skip
    grad_bias = None if bias_parts is None else bias_parts.sum(0)
    return scale_parts.sum(0), table_parts.sum(0).t().contiguous(), grad_bias
