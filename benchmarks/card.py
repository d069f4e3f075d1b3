"""The machine as a card's first run finds it, and its ceilings: what every other number is to be held against.

    python -m benchmarks.card [--small]

Prints JSON lines: versions, card, driver, clocks and power limits, compilers and headers that Triton needs at run time;
then bytes per second of a copy, FLOP/s of a matrix product in each precision, and microseconds of a kernel's launch.
--small measures next to nothing, for trying the command on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swinv2_train.runtime.environment import version_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("torch", "triton", "deepspeed", "torchvision", "timm", "numpy", "pillow", "webdataset", "hydra-core")
QUERY = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu"


def said(*command: str) -> str | None:
    """What a command prints, its last line; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[-1] if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    found |= {
        "cuda": torch.version.cuda,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "compiler": said(os.environ.get("CC", "cc"), "--version") and shutil.which(os.environ.get("CC", "cc")),
        "nvcc": said("nvcc", "--version"),
        "ncu": said("ncu", "--version"),
        "python_header": Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        "nvidia_smi": said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
    }
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
    began = time.perf_counter()
    if importlib.util.find_spec("deepspeed"):
        import deepspeed  # noqa: F401
    return found | {"deepspeed_import_sec": round(time.perf_counter() - began, 2)}


def seconds(work: Callable[[], object], times: int) -> float:
    """Of one call, on average, when three have run before."""
    for _ in range(3):
        work()
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / times


def ceilings(small: bool) -> dict[str, float]:
    count, side = (2**20, 128) if small else (2**30, 8192)
    source = torch.zeros(count, device=DEVICE)
    found = {"copy_gb_per_sec": 2 * source.nbytes / seconds(source.clone, 10) / 1e9}
    source = torch.zeros(0)  # makes room
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        spent = seconds(lambda a=a, b=b: a @ b, 10)  # type: ignore[misc]
        found[f"{str(dtype).removeprefix('torch.')}_tflop_per_sec"] = 2 * side**3 / spent / 1e12
    tiny = torch.zeros(1, device=DEVICE)
    found["launch_us"] = 1e6 * seconds(lambda: tiny.add_(1), 1000)
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print(json.dumps(environment()), flush=True)
    print(json.dumps(ceilings(options.small)), flush=True)


if __name__ == "__main__":
    main()
