"""The planner's communication volume against what a training step really sends, counted twice.

    torchrun --nproc-per-node 2 benchmarks/communication_volume.py    # or 4, on this machine: prints a Markdown table

Handed over: the sizes of the tensors that every collective is called with, seen by a dispatch mode below
torch.distributed, so whoever calls it is counted.  On the wire: what the kernel says that this process' TCP sockets
have sent and received (TCP_INFO), which is gloo's traffic with its headers.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_train.config import Config, pair
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.loading.loader import accumulation_steps
from swinv2_train.distributed import World, barrier, init_distributed, shutdown_distributed
from swinv2_train.engine import build_engine
from swinv2_train.planning.communication import GATHER, SCATTER, SUM, Collective, collectives
from swinv2_train.planning.memory import model_sizes
from swinv2_train.planning.trace import meta_task
from swinv2_train.tasks import build_task
from swinv2_train.training.param_groups import build_param_groups

MIB = 2**20
MODEL = "model=tiny model.img_size=64 model.window_size=2 task=classify task.num_classes=1000"
MICRO_BATCH_SIZE = 2
CASES = [
    ("engine=zero0", 1),
    ("engine=zero0", 2),
    ("engine=zero1", 1),
    ("engine=zero1", 2),
    ("engine=zero1 engine.precision=fp32", 1),
    ("engine=zero1 engine.precision=fp32", 2),
    ("engine=zero2", 1),
    ("engine=zero2", 2),
    ("engine=zero3", 1),
    ("engine=zero3", 2),
    ("engine=zero3 engine.precision=fp32", 1),
    ("engine=zero3 model.recompute=blocks", 1),
    ("engine=zero3 model.recompute=blocks", 2),
    ("engine=zero3 model.recompute=attention", 1),
    ("engine=zero3 engine.persistence_threshold=0", 1),
    ("engine=zero3 engine.max_reuse_distance=1000000000 engine.max_live_parameters=1000000000", 1),
]
"""Overrides, and micro-batches of a step."""

_KINDS = {
    "allreduce_": (SUM, 0),
    "allreduce_coalesced_": (SUM, 0),
    "allgather_": (GATHER, 0),
    "_allgather_base_": (GATHER, 0),
    "allgather_into_tensor_coalesced_": (GATHER, 0),
    "reduce_scatter_": (SCATTER, 1),
    "_reduce_scatter_base_": (SCATTER, 1),
    "reduce_scatter_tensor_coalesced_": (SCATTER, 1),
}
"""c10d's operations: what they are, and which argument holds the whole tensors."""
_ACKED, _RECEIVED = 120, 128
"""Where struct tcp_info has tcpi_bytes_acked and tcpi_bytes_received (linux/tcp.h)."""


@dataclass
class Volume:
    """What one rank had to do with its peers."""

    nbytes: Counter[str] = field(default_factory=Counter)
    """By kind: of the whole tensors, as in planning/communication.py."""
    calls: Counter[str] = field(default_factory=Counter)
    wire_sent: int = 0
    wire_received: int = 0


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds every collective that is called while it is entered to a volume."""

    def __init__(self, volume: Volume) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.volume = volume

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, place = _KINDS[func.overloadpacket.__name__]  # KeyError: one that nobody has counted yet
            self.volume.calls[kind] += 1
            self.volume.nbytes[kind] += sum(tensor.nbytes for tensor in tensors_in(args[place]))
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def wire() -> tuple[int, int]:
    """Bytes that the peers have acknowledged and that came from them, over all TCP sockets of this process."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent += struct.unpack_from("=Q", info, _ACKED)[0]
                    received += struct.unpack_from("=Q", info, _RECEIVED)[0]
        except OSError:  # closed meanwhile: the listing's own
            continue
    return sent, received


def compose(overrides: str, ranks: int, accumulation: int) -> Config:
    batch = (
        f"train.micro_batch_size={MICRO_BATCH_SIZE} train.global_batch_size={MICRO_BATCH_SIZE * ranks * accumulation}"
    )
    return compose_overrides(["run_dir=unused", "data.shards=unused", *batch.split(), *overrides.split()])


def predicted(config: Config, ranks: int) -> list[Collective]:
    """The planner's."""
    sizes = model_sizes(meta_task(config), config)
    batch = config.train
    accumulation = accumulation_steps(batch.global_batch_size, batch.micro_batch_size, ranks)
    return collectives(config.engine, sizes, ranks, accumulation, backward=2 / 3)


def nbytes_of(planned: list[Collective], kind: str) -> int:
    return sum(each.nbytes for each in planned if each.kind == kind)


def gloo_sent(planned: list[Collective], ranks: int) -> float:
    """Bytes on the wire: torch's gloo scatters by summing everything and keeping a part."""
    return sum(each.sent(ranks) * (2 if each.kind == SCATTER else 1) for each in planned)


def counted(config: Config, world: World) -> Volume:
    """The volume of one step of the real engine, after two that make states and record DeepSpeed's traces."""
    batch = config.train
    accumulation = accumulation_steps(batch.global_batch_size, batch.micro_batch_size, world.world_size)
    task = build_task(config, world.device)
    groups = build_param_groups(task.module, config.optim)
    engine = build_engine(task.module, groups, config, world, accumulation, task.block_types)
    inputs = a_batch(config)

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(task.loss(engine.forward, inputs))
        engine.step(1e-5)

    for _ in range(2):
        step()
    volume = Volume()
    barrier()
    before = wire()
    with CollectiveCounter(volume):
        step()
    barrier()  # what is under way arrives; a few bytes
    volume.wire_sent, volume.wire_received = (after - start for after, start in zip(wire(), before, strict=True))
    return volume


def a_batch(config: Config) -> dict[str, Tensor]:
    size = config.train.micro_batch_size
    height, width = pair("model.img_size", config.model.img_size)
    images = torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8)
    batch = {"images": images, "weight": torch.ones(size)}
    if config.task.name == "classify":
        return batch | {"labels": torch.zeros(size, dtype=torch.int64)}
    if config.task.name == "segment":
        labels, extent = torch.zeros(size, height, width, dtype=torch.uint8), torch.tensor([[height, width]] * size)
        return batch | {"labels": labels, "extent": extent}
    patch = config.model.patch_size
    return batch | {"mask": torch.rand(size, height // patch, width // patch) < 0.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"its overrides (default: {MODEL})")
    parser.add_argument("--only", default="", help="cases whose text holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = init_distributed(600)
    ranks = world.world_size
    if world.is_main:
        print(f"{arguments.model}, {ranks} ranks on gloo; MiB of one rank in a step, predicted / counted\n")
        print("| case | micro-batches | gathered | scattered | summed | messages | sent on the wire | received |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
    for overrides, accumulation in CASES:
        if arguments.only not in overrides:
            continue
        config = compose(f"{arguments.model} {overrides}", ranks, accumulation)
        planned, volume = predicted(config, ranks), counted(config, world)
        if world.is_main:
            cells = [
                f"{nbytes_of(planned, kind) / MIB:.2f} / {volume.nbytes[kind] / MIB:.2f}"
                for kind in (GATHER, SCATTER, SUM)
            ]
            cells.append(f"{sum(each.calls for each in planned)} / {volume.calls.total()}")
            on_wire = gloo_sent(planned, ranks) / MIB
            cells += [f"{on_wire:.2f} / {nbytes / MIB:.2f}" for nbytes in (volume.wire_sent, volume.wire_received)]
            print(f"| {overrides} | {accumulation} | " + " | ".join(cells) + " |", flush=True)
    shutdown_distributed()


if __name__ == "__main__":
    main()
