"""Bytes that the engine holds on one rank: weights, gradients, optimizer and buffers, each by its formula.

N parameters of the model, W ranks, S the largest parameter group's share of a rank, w bytes of a weight (2 bf16, 4
fp32).  The formulas are read from DeepSpeed 0.19.8 and torch's AdamW, and were checked allocation by allocation
(benchmarks/planner_memory_cpu_202611.md):

| | rests | while gradients are made | when they are exchanged | in the step |
|---|---|---|---|---|
| local, ZeRO-0 fp32 | 4N weights, 8N averages | 4N gradients, one by one | 4N flat copy (W > 1) | 8P, P the largest parameter |
| ZeRO-1 bf16 | 2N weights, 4N gradients, 4N/W masters, 8N/W averages | 2N gradients, one by one | 6N copies | 8S |
| ZeRO-1 fp32, ZeRO-2 | wN weights, 4N/W masters, 8N/W averages | 4N or 4N/W gradients, 2 or 3 buckets | | 8S |
| ZeRO-3 | wN/W weights, 4N/W masters, 8N/W averages, 4N/W gradients, a bucket, small parameters | live weights, a bucket | | 4S + 8S |

Live under ZeRO-3 are the block in use and the next one, and in the backward pass every weight of which autograd saved a
view: a linear layer saves the transposed weight, which keeps what was gathered although DeepSpeed releases it, unless
the layer's block is computed again.

AdamW's 8S are torch's loop; the fused kernel on CUDA takes none.  The copies of an exchange are of at most 500 million
elements (runtime/engine.py, allreduce_no_retain).  What is offloaded counts as the host's.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass, field

from swinv2_train.config import EngineConfig
from swinv2_train.engine.buckets import LayerSizes, buckets_of

EXCHANGED_TOGETHER = 500_000_000

WEIGHTS, MASTERS, AVERAGES, GRADIENTS = "weights", "fp32 masters", "AdamW's averages", "gradients"
BUCKETS, LIVE, COPIES, TEMPORARIES = "ZeRO buckets", "ZeRO-3 live weights", "gradient copies", "AdamW's temporaries"


@dataclass(frozen=True)
class ModelSizes:
    """What the formulas need of a model, in elements."""

    parameters: int
    largest_parameter: int
    largest_group: int
    """The largest parameter group of the optimizer (with layer decay there are many)."""
    layers: LayerSizes


@dataclass
class EngineMemory:
    """Bytes by part on one rank."""

    rests: dict[str, int] = field(default_factory=dict)
    """Always there."""
    forward: dict[str, int] = field(default_factory=dict)
    """On top, while the forward pass runs."""
    backward: dict[str, int] = field(default_factory=dict)
    exchange: dict[str, int] = field(default_factory=dict)
    """On top, when the backward pass is over and gradients are exchanged."""
    step: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    """In CPU memory, always there."""
    disk: dict[str, int] = field(default_factory=dict)
    """In engine.nvme_dir."""
    kept_gradient_bytes: float = 0.0
    """What a gradient element leaves behind from its making to the step, besides what rests."""


def engine_memory(
    config: EngineConfig, sizes: ModelSizes, world_size: int, accumulation_steps: int, on_cpu: bool
) -> EngineMemory:
    """The formulas above for one configuration.

    on_cpu: the rank computes on the CPU, where AdamW runs as a loop and gloo copies what it gathers.
    """
    n, w = sizes.parameters, 2 if config.precision == "bf16" else 4
    share = -(-n // world_size)
    memory = EngineMemory()
    stage = 0 if config.name == "local" else config.zero_stage
    state = 2 if config.optimizer_states == "bf16" else 4
    loop = on_cpu or config.offload_optimizer == "cpu"
    group = -(-sizes.largest_group // world_size)
    if stage == 0:
        memory.rests = {WEIGHTS: 4 * n, AVERAGES: 8 * n}
        memory.kept_gradient_bytes = 4
        if world_size > 1:
            memory.exchange = {COPIES: 4 * min(n, EXCHANGED_TOGETHER)}
        memory.step = {TEMPORARIES: 8 * sizes.largest_parameter if loop else 0}
    elif stage == 1 and config.precision == "bf16" and config.offload_optimizer == "none":
        memory.rests = {WEIGHTS: 2 * n, GRADIENTS: 4 * n, MASTERS: 4 * share, AVERAGES: 8 * share}
        memory.kept_gradient_bytes = 2
        memory.exchange = {COPIES: 6 * min(n, EXCHANGED_TOGETHER) if world_size > 1 else 0}
        memory.step = {TEMPORARIES: 8 * group if loop else 0}
    elif stage in (1, 2):
        buckets = buckets_of(config, sizes.layers)
        memory.rests = {WEIGHTS: w * n, MASTERS: state * share, AVERAGES: 2 * state * share}
        memory.kept_gradient_bytes = 4 if stage == 1 else 4 / world_size
        memory.backward = {
            BUCKETS: w * buckets.reduce_bucket_size * (2 if config.overlap_comm else 1),
            COPIES: w * buckets.reduce_bucket_size + (4 * sizes.largest_parameter if w == 2 else 0),
        }
        memory.step = {TEMPORARIES: 2 * state * group if loop else 0}
    else:
        _zero_3(memory, config, sizes, share, group, w, state, loop, world_size)
    if on_cpu and stage > 0 and world_size > 1:  # gloo gathers into a copy
        gathered = sizes.layers.largest_block if stage == 3 else sizes.largest_group
        for phase in (memory.forward, memory.backward) if stage == 3 else (memory.step,):
            phase[COPIES] = phase.get(COPIES, 0) + w * gathered  # or scatters out of one
    if accumulation_steps > 1 and memory.kept_gradient_bytes:  # those of earlier micro-batches are there all the time
        memory.rests[GRADIENTS] = memory.rests.get(GRADIENTS, 0) + int(memory.kept_gradient_bytes * n)
        memory.kept_gradient_bytes = 0.0
    _offload(memory, config, share)
    return memory


def _zero_3(
    memory: EngineMemory,
    config: EngineConfig,
    sizes: ModelSizes,
    share: int,
    group: int,
    w: int,
    state: int,
    loop: bool,
    world_size: int,
) -> None:
    buckets = buckets_of(config, sizes.layers)
    memory.rests = {
        WEIGHTS: w * (share + sizes.layers.small),
        MASTERS: state * share,
        AVERAGES: 2 * state * share,
        GRADIENTS: 4 * share,
        BUCKETS: w * buckets.reduce_bucket_size,
    }
    ahead = max(buckets.prefetch_bucket_size, buckets.max_reuse_distance)
    live = w * min(sizes.parameters, sizes.layers.largest_block + ahead)
    memory.forward = {LIVE: live}
    memory.backward = {
        LIVE: live,
        COPIES: w * buckets.reduce_bucket_size + 4 * buckets.reduce_bucket_size // world_size,
    }
    memory.step = {GRADIENTS: state * group, TEMPORARIES: 2 * state * group if loop else 0}


def _offload(memory: EngineMemory, config: EngineConfig, share: int) -> None:
    """Move what config.engine offloads from the accelerator."""
    moved = {"cpu": memory.host, "nvme": memory.disk}
    if config.offload_optimizer != "none":
        target = moved[config.offload_optimizer]
        for part in (MASTERS, AVERAGES):
            target[part] = memory.rests.pop(part)
        memory.host[GRADIENTS] = memory.rests.pop(GRADIENTS, 0) + 4 * share
        memory.host[TEMPORARIES] = memory.step.pop(TEMPORARIES, 0) + memory.step.pop(GRADIENTS, 0)
        memory.kept_gradient_bytes = 0.0
    if config.offload_param != "none":
        weights = 2 if config.precision == "bf16" else 4
        memory.rests[WEIGHTS] -= weights * share
        moved[config.offload_param][WEIGHTS] = weights * share
