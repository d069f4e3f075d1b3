"""How fast this processor multiplies matrices in fp32 and in bf16: measured once per machine, and remembered.

A processor without bf16 units multiplies bf16 matrices 3 to 100 times slower than fp32 ones, and nothing else says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from swinv2_train.config import ConfigError
from swinv2_train.models.kernels.cpu_attention import cache_directory
from swinv2_train.storage.atomic import replace_text
from swinv2_train.storage.json_files import number, read_json, record

SLOW_BF16 = 2.0
"""bf16's time over fp32's from which on it is said: 0.5 with bf16 units, 3 to 7 with AVX-512 alone, 50 with AVX2."""
_SIDE = 256
_BUDGET_SEC = 0.05
_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class CpuSpeed:
    """GFLOP/s of one thread, in products of two 256 x 256 matrices, by what the model's layers multiply with."""

    fp32_gflops: float
    bf16_gflops: float

    @property
    def bf16_slowdown(self) -> float:
        """How many times as long as fp32 bf16 takes; below 1 where there are units for it."""
        return self.fp32_gflops / self.bf16_gflops


def cpu_speed() -> CpuSpeed:
    """What was measured on this machine, or is measured now (0.02 s; 0.15 s where bf16 is slow)."""
    directory = cache_directory()
    path = None if directory is None else directory / f"cpu_speed_{_machine()}.json"
    speed = None if path is None else _remembered(path)
    if speed is None:
        speed = measured()
        if path is not None:
            try:
                replace_text(path, json.dumps(asdict(speed)) + "\n")
            except OSError:  # a full disk: it is measured again next time
                return speed
    return speed


def measured() -> CpuSpeed:
    """Measure both, on one thread: ranks and loaders share the others."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CpuSpeed(*(2 * _SIDE**3 / _product_sec(dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)


def slow_bf16(speed: CpuSpeed) -> str | None:
    """What a user of bf16 should know of this processor, in one line; None where bf16 is as fast as it should be."""
    if speed.bf16_slowdown < SLOW_BF16:
        return None
    return (
        f"this processor multiplies matrices {speed.bf16_slowdown:.0f} times slower in bf16 than in fp32: without "
        "bf16 units engine.precision=fp32 is faster"
    )


def _product_sec(dtype: object) -> float:
    import torch

    from swinv2_train.models.kernels.cpu_products import linear

    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)  # type: ignore[call-overload]
    started, best, runs = time.perf_counter(), math.inf, 0
    while runs < 2 or (runs < 10 and time.perf_counter() - started < _BUDGET_SEC):
        begin = time.perf_counter()
        linear(matrix, matrix)
        best, runs = min(best, time.perf_counter() - begin), runs + 1
    return best


def _remembered(path: Path) -> CpuSpeed | None:
    """What an earlier start measured; None where there is nothing sensible."""
    try:
        found = read_json(path, 1000, record({"fp32_gflops": number(0.001), "bf16_gflops": number(0.001)}))
    except (FileNotFoundError, ConfigError):
        return None
    return CpuSpeed(found["fp32_gflops"], found["bf16_gflops"])


def _machine() -> str:
    """A hash of what the speed follows from: homes are shared between machines."""
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    settings = [os.environ.get(name) for name in _SETTINGS]
    what = ("linear", sorted(features), platform.machine(), torch.__version__, settings)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
