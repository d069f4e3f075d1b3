"""What the ranks send each other in one step: every collective, its bytes, and the seconds that the fabric takes.

N parameters of the model, w bytes of a weight (2 bf16, 4 fp32), A micro-batches of a step.  Read from DeepSpeed 0.19.8
and counted on 2 and 4 ranks (benchmarks/communication_volume_cpu_202611.md):

| | beside the passes | after them |
|---|---|---|
| ZeRO-0 fp32 | | all-reduce of 4N |
| ZeRO-1 bf16 | | all-reduce of 2N, all-gather of 2N |
| ZeRO-1 fp32 | all-reduce of 4N, in the last micro-batch | all-gather of 4N, a norm for each parameter group |
| ZeRO-2 | A all-reduces of wN | all-gather of wN, a norm for each parameter group |
| ZeRO-3 | A times: all-gathers of wG, reduce-scatters of wN | the small parameters, one gather each; the norms |

The last bucket of each micro-batch has no pass left to go on beside.  Under ZeRO-1 and 2 the passes also wait, when a
bucket is full, until the one before it has been summed (average_tensor of stage_1_and_2.py lets the current stream wait
for the stream of reductions; DeepSpeed #8364), so a sum goes on beside the filling of one bucket and no more: what a
fabric is too slow for there shows up as exposed, bucket by bucket, if all buckets take equally long to fill.

G: what stays whole from one pass to the next is gathered once, everything else twice.  That is the last block, blocks
before it as far as engine.max_reuse_distance reaches, and all layers outside of blocks (whose reuse DeepSpeed looks for
without counting the blocks in between).  Recomputation adds nothing: a block computed again has been gathered for its
backward pass.  Small are parameters of at most engine.persistence_threshold elements.  With
engine.communication_data_type=fp32 the sums and scatters of bf16 gradients have 4 bytes an element.

Norms over the images of all ranks (task.head_norm=sync_batch) sum a number, means and variances in each forward pass
and two gradients in each backward pass, in float32, and nothing goes on beside.

Ring algorithms: a rank sends (W-1)/W of what is gathered or scattered and twice that of what is summed, and receives as
much; all cards of a node carry the rings' traffic together, so the ring is as fast as the slower of a rank's link in
the node and the node's cards together (NCCL, src/graph/tuning.cc, takes busBw so too).  A message waits one latency for
each hop; a small sum goes up and down a tree where that is shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from swinv2_train.config import EngineConfig, HardwareConfig
from swinv2_train.engine.deepspeed.buckets import buckets_of
from swinv2_train.engine.deepspeed.memory import EXCHANGED_TOGETHER, summed_bytes
from swinv2_train.engine.model_sizes import ModelSizes
from swinv2_train.planning.hardware import required

GATHER, SCATTER, SUM = "all-gather", "reduce-scatter", "all-reduce"
INTRA, INTER = "intra-node", "inter-node"
NORM_BYTES = 8


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in one step, taken together."""

    kind: str
    what: str
    nbytes: int
    """Bytes of all calls: what every rank has after a gather, and what every rank brings to a sum or a scatter."""
    calls: int
    beside: float
    """Share of the passes that it can go on beside; 0 = it comes after them."""
    last: float = 0.0
    """Share of it that comes when the passes are over in any case: what is in the last bucket."""

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, and receives."""
        return (2 if self.kind == SUM else 1) * self.nbytes * (ranks - 1) / ranks


def collectives(
    config: EngineConfig, sizes: ModelSizes, ranks: int, accumulation: int, backward: float
) -> list[Collective]:
    """The collectives of one step.  backward: the backward pass's share of the time of both."""
    if ranks == 1 or config.name == "local":
        return []
    return [*_of_engine(config, sizes, accumulation, backward), *_of_norms(sizes, accumulation)]


def _of_norms(sizes: ModelSizes, accumulation: int) -> list[Collective]:
    if not sizes.synced_norms:
        return []
    nbytes, calls = sum(4 * (4 * channels + 1) for channels in sizes.synced_norms), 5 * len(sizes.synced_norms)
    return [Collective(SUM, "statistics", accumulation * nbytes, accumulation * calls, 0.0)]


def _of_engine(config: EngineConfig, sizes: ModelSizes, accumulation: int, backward: float) -> list[Collective]:
    stage, n, w = config.zero_stage, sizes.trained, 2 if config.precision == "bf16" else 4
    buckets, g = buckets_of(config, sizes.layers), summed_bytes(config)
    norms = Collective(SUM, "norms", NORM_BYTES * len(sizes.groups), len(sizes.groups), 0.0)
    if stage == 3:
        return _zero_3(config, sizes, accumulation, backward) + [norms]
    reductions = -(-n // buckets.reduce_bucket_size)
    if stage == 0:
        return [Collective(SUM, "gradients", 4 * n, -(-n // EXCHANGED_TOGETHER), 0.0)]
    pieces = sum(max(1, group // buckets.reduce_bucket_size) for group in sizes.groups)
    weights = Collective(GATHER, "weights", w * n, pieces, 0.0)
    if stage == 1 and config.precision == "bf16" and config.offload_optimizer == "none":
        return [Collective(SUM, "gradients", g * n, -(-n // EXCHANGED_TOGETHER), 0.0), weights]
    times = accumulation if stage == 2 else 1
    beside = backward * times / accumulation if config.overlap_comm else 0.0
    last = _last_bucket(n, buckets.reduce_bucket_size)
    return [Collective(SUM, "gradients", times * g * n, times * reductions, beside, last), weights, norms]


def _zero_3(config: EngineConfig, sizes: ModelSizes, accumulation: int, backward: float) -> list[Collective]:
    w, buckets = 2 if config.precision == "bf16" else 4, buckets_of(config, sizes.layers)
    limit = buckets.persistence_threshold
    blocks = [sum(numel for numel in block if numel > limit) for block in sizes.blocks]
    others = sum(numel for numel in sizes.others if numel > limit)
    numels = [numel for part in (*sizes.blocks, sizes.others) for numel in part]
    small = [numel for numel in numels if numel <= limit]
    kept = later = 0
    for block, numel in zip(reversed(sizes.blocks), reversed(blocks), strict=True):
        if later and later >= buckets.max_reuse_distance:
            break
        kept, later = kept + numel, later + sum(block)
    gathered = 2 * sum(blocks) + others - kept
    gathers = -(-gathered // buckets.prefetch_bucket_size) + 2 if buckets.prefetch_bucket_size else 2 * len(blocks)
    scatters = -(-sizes.trained // buckets.reduce_bucket_size) + 1
    beside = (1.0, backward) if config.overlap_comm else (0.0, 0.0)
    return [
        Collective(GATHER, "weights", w * accumulation * gathered, accumulation * gathers, beside[0]),
        Collective(
            SCATTER,
            "gradients",
            summed_bytes(config) * accumulation * sizes.trained,
            accumulation * scatters,
            beside[1],
            _last_bucket(sizes.trained, buckets.reduce_bucket_size),
        ),
        Collective(GATHER, "small parameters", w * sum(small), len(small), 0.0),
    ]


def _last_bucket(parameters: int, bucket: int) -> float:
    """Share of the gradients in the last of a pass's buckets, which is sent when the pass is over."""
    return (parameters - (-(-parameters // bucket) - 1) * bucket) / parameters


def num_nodes(hardware: HardwareConfig, ranks: int) -> int:
    return -(-ranks // int(required(hardware.gpus_per_node)))


def ring(hardware: HardwareConfig, ranks: int) -> tuple[str, float]:
    """The slower part of the fabric, INTRA or INTER, and bytes/s that one rank sends and receives over it."""
    inside = required(hardware.intra_node_gb_per_sec) * 1e9
    if num_nodes(hardware, ranks) == 1:
        return INTRA, inside
    between = required(hardware.inter_node_gb_per_sec) * 1e9 * min(ranks, int(required(hardware.gpus_per_node)))
    return (INTER, between) if between < inside else (INTRA, inside)


def message_sec(kind: str, hardware: HardwareConfig, ranks: int) -> float:
    """What one message takes however small it is: its start, and a hop after the other."""
    nodes = num_nodes(hardware, ranks)
    inside, between = required(hardware.intra_node_latency_us), required(hardware.inter_node_latency_us)
    around = (ranks - nodes) * inside + (nodes - 1) * between
    if kind == SUM:
        tree = (min(ranks, int(required(hardware.gpus_per_node))) - 1) * inside + math.ceil(math.log2(nodes)) * between
        around = 2 * min(around, tree)
    return (required(hardware.op_overhead_us) + around) * 1e-6


def seconds(each: Collective, hardware: HardwareConfig, ranks: int) -> tuple[float, float]:
    """Seconds that a collective takes (for its bytes, for its messages)."""
    return each.sent(ranks) / ring(hardware, ranks)[1], each.calls * message_sec(each.kind, hardware, ranks)


def sent_by_card(sent: float, hardware: HardwareConfig, ranks: int) -> float:
    """What of a rank's bytes one network card sends to another node."""
    return sent / min(ranks, int(required(hardware.gpus_per_node))) if num_nodes(hardware, ranks) > 1 else 0.0


def total_sent(all_of_them: Iterable[Collective], ranks: int) -> float:
    return sum(each.sent(ranks) for each in all_of_them)
