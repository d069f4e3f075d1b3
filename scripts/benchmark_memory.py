"""Peak memory of a real training step at high resolution: this project beside the official arithmetic.

    python scripts/benchmark_memory.py [--only ROW] [--out FILE]

On a GPU: SwinV2-G at 1536 px; then the largest batch at 1536 px, and the largest image, that stay within --budget-gib.
Without one: the same table for a model of the same shape, 1/16 as wide and less deep, in CPU memory, and what the
planner predicts for giant.

One step is a forward pass, a backward pass and AdamW on random images, each case in a process of its own.  AdamW is the
share of one of 16 ranks under ZeRO-3: of every parameter a sixteenth has its gradient, master and moments (16 bytes an
element, float32), and the rest of a gradient is let go when the backward pass has made it.  The weights are there whole
(5.6 GiB for giant in bf16) where ZeRO-3 would have a sixteenth and what is in use: an upper bound of such a rank.
The official arithmetic (scripts/official_arithmetic.py) gets the same share, keeps float32 weights under
torch.autocast(bfloat16), as it was trained, and has its own block checkpointing.
Ours attends by the fused kernels, as a run does, but for rows named "reference attention".  The seconds are of the
second of two steps, in a process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.official_arithmetic import OfficialArithmetic
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.models import SwinTransformerV2, count_parameters, swin_v2
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.runtime.environment import GIB

RANKS = 16
SMALL: dict[str, Any] = {"embed_dim": 32, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8), "extra_norm_period": 6}
"""Giant's shape at a sixteenth of its width, for machines without a GPU."""

CHUNK_MIB = {"giant": 256.0, "small": 16.0}


@dataclass(frozen=True)
class Case:
    """One row of the table; sequential_stages and recompute as the keys of those names, checkpoint the official's."""

    implementation: str
    img_size: int
    window_size: int
    batch_size: int
    recompute: str = "none"
    sequential_stages: tuple[int, ...] = ()
    fused: bool = True

    @property
    def name(self) -> str:
        policies = [self.implementation, *([] if self.recompute == "none" else [f"recompute {self.recompute}"])]
        if self.implementation == "ours" and not self.fused:
            policies.append("reference attention")
        if self.sequential_stages:
            policies.append("sequential stages " + ", ".join(map(str, self.sequential_stages)))
        return "; ".join(policies)


class Share:
    """What one of `ranks` ranks does with gradients and optimizer under ZeRO-3, at the parameters' own device."""

    def __init__(self, module: nn.Module, ranks: int) -> None:
        self._slices: list[tuple[Tensor, nn.Parameter]] = []  # the weights' own part, its float32 master
        for parameter in module.parameters():
            own = parameter.detach().view(-1)[: math.ceil(parameter.numel() / ranks)]
            master = nn.Parameter(own.to(torch.float32, copy=True))
            master.grad = torch.zeros_like(master)
            self._slices.append((own, master))
            parameter.register_post_accumulate_grad_hook(self._take(master.grad))
        fused = next(module.parameters()).is_cuda
        self._optimizer = torch.optim.AdamW([master for _, master in self._slices], lr=1e-4, fused=fused)

    def _take(self, gradient: Tensor) -> Any:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient.add_(parameter.grad.view(-1)[: len(gradient)])
            parameter.grad = None

        return hook

    def step(self) -> None:
        self._optimizer.step()
        for own, master in self._slices:
            own.copy_(master.detach())
            assert master.grad is not None
            master.grad.zero_()


def measure(case: Case, device: torch.device, size: str) -> dict[str, float]:
    """GiB in this process: peak of two steps (in the first, AdamW makes its moments), and states before and after.

    And the seconds of the second.
    """
    torch.manual_seed(0)
    warnings.filterwarnings("error", message="fused attention is not used")  # or the row would be another's
    settings: dict[str, Any] = {"img_size": case.img_size, "window_size": case.window_size, "drop_path_rate": 0.1}
    settings |= {"sequential_stages": case.sequential_stages, "attention_chunk_mib": CHUNK_MIB[size]}
    settings["fused_attention"] = case.fused and case.implementation == "ours"
    before = resident(device)
    with device:
        model = swin_v2("giant", **settings) if size == "giant" else SwinTransformerV2(**SMALL, **settings)
    forward: nn.Module = model
    autocast = case.implementation == "official"
    if autocast:
        forward = OfficialArithmetic(model, use_checkpoint=case.recompute == "blocks")
    else:
        model.bfloat16()
        apply_recompute(model, case.recompute, (SwinBlock,))
    share = Share(model, RANKS)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device)
    labels = torch.randint(1000, (case.batch_size,), device=device)
    states = resident(device) + 8 * count_parameters(model) / RANKS / GIB - before  # with the moments to come
    reset_peak(device)
    for _ in range(2):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        assert torch.isfinite(loss), f"the loss is {float(loss)}"
        share.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    return {"peak": peak(device) - before, "states": states, "seconds": seconds}


def resident(device: torch.device) -> float:
    """GiB that tensors take on the GPU now, or that this process has resident."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else _status("VmRSS")


def peak(device: torch.device) -> float:
    """The most that :func:`resident` was since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith(field + ":"))


def in_own_process(case: Case, device: str, size: str) -> dict[str, Any]:
    """peak and states in GiB, or {"failed": why}."""
    command = [sys.executable, __file__, "--device", device, "--size", size, "--case", json.dumps(asdict(case))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns what is freed
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": "out of memory" if "OutOfMemory" in last else last.partition(": ")[2] or last}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def side_by_side(size: str, img_size: int) -> Iterator[Case]:
    """Window 32 as in the paper; and 24, whose windows tile every map, because the official code never pads."""
    for window in (32, 24):
        for stages in ((1, 2, 3, 4), (1, 2), ()):  # (1, 2) as in the paper
            yield Case("ours", img_size, window, 1, "blocks", stages)
        yield Case("ours", img_size, window, 1, "blocks", fused=False)
        yield Case("official", img_size, window, 1, "blocks")
        if size != "giant" or window == 24:
            yield Case("official", img_size, window, 1)


def row(case: Case, result: dict[str, Any], budget: float) -> str:
    first = f"| {case.name} | {case.img_size} / {case.window_size} | {case.batch_size} |"
    if "failed" in result:
        return f"{first} | | | {result['failed']} |"
    fits = "yes" if result["peak"] <= budget else "no"
    return (
        f"{first} {result['peak']:.2f} | {result['peak'] - result['states']:.2f} | {result['seconds']:.2f} | {fits} |"
    )


def largest(cases: Iterator[Case], run: Any, budget: float) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Case after case until one is above the budget."""
    for case in cases:
        result = run(case)
        yield case, result
        if "failed" in result or result["peak"] > budget:
            return


def predicted() -> str:
    """What swinv2-plan says of giant as one of RANKS ranks of 40 GB cards."""
    command = ["-m", "swinv2_train.plan", "experiment=giant_1536", "hardware=a100_40gb", f"plan.num_gpus={RANKS}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return f"Predicted for giant, not measured (python {' '.join(command)}):\n\n```\n{done.stdout.strip()}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--size", choices=("giant", "small"), help="default: giant on a GPU, small without one")
    parser.add_argument("--img-size", type=int, help="default: 1536 for giant, 768 for small")
    parser.add_argument("--budget-gib", type=float, help="default: 37.3 (40 GB) for giant, 1 for small")
    parser.add_argument(
        "--only", help="one row of the first table alone, by its name and window: 'ours; recompute blocks; 32'"
    )
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = options.size or ("giant" if options.device == "cuda" else "small")
    if options.case:
        fields = json.loads(options.case)
        case = Case(**fields | {"sequential_stages": tuple(fields["sequential_stages"])})
        print(json.dumps(measure(case, torch.device(options.device), size)))
        return
    img_size = options.img_size or (1536 if size == "giant" else 768)
    budget = options.budget_gib or (40e9 / GIB if size == "giant" else 1.0)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    def run(case: Case) -> dict[str, Any]:
        return in_own_process(case, options.device, size)

    card = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {platform.processor() or platform.machine()}"
    )
    say(f"{size}, bf16, one training step as one of {RANKS} ranks; {card}, torch {torch.__version__}\n")
    columns = ("", "image / window, px", "batch", "peak, GiB", "without weights and optimizer", "s a step")
    header = f"| {' | '.join(columns)} | within {budget:.1f} GiB |\n{'|---' * 7}|"
    say(header)
    for case in side_by_side(size, img_size):
        if options.only is None or options.only == f"{case.name}; {case.window_size}":
            say(row(case, run(case), budget))
    if options.only is not None:
        return
    best = Case("ours", img_size, 32, 1, "blocks", (1, 2, 3, 4))
    say(f"\nLargest batch at {img_size} px:\n\n{header}")
    for case, result in largest((replace(best, batch_size=n) for n in (2, 3, 4, 5, 6, 8, 12, 16)), run, budget):
        say(row(case, result, budget))
    say(f"\nLargest image:\n\n{header}")
    for case, result in largest(
        (replace(best, img_size=img_size * n // 6) for n in (7, 8, 9, 10, 12, 14, 16, 20)), run, budget
    ):
        say(row(case, result, budget))
    if options.device == "cpu":
        say(f"\n{predicted()}")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
