"""Numbers about a run: means over all ranks, speed, share of the device's peak, memory.

Names are the contract of metrics.jsonl: train/loss, train/lr, train/grad_norm, perf/images_per_sec, perf/step_sec,
perf/mfu, perf/own_step_sec, perf/slowest_rank, train/skipped_steps, data/wait_sec, data/skipped_images, mem/peak_gib,
checkpoint/stall_sec, val/unfinished, val/loss, and in percent val/top1, val/top5 (val_ema/...: of the averages),
probe/knn_top1, probe/knn_top5, probe/linear_top1 and probe/linear_top5.
"""

from __future__ import annotations

import functools
import math
import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.distributed import World, all_reduce_sum
from swinv2_train.runtime.environment import GIB


class Means:
    """Weighted means over micro-batches, steps and ranks, without waiting for the device until they are read.

    Every rank adds the same names (an evaluation batch of stand-ins is added with weight 0).
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}  # name -> (2,) float64: sum of value x weight, sum of weights

    def add(self, values: Mapping[str, torch.Tensor], weight: torch.Tensor | float = 1.0) -> None:
        """Add means of a batch (scalars) with one weight, e.g. the number of images they were taken over."""
        for name, value in values.items():
            value = value.detach().double()
            assert value.ndim == 0, f"{name} has shape {tuple(value.shape)}, a mean is a scalar"
            # a tensor made of a number would be a copy from the host, which waits for the device
            w = weight.detach().to(value) if isinstance(weight, torch.Tensor) else torch.full_like(value, weight)
            # a batch of weight 0 may hold nan (a mean over nothing) and must not poison the sum
            pair = torch.stack([torch.where(w == 0, torch.zeros_like(value), value * w), w])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self) -> dict[str, float]:
        """The means over all ranks since the last read, one collective; nan where the weights sum to 0."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        total = all_reduce_sum(torch.stack([self._sums[name] for name in names])).cpu()  # (names, 2)
        self._sums = {}
        return {name: (s / w if w else float("nan")) for name, (s, w) in zip(names, total.tolist(), strict=True)}


def each_rank(values: Mapping[str, float], world: World) -> dict[str, list[float]]:
    """Each number of every rank, by rank, on all of them.  One collective; every rank gives the same names."""
    names = sorted(values)
    slots = torch.zeros(len(names), world.world_size, dtype=torch.float64, device=world.device)
    slots[:, world.rank] = torch.tensor([values[name] for name in names], dtype=torch.float64)
    return dict(zip(names, all_reduce_sum(slots).tolist(), strict=True))


def ranks_where(flag: bool, world: World) -> list[int]:
    """The ranks on which flag is true, known to every rank.  One collective."""
    flags = torch.zeros(world.world_size, dtype=torch.int32, device=world.device)
    flags[world.rank] = int(flag)
    return [rank for rank, value in enumerate(all_reduce_sum(flags).tolist()) if value]


class LossWatch:
    """Says when a step's loss is far above the last ones'.

    factor: how many times their median; None = never.  The same on every rank when it is given global losses.
    """

    def __init__(self, factor: float | None, window: int = 100, least: int = 20) -> None:
        self.factor = factor
        self.least = least
        """Losses that must be known before one can stand out."""
        self._last: deque[float] = deque(maxlen=window)

    def problem(self, loss: float) -> str | None:
        """What is wrong with a loss, in words; None for one that is in line."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.factor is None or len(self._last) < self.least:
            return None
        median = statistics.median(self._last)
        if loss <= self.factor * median:
            return None
        return f"the loss is {loss:.4g}, {loss / median:.3g} times the median of the last {len(self._last)} steps"

    def add(self, loss: float) -> None:
        """Remember the loss of a step that was taken."""
        self._last.append(loss)


class BadSteps:
    """How many steps could not be taken: in a row, and at all."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.skipped = 0
        self._last = 0

    def add(self, step: int) -> None:
        """A step that was bad again, or the one after it, continues the row; any later one begins a new row."""
        self.in_a_row = self.in_a_row + 1 if step <= self._last + 1 else 1
        self.skipped += 1
        self._last = step


class Throughput:
    """Wall time per optimizer step and images per second between two reads.

    The process's first step (which pays for imports, allocation and kernel choice) and everything inside ``paused()``
    (checkpoints, evaluation, pictures) do not count.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._mark: float | None = None  # start of the present step; None during the first step
        self._steps = 0
        self._seconds = 0.0
        self._wait = 0.0
        self._step_wait = 0.0

    def step_done(self) -> None:
        """Call once after every optimizer step."""
        now = time.perf_counter()
        if self._mark is not None:
            self._steps += 1
            self._seconds += now - self._mark
            self._wait += self._step_wait
        self._mark = now
        self._step_wait = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no part of any step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._mark is not None:
                self._mark += time.perf_counter() - start

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent inside counts as waiting for the loader (and stays part of the step)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._step_wait += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """perf/images_per_sec, perf/step_sec and data/wait_sec (seconds per step, this rank) since the last read.

        Empty before a whole step was measured.  Starts anew.
        """
        if self._steps == 0 or self._seconds <= 0:
            return {}
        step_sec = self._seconds / self._steps
        values = {
            "perf/images_per_sec": self.images_per_step / step_sec,
            "perf/step_sec": step_sec,
            "data/wait_sec": self._wait / self._steps,
        }
        self._steps, self._seconds, self._wait = 0, 0.0, 0.0
        return values


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory of this process so far in GiB: tensors on a CUDA device, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM starts anew at exec; ru_maxrss keeps the parent's peak
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024 / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


# Dense peak of the matrix units in TFLOP/s, without sparsity, from NVIDIA's data sheets.  bf16 is with fp32
# accumulation (what torch computes: half of the advertised figure on GeForce).  The first name found in the device's
# name counts, so the special ones come first.  A name of conf/hardware/ stands for the bf16 and fp32 of that file, by
# which the planner plans too.
_PEAK_TFLOPS: tuple[tuple[str, str | None, dict[str, float]], ...] = (
    ("H200 NVL", None, {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    ("H200", "h200", {"tf32": 494.5}),
    ("H100 PCIE", None, {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    ("H100 NVL", None, {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    ("H100", "h100", {"tf32": 494.5}),
    ("A100", "a100_80gb", {"tf32": 156.0}),
    ("RTX 4090", "rtx4090", {"tf32": 82.6}),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device by its CUDA name, e.g. "NVIDIA A100-SXM4-80GB"; precision bf16, tf32 or fp32.

    None for a device (every CPU among them) or precision that the table does not hold.
    """
    name = device_name.upper().replace("RTX4090", "RTX 4090")
    if "LAPTOP" in name or " 4090 D" in name:
        return None
    for part, file, tflops in _PEAK_TFLOPS:
        if part in name:
            known = tflops if file is None else tflops | _hardware_tflops(file)
            return known[precision] * 1e12 if precision in known else None
    return None


@functools.cache
def _hardware_tflops(name: str) -> dict[str, float]:
    """The peaks of a file of conf/hardware/, by precision."""
    values = yaml.safe_load((conf_dir() / "hardware" / f"{name}.yaml").read_text())
    return {precision: values[f"tflops_{precision}"] for precision in ("bf16", "fp32")}


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of this rank's device; fp32 means TF32 where torch is allowed to use it.  None when unknown."""
    if device.type != "cuda":
        return None
    if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        precision = "tf32"
    return peak_flops(torch.cuda.get_device_name(device), precision)


def mfu(
    train_flops_per_image: float | None,
    images_per_sec: float | None,
    peak_flops_per_device: float | None,
    world_size: int,
) -> float | None:
    """Model FLOP utilisation: useful arithmetic over what the devices could do, 0..1 (arXiv:2204.02311 appendix B).

    train_flops_per_image: forward and backward of one image without recomputation (3 x forward), a multiply-add = 2.
    images_per_sec: over all ranks.  None when one of them is unknown.
    """
    if train_flops_per_image is None or images_per_sec is None or peak_flops_per_device is None:
        return None
    return train_flops_per_image * images_per_sec / (peak_flops_per_device * world_size)
