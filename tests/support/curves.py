"""The golden curves: the demo's runs for 50 steps, on images drawn here, and what they were computed with.

A curve more is a row in CURVES; `python scripts/refresh_golden.py --reason "..."` then writes its file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swinv2_train import train
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.models.kernels import cpu_attention
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.harness import run_distributed
from tests.support.images import encoded

FOLDER = Path(__file__).parents[1] / "golden"
STEPS = 50
CLASSES = 10
NUM_IMAGES = {"train": 400, "test": 40}
COMMON = (
    f"train.max_steps={STEPS}", "train.epochs=null", "train.global_batch_size=16", "train.micro_batch_size=8",
    "train.checkpoint_every_steps=1000", "train.log_every_steps=1", "train.eval_every_steps=null",
    "train.picture_every_steps=1000", "train.keep_best=null", "optim.schedule.warmup_epochs=null",
    "optim.schedule.warmup_steps=10", "log.wandb=disabled", "log.progress=none", "runtime.num_threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A run of the train command on COMMON and these overrides."""

    overrides: tuple[str, ...]
    loss_tolerance: float
    """How far a loss may be from the golden one on another kind of machine, relatively."""
    after: str | None = None
    """The curve whose weights it starts from."""
    ranks: int = 2


# Tolerances: measured worst of any step are 4e-4 (every library kept to AVX2), 1.3e-3 (torch kept to AVX2) and 2.1e-7
# (every library kept to AVX2).  bf16 goes apart by more once sums have another order: with micro-batches of 4, 2.9e-4
# and 3.1e-2.  So on another machine the last curve tells most: fp32, plain torch, no kernel that is compiled there.
CURVES = {
    "simmim": Curve(("experiment=cifar10_simmim",), 1e-3),
    "finetune": Curve(("experiment=cifar10_finetune",), 1e-1, after="simmim"),
    "reference": Curve(
        ("experiment=cifar10_simmim", "engine=local", "engine.precision=fp32", "model.attention=reference"),
        1e-6,
        ranks=1,
    ),
}


def compute(folder: Path, names: Iterable[str] = CURVES, overrides: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The values of curves as they are now, by name; overrides go on top of every run's own.

    {"train/loss": [of step 1, 2, ...], "train/grad_norm": [...], "val/loss": of the last step, ...}
    """
    shards = pack(folder / "images")

    def make(name: str) -> Path:
        curve, run_dir = CURVES[name], folder / f"run_{name}"
        if run_dir.exists():
            return run_dir
        start = () if curve.after is None else (f"task.init_from={make(curve.after)}",)
        config = compose_overrides([*curve.overrides, f"run_dir={run_dir}", *COMMON, *shards, *start, *overrides])
        codes = run_distributed(lambda _: train.train(config), curve.ranks, init=False, timeout_sec=900)
        assert codes == [EXIT_DONE] * curve.ranks, f"{run_dir} ended with {codes}"
        return run_dir

    return {name: read_values(make(name)) for name in names}


def read_values(run_dir: Path) -> dict[str, Any]:
    """What a golden file keeps of a run."""
    lines = read_metrics(run_dir)
    last = {key: value for key, value in lines[-1].items() if key.startswith("val/")}
    return {key: [line[key] for line in lines] for key in ("train/loss", "train/grad_norm")} | last


def differences(curve: Curve, golden: dict[str, Any], values: dict[str, Any], exact: bool) -> list[str]:
    """What is wrong with values beside golden's, a line each; where not exact, by curve.loss_tolerance alone."""
    if golden.keys() != values.keys():
        return [f"has {sorted(values)} instead of {sorted(golden)}"]
    if exact:
        wrong = [key for key in golden if golden[key] != values[key]]
    else:
        losses = [key for key in golden if key.endswith("loss")]
        wrong = [key for key in losses if not worst(golden[key], values[key]) <= curve.loss_tolerance]  # nan too
    return [f"{key}: {_first(golden[key], values[key])}, worst {worst(golden[key], values[key]):.1e}" for key in wrong]


def worst(golden: float | list[float], values: float | list[float]) -> float:
    """The largest relative difference."""
    ours, theirs = np.atleast_1d(values), np.atleast_1d(golden)
    return float(np.max(np.abs(ours / theirs - 1))) if ours.shape == theirs.shape else float("inf")


def _first(golden: float | list[float], values: float | list[float]) -> str:
    if not isinstance(golden, list) or not isinstance(values, list):
        return f"{values} instead of {golden}"
    if len(golden) != len(values):
        return f"{len(values)} steps instead of {len(golden)}"
    step = next(i for i, (old, new) in enumerate(zip(golden, values, strict=True)) if old != new)
    return f"from step {step + 1} on, {values[step]} instead of {golden[step]}"


def path_of(name: str) -> Path:
    """The golden file of a curve: {"machine", "history", "values"}."""
    return FOLDER / f"curve_{name}.json"


def read_golden(name: str) -> dict[str, Any]:
    return json.loads(path_of(name).read_text())


def machine() -> dict[str, Any]:
    """What the last bits of a sum follow from, beside our code: libraries, processor, compiler of the CPU's kernel."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = facts.get("flags", facts.get("Features", "")).split()
    return {
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy", "pillow")},
        "libc": " ".join(platform.libc_ver()),
        "compiler": compiler_version(),
        "processor": " ".join([platform.machine(), *(facts.get(f, "?") for f in ("vendor_id", "cpu family", "model"))]),
        "instructions": " ".join(sorted(f for f in features if f.startswith(VECTORS))),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ.get(name) for name in LIMITS},
    }


VECTORS = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16")
"""Beginnings of the names of instructions on vectors and matrices."""
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that keep libraries from some of them."""


def compiler_version() -> str | None:
    """The version of the compiler of the fused kernel; None where there is no such kernel."""
    if cpu_attention.problem() is not None:
        return None
    found = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]
    return subprocess.run([*found, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def draw(number: int) -> np.ndarray:
    """(32, 32, 3) uint8: stripes whose direction, width and colour are those of class number % CLASSES, and noise.

    Whole numbers only, so that every machine draws the same.
    """
    label = number % CLASSES
    rows, cols = np.mgrid[:32, :32]
    channels = [(7 * (1 + label) * cols + 5 * (CLASSES - label) * rows + 20 * c * label) % 256 for c in range(3)]
    noise = np.random.default_rng(number).integers(0, 64, (32, 32, 3))
    return (np.stack(channels, axis=-1) * 3 // 4 + noise).astype(np.uint8)


def pack(folder: Path) -> list[str]:
    """Draw and pack the images, where that is not done; returns the overrides that name them."""
    shards = [f"data.shards={folder}/train-*.tar", f"data.eval_shards={folder}/test-*.tar"]
    if folder.exists():
        return shards
    folder.mkdir(parents=True)
    first = 0
    for split, count in NUM_IMAGES.items():
        samples = []
        for number in range(first, first + count):
            data = encoded(draw(number))  # lossless
            samples.append((f"image_{number:04d}", data, "png", number % CLASSES))
        write_shards(samples, str(folder / split), 100)
        first += count
    return shards
