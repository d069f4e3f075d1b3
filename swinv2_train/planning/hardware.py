"""What a plan knows of the machine: a file of conf/hardware/, its null values found out here."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from swinv2_train.config import HardwareConfig
from swinv2_train.monitoring.metrics import peak_flops
from swinv2_train.runtime.cpu_speed import cpu_speed
from swinv2_train.runtime.environment import GIB

_USUAL: dict[str, dict[str, float]] = {
    "cuda": {
        "reserved_gib": 1.5, "tflops_bf16": 100.0, "tflops_fp32": 20.0, "matmul_efficiency": 0.6,
        "memory_gb_per_sec": 1000.0, "memory_efficiency": 0.8, "op_overhead_us": 8.0, "intra_node_gb_per_sec": 10.0,
        "inter_node_gb_per_sec": 1.0, "intra_node_latency_us": 1.8, "inter_node_latency_us": 20.0,
        "host_gb_per_sec": 20.0, "storage_gb_per_sec": 1.0,
    },
    "cpu": {
        "reserved_gib": 0.5, "matmul_efficiency": 0.6, "memory_efficiency": 0.5, "op_overhead_us": 10.0,
        "intra_node_gb_per_sec": 1.0, "inter_node_gb_per_sec": 1.0, "intra_node_latency_us": 50.0,
        "inter_node_latency_us": 50.0, "host_gb_per_sec": 10.0, "storage_gb_per_sec": 1.0,
    },
}  # fmt: skip
"""What cannot be found out in an instant: assumptions on the cautious side."""


def fill_from_machine(hardware: HardwareConfig, local_world_size: int, rates: bool = True) -> HardwareConfig:
    """The hardware section with its null values filled in from this machine.

    local_world_size: ranks of this host, among which a CPU's memory is shared out.  rates: also measure what a CPU
    copies (0.05 s), and look up what it computes; without it those stay null.
    """
    found: dict[str, object] = {}
    device = hardware.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_this = device == "cuda" and torch.cuda.is_available()
    found["device"] = device
    found["gpus_per_node"] = torch.cuda.device_count() if on_this else local_world_size
    if on_this:
        found |= _this_gpu()
    elif device == "cpu":
        found["memory_gib"] = host_memory_bytes() / GIB
        if rates and None in (hardware.tflops_bf16, hardware.tflops_fp32, hardware.memory_gb_per_sec):
            found |= _this_cpu()
    for key, value in _USUAL[device].items():
        found.setdefault(key, value)
    given = {key: value for key, value in dataclasses.asdict(hardware).items() if value is not None}
    merged = HardwareConfig(**{**dict.fromkeys(f.name for f in dataclasses.fields(hardware)), **found, **given})
    if device == "cpu" and merged.memory_gib is not None:
        merged.memory_gib /= local_world_size
    return merged


def required(value: float | None) -> float:
    assert value is not None, "hardware is completed before it is planned with"
    return value


def host_memory_bytes() -> int:
    """The memory of this host that is available now, or what its control group still allows where that is less."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    available = int(found.group(1)) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _this_gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found: dict[str, object] = {"memory_gib": properties.total_memory / GIB}
    for key, precision in (("tflops_bf16", "bf16"), ("tflops_fp32", "fp32")):
        peak = peak_flops(properties.name, precision)
        if peak is not None:
            found[key] = peak / 1e12
    width, clock = (getattr(properties, name, None) for name in ("memory_bus_width", "memory_clock_rate"))
    if width and clock:  # bits, kHz; two transfers a clock
        found["memory_gb_per_sec"] = 2 * width / 8 * clock / 1e6
    return found


def _this_cpu() -> dict[str, object]:
    speed, threads = cpu_speed(), torch.get_num_threads()
    found: dict[str, object] = {
        "tflops_bf16": speed.bf16_gflops * threads / 1e3,
        "tflops_fp32": speed.fp32_gflops * threads / 1e3,
    }
    block = torch.zeros(8 * 2**20)
    copy = torch.empty_like(block)
    found["memory_gb_per_sec"] = 2 * block.nbytes / _seconds(lambda: copy.copy_(block)) / 1e9
    return found


def _seconds(function: Callable[[], object]) -> float:
    """The best of three, after one that warms up."""
    function()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
