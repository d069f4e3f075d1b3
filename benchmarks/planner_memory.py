"""The planner's memory against what a training step really takes, case by case in fresh processes.

    python benchmarks/planner_memory.py [--only TEXT]     # all cases of this machine's device; prints a Markdown table
    python benchmarks/planner_memory.py --case "KEY=VALUE ..." [--case ...]      # these instead

A case that fails is told in its row, and the others go on; exit code 1 where one did.

On the CPU: resident memory (VmHWM, set back before the step) over that of the resting engine, glibc told to give freed
memory back; the rank that takes most counts.  On CUDA:
torch.cuda.max_memory_allocated over what was allocated before.
"passes" are forward and backward alone, every gradient dropped when it is made, as for one rank of many under ZeRO-3.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

import torch
from torch import Tensor

from swinv2_train.config import Config, pair
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.distributed import World, init_distributed, shutdown_distributed
from swinv2_train.engine import build_engine
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.planning.hardware import fill_from_machine
from swinv2_train.planning.memory import LOADER, plan_memory
from swinv2_train.planning.trace import trace_step
from swinv2_train.tasks import build_task
from swinv2_train.training.param_groups import build_param_groups

MIB = 2**20


class Case(NamedTuple):
    """What is compared."""

    overrides: str
    ranks: int = 1
    passes: bool = False


C = "task=classify task.mixup_alpha=0 task.cutmix_alpha=0"  # mixing wants micro-batches of pairs
L = f"{C} engine=local"
S = "task=segment"
CPU_CASES = [
    Case(f"model=tiny {L} model.img_size=256 model.window_size=8 train.micro_batch_size=8"),
    Case(f"model=tiny {L} model.img_size=512 model.window_size=16 train.micro_batch_size=2 model.recompute=blocks"),
    Case(f"model=tiny {L} model.img_size=768 model.window_size=24 train.micro_batch_size=1 model.recompute=attention"),
    Case(f"model=tiny {L} model.img_size=1024 model.window_size=16 train.micro_batch_size=1 model.recompute=every:3"),
    Case(f"model=tiny {L} model.img_size=1024 model.window_size=32 train.micro_batch_size=1 "
         "model.sequential_stages=[1,2] model.attention_chunk_mib=64"),
    Case(f"model=tiny {L} model.img_size=1536 model.window_size=24 train.micro_batch_size=1 "
         "model.recompute=blocks model.sequential_stages=[1,2] model.attention_chunk_mib=64"),
    Case(f"model=tiny {L} model.img_size=1536 model.window_size=16 train.micro_batch_size=1 "
         "model.recompute=blocks@cpu"),
    Case(f"model=small {C} engine=zero0 model.img_size=512 model.window_size=16 train.micro_batch_size=1", 2),
    Case(f"model=small {C} engine=zero0 model.img_size=384 model.window_size=12 train.micro_batch_size=2 "
         "model.recompute=stages:1-2", 2),
    Case("model=base task=simmim engine=zero3 model.img_size=192 model.window_size=12 train.micro_batch_size=8", 2),
    Case(f"model=base {C} engine=zero3 model.img_size=640 model.window_size=20 train.micro_batch_size=2 "
         "model.recompute=blocks", 2),
    Case(f"model=base {C} engine=zero3 model.img_size=1024 model.window_size=16 train.micro_batch_size=1 "
         "model.recompute=blocks@fairscale", 2),
    Case(f"model=large {C} engine=zero3 model.img_size=256 model.window_size=16 train.micro_batch_size=2", 2),
    Case(f"model=large {C} engine=zero3 model.img_size=384 model.window_size=24 train.micro_batch_size=1 "
         "model.recompute=attention", 2),
    Case(f"model=large {C} engine=zero3 model.img_size=512 model.window_size=16 train.micro_batch_size=1 "
         "model.recompute=blocks model.sequential_stages=[1,2,3] model.attention_chunk_mib=128", 2),
    Case(f"model=small {C} engine=zero1 model.img_size=256 model.window_size=8 train.micro_batch_size=4", 2),
    Case(f"model=small {C} engine=zero2 model.img_size=256 model.window_size=8 train.micro_batch_size=4", 2),
    Case(f"model=tiny {S} engine=local model.img_size=512 model.window_size=16 train.micro_batch_size=1"),
    Case(f"model=tiny {S} engine=local model.img_size=256 model.window_size=16 train.micro_batch_size=2 "
         "task.head_norm=batch model.recompute=blocks"),
    Case(f"model=small {S} engine=zero1 model.img_size=256 model.window_size=16 train.micro_batch_size=1 "
         "task.head_norm=sync_batch", 2),
    Case(f"model=base {S} engine=zero3 model.img_size=256 model.window_size=16 train.micro_batch_size=1 "
         "task.head_norm=group task.aux_channels=0", 2),
]  # fmt: skip
G, B = "model=giant engine=zero3 train.micro_batch_size=1", "model.recompute=blocks"
CUDA_CASES = [
    Case(f"model=tiny {L} model.img_size=256 model.window_size=8 train.micro_batch_size=64"),
    Case("model=base task=simmim engine=zero1 model.img_size=192 model.window_size=12 train.micro_batch_size=64"),
    Case(f"model=base {C} engine=zero2 model.img_size=384 model.window_size=24 train.micro_batch_size=16 {B}"),
    Case(f"model=large {C} engine=zero3 model.img_size=640 model.window_size=40 train.micro_batch_size=4 "
         "model.recompute=attention"),
    Case(f"model=large {C} engine=zero3 model.img_size=1536 model.window_size=24 train.micro_batch_size=1 {B} "
         "model.sequential_stages=[1,2]"),
    Case(f"{G} task=simmim model.img_size=192 model.window_size=12", passes=True),
    Case(f"{G} {C} model.img_size=640 model.window_size=40 {B}", passes=True),
    Case(f"{G} {C} model.img_size=640 model.window_size=40 {B}@cpu", passes=True),
    Case(f"{G} {C} model.img_size=1536 model.window_size=32 {B} model.sequential_stages=[1,2]", passes=True),
    Case(f"{G} {C} model.img_size=1536 model.window_size=32 {B} model.sequential_stages=[1,2,3,4]", passes=True),
]  # fmt: skip


def compose(case: Case) -> Config:
    micro = next(each for each in case.overrides.split() if each.startswith("train.micro_batch_size="))
    whole = int(micro.partition("=")[2]) * case.ranks
    common = ["run_dir=unused", "data.shards=unused", f"train.global_batch_size={whole}"]
    return compose_overrides([*common, *case.overrides.split()])


def predicted(case: Case) -> dict[str, float]:
    """MiB: what the engine holds at rest, and what a step adds to that at its peak."""
    config = compose(case)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.passes:
        trace = trace_step(config, 0.0, device == "cpu")
        tables, peak = trace.backward.tables, max(trace.forward.total, trace.backward.total)
        return {"rests": (trace.weight_bytes + tables) / MIB, "adds": (peak - tables) / MIB}
    config.hardware.device = device
    plan, _ = plan_memory(config, fill_from_machine(config.hardware, case.ranks, rates=False), case.ranks)
    loader = plan.phases[plan.peak_phase].get(LOADER, 0)  # made before the step here
    return {"rests": plan.resident / MIB, "adds": (plan.peak - plan.resident - loader) / MIB}


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own


def resident(key: str) -> float:
    """MiB of this process by a key of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


class Meter:
    """MiB now, and the most since reset()."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def reset(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> float:
        return torch.cuda.memory_allocated() / MIB if self.cuda else resident("VmRSS")

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else resident("VmHWM")


def a_batch(config: Config) -> dict[str, Tensor]:
    size = config.train.micro_batch_size
    height, width = pair("model.img_size", config.model.img_size)
    batch = {"images": torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8), "weight": torch.ones(size)}
    if config.task.name == "classify":
        return batch | {"labels": torch.randint(0, 10, (size,))}
    if config.task.name == "segment":
        labels = torch.randint(0, 10, (size, height, width), dtype=torch.uint8)
        return batch | {"labels": labels, "extent": torch.tensor([[height, width]] * size)}
    patch = config.model.patch_size
    return batch | {"mask": torch.rand(size, height // patch, width // patch) < 0.6}


class Training:
    """A task, its engine and a batch."""

    def __init__(self, config: Config, world: World) -> None:
        self.task = build_task(config, world.device)
        groups = build_param_groups(self.task.module, config.optim)
        self.engine = build_engine(self.task.module, groups, config, world, 1, self.task.block_types)
        self.batch = a_batch(config)

    def step(self) -> None:
        self.engine.backward(self.task.loss(self.engine.forward, self.batch))
        self.engine.step(1e-5)


class Passes:
    """A module and a batch, without any engine."""

    def __init__(self, config: Config, world: World) -> None:
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        with torch.device("meta"):
            self.task = build_task(config, world.device)
        self.module = self.task.module.to(dtype).to_empty(device=world.device).train()
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        apply_recompute(self.module, config.model.recompute, self.task.block_types)
        self.batch = a_batch(config)
        self.device = world.device

    def step(self) -> None:
        def forward(**inputs: Tensor) -> Any:
            return self.module(**{name: tensor.to(self.device) for name, tensor in inputs.items()})

        torch.autograd.backward(self.task.loss(forward, self.batch))


def measure(case: Case) -> None:
    """Print what this rank measured, as JSON."""
    torch.set_num_threads(1)
    world = init_distributed(600)
    meter = Meter(world.device)
    kind = Passes if case.passes else Training
    small = "model=demo model.img_size=32 model.window_size=4 model.pretrained_window_sizes=[0,0]"
    kept = [each for each in case.overrides.split() if each.startswith(("task", "engine", "train.micro", "model.rec"))]
    warm = case._replace(overrides=" ".join([*kept, small]))
    if "stages:" not in case.overrides:  # libraries, kernels and buffers of the process itself
        first: Any = kind(compose(warm), world)
        first.step()
        del first
    meter.reset()
    base = meter.now()
    run: Any = kind(compose(case), world)
    run.step()  # makes the optimizer's moments
    meter.reset()
    rests = meter.now()
    run.step()
    print(json.dumps({"rests": rests - base, "adds": meter.peak() - rests}), flush=True)
    shutdown_distributed()


def measured(case: Case) -> dict[str, float]:
    """The fullest rank's numbers, MiB."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks, said = [], []
    for rank in range(case.ranks):
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONWARNINGS": "ignore",
            "MALLOC_MMAP_THRESHOLD_": 65536, "MALLOC_ARENA_MAX": 2,
        }  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, __file__, "--child", json.dumps(case)]
        said.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115  as long as the rank
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said[-1], text=True))
    outputs = [rank.communicate()[0] for rank in ranks]
    for rank, errors in zip(ranks, said, strict=True):
        if rank.returncode:
            errors.seek(0)
            raise RuntimeError((errors.read().strip().splitlines() or [f"exit code {rank.returncode}"])[-1])
    numbers = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: max(each[key] for each in numbers) for key in numbers[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose text holds this")
    parser.add_argument(
        "--case", action="append", metavar="OVERRIDES", help="of one rank, with train.micro_batch_size=N"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        overrides, ranks, passes = json.loads(arguments.child)
        measure(Case(overrides, ranks, passes))
        return 0
    cases = CUDA_CASES if torch.cuda.is_available() else CPU_CASES
    if arguments.case:
        cases = [Case(overrides) for overrides in arguments.case]
    print("| case | ranks | a step adds, predicted MiB | measured | ratio | at rest, predicted | measured |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for case in cases:
        if arguments.only in case.overrides:
            name = case.overrides.replace("train.micro_batch_size", "micro") + (" (passes)" if case.passes else "")
            try:
                plan, real = predicted(case), measured(case)
            except (RuntimeError, ValueError) as error:  # one that is refused, or does not fit on this device
                print(f"| {name} | {case.ranks} | | {str(error).replace('|', '/')[:300]} | | | |", flush=True)
                failed = True
                continue
            print(
                f"| {name} | {case.ranks} | {plan['adds']:,.0f} | {real['adds']:,.0f} | "
                f"{plan['adds'] / real['adds']:.2f} | {plan['rests']:,.0f} | {real['rests']:,.0f} |",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
