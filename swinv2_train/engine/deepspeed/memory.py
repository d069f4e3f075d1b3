"""Bytes that DeepSpeed's engine holds on one rank: weights, gradients, optimizer and buffers, each by its formula.

N parameters of the model, of which T are trained (N in the table where all are), W ranks, S the largest parameter group's share of a rank, w bytes of a weight (2 bf16, 4
fp32).  The formulas are read from DeepSpeed 0.19.8 and torch's AdamW, and were checked allocation by allocation
(benchmarks/planner_memory_cpu_202611.md):

| | resident | while gradients are made | when they are exchanged | in the step |
|---|---|---|---|---|
| ZeRO-0 fp32 | 4N weights, 8N moments | 4N gradients, one by one | 4N flat copy (W > 1) | |
| ZeRO-1 bf16 | 2N weights, 4N gradients, 4N/W masters, 8N/W moments | 2N gradients, one by one | 6N copies | |
| ZeRO-1 fp32, ZeRO-2 | wN weights, 4N/W masters, 8N/W moments | 4N or 4N/W gradients, 2 or 3 buckets | | |
| ZeRO-3 | wN/W weights, 4N/W masters, 8N/W moments, 4N/W gradients, a bucket, small parameters | live weights, copies of a bucket, by place (Gathering) | | 4S |

Live under ZeRO-3 are the block in use and the next one, and from the forward to the backward pass every weight of which
autograd saved a view: a linear layer saves the transposed weight, which keeps what was gathered although DeepSpeed
releases it, unless the layer's block is computed again.  (A CPU's own products, models/kernels/cpu_products.py, save
the weight itself and keep nothing: there a run takes less than the plan says.)  What is being gathered is there twice,
as a flat buffer and as the weights that are copied out of it.

optim.ema_decay adds 4N bytes for ZeRO-0 and 4N/W for the others, beside the masters, and no temporaries.
AdamW is fused and takes no temporaries.  The copies of an exchange are of at most 500 million
elements (runtime/engine.py, allreduce_no_retain).  What is offloaded counts as the host's.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from swinv2_train.config import EngineConfig
from swinv2_train.engine.deepspeed.buckets import buckets_of
from swinv2_train.engine.memory import (
    BUCKETS,
    COPIES,
    EMA,
    GRADIENTS,
    LIVE,
    MASTERS,
    MOMENTS,
    WEIGHTS,
    EngineMemory,
    PlacePeak,
    StepTrace,
    replicated_memory,
)
from swinv2_train.engine.model_sizes import ModelSizes

EXCHANGED_TOGETHER = 500_000_000
"""Elements of the largest message without buckets (runtime/engine.py, allreduce_no_retain)."""


@dataclass(frozen=True)
class Gathering:
    """What ZeRO-3 adds to a pass in one place of the model.  Sizes in elements.

    The largest blocks come last and have the smallest activations, so these bytes and those of the activations are
    counted together, place by place, and are not each at their highest.
    """

    ahead: int
    """The block in use and what is gathered before its turn or kept after it, at most."""
    largest_block: int
    bucket: int
    element_bytes: int
    world_size: int
    copied: int
    """What is there twice while it is gathered: the flat buffer of a block, or of what is fetched ahead, and the
    weights cut out of it (partition_parameters.py, AllGatherCoalescedHandle); on a CPU gloo's own copy.  0 on one rank,
    which gathers nothing."""
    one_by_one: bool
    """At an exchange, copies are of one parameter at a time, as on a CPU."""

    def in_forward(self, trace: StepTrace, peak: PlacePeak) -> dict[str, int]:
        """Every block is still to come, in the backward pass if not in this one."""
        return self._live(trace, peak, trace.num_parameters)

    def in_backward(self, trace: StepTrace, peak: PlacePeak) -> dict[str, int]:
        """Where a bucket gets full, copies of it: the gradients put together, and a rank's share of them in fp32.

        By then the window is full, and on a CPU gloo copies what takes the place of a freed weight: one parameter at a
        time.  Elsewhere a block may just be gathered ahead.
        """
        places = [place for place, _ in trace.gradients]
        first = places.index(peak.place) if peak.place in places else 0
        to_come = [numel for _, numel in trace.gradients[first:]]
        frozen = trace.num_parameters - sum(numel for _, numel in trace.gradients)  # they may all be still to come
        parts = self._live(trace, peak, sum(to_come) + frozen)
        if peak.place in self._places_of_exchange(trace.gradients):
            exchanged = self.element_bytes * self.bucket + 4 * self.bucket // self.world_size
            gathered = min(self.copied, max(to_come) if self.one_by_one else sum(to_come))
            parts[COPIES] = max(parts[COPIES], exchanged + self.element_bytes * gathered)
        return parts

    def _live(self, trace: StepTrace, peak: PlacePeak, to_come: int) -> dict[str, int]:
        """Live: what is gathered ahead, of what is still to come, and what autograd holds.

        What is held is gathered again when its turn comes; by then what was held of a block has been freed.
        """
        live = self.element_bytes * min(self.ahead, to_come) + peak.held_weights
        most = trace.weight_bytes + self.element_bytes * self.largest_block
        return {LIVE: min(live, most), COPIES: self.element_bytes * min(self.copied, to_come)}

    def _places_of_exchange(self, gradients: list[tuple[str, int]]) -> set[str]:
        """Where a gradient does not fit into the bucket any more, which is then exchanged (stage3.py)."""
        places, filled = set(), 0
        for place, numel in gradients:
            if filled and filled + numel > self.bucket:
                places.add(place)
                filled = 0
            filled += numel
        return places


@dataclass(kw_only=True)
class Zero3Memory(EngineMemory):
    """Bytes by part on one rank, some of which depend on the place in the model."""

    gathering: Gathering
    """On top of both passes."""

    def in_forward(self, trace: StepTrace, peak: PlacePeak) -> dict[str, int]:
        return self.gathering.in_forward(trace, peak)

    def in_backward(self, trace: StepTrace, peak: PlacePeak) -> dict[str, int]:
        return self.gathering.in_backward(trace, peak)


def zero_memory(
    config: EngineConfig, sizes: ModelSizes, world_size: int, accumulation_steps: int, on_cpu: bool, ema: bool
) -> EngineMemory:
    """The formulas above for one configuration; arguments as for engine_memory (engine/build.py)."""
    share = -(-sizes.trained // world_size)
    weights = -(-sizes.parameters // world_size)
    if config.zero_stage == 0:
        memory = _zero_0(sizes, world_size, ema)
    elif config.zero_stage == 3:
        memory = _zero_3(config, sizes, world_size, on_cpu)
    else:
        memory = _zero_1_2(config, sizes, world_size)
    if ema and config.zero_stage > 0:
        memory.resident[EMA] = 4 * share
    if on_cpu and config.zero_stage in (1, 2) and world_size > 1:  # gloo gathers into a copy
        memory.step[COPIES] = _weight_bytes(config) * sizes.largest_group
    memory.keep_earlier_gradients(sizes.trained, accumulation_steps)
    _offload(memory, config, share, weights)
    return memory


def _weight_bytes(config: EngineConfig) -> int:
    return 2 if config.precision == "bf16" else 4


def summed_bytes(config: EngineConfig) -> int:
    """Of a gradient while it is summed over ranks."""
    return 4 if config.communication_data_type == "fp32" else _weight_bytes(config)


def _wider_copy(config: EngineConfig) -> int:
    """Bytes of a gradient's copy where it is summed in another type than its own; 0 where it is not."""
    return summed_bytes(config) if summed_bytes(config) != _weight_bytes(config) else 0


def _state_bytes(config: EngineConfig) -> int:
    return 2 if config.optimizer_states == "bf16" else 4


def _zero_0(sizes: ModelSizes, world_size: int, ema: bool) -> EngineMemory:
    memory = replicated_memory(sizes, ema)
    if world_size > 1:
        memory.exchange = {COPIES: 4 * min(sizes.trained, EXCHANGED_TOGETHER)}
    return memory


def _zero_1_2(config: EngineConfig, sizes: ModelSizes, world_size: int) -> EngineMemory:
    n, w, state = sizes.trained, _weight_bytes(config), _state_bytes(config)
    share = -(-n // world_size)
    if config.zero_stage == 1 and config.precision == "bf16" and config.offload_optimizer == "none":
        return EngineMemory(
            resident={WEIGHTS: 2 * sizes.parameters, GRADIENTS: 4 * n, MASTERS: 4 * share, MOMENTS: 8 * share},
            # The fp32 gradients in one piece, and again in bf16 where they are summed so.
            exchange={COPIES: (6 if summed_bytes(config) == 2 else 4) * min(n, EXCHANGED_TOGETHER) * (world_size > 1)},
            kept_gradient_bytes=2,
        )
    buckets = buckets_of(config, sizes.layers)
    return EngineMemory(
        resident={WEIGHTS: w * sizes.parameters, MASTERS: state * share, MOMENTS: 2 * state * share},
        backward={
            BUCKETS: w * buckets.reduce_bucket_size * (2 if config.overlap_comm else 1),
            COPIES: (w + _wider_copy(config)) * buckets.reduce_bucket_size
            + (4 * sizes.largest_parameter if w == 2 else 0),
        },
        kept_gradient_bytes=4 if config.zero_stage == 1 else 4 / world_size,
    )


def _zero_3(config: EngineConfig, sizes: ModelSizes, world_size: int, on_cpu: bool) -> EngineMemory:
    w, state = _weight_bytes(config), _state_bytes(config)
    share, group = -(-sizes.trained // world_size), -(-sizes.largest_group // world_size)
    buckets, largest_block = buckets_of(config, sizes.layers), sizes.layers.largest_block
    copied = largest_block if on_cpu else max(largest_block, buckets.prefetch_bucket_size)
    return Zero3Memory(
        resident={
            WEIGHTS: w * (-(-sizes.parameters // world_size) + sizes.layers.small),
            MASTERS: state * share,
            MOMENTS: 2 * state * share,
            GRADIENTS: 4 * share,
            BUCKETS: (w + _wider_copy(config)) * buckets.reduce_bucket_size,
        },
        step={GRADIENTS: state * group},
        gathering=Gathering(
            ahead=largest_block + max(buckets.prefetch_bucket_size, buckets.max_reuse_distance),
            largest_block=largest_block,
            bucket=buckets.reduce_bucket_size,
            element_bytes=w,
            world_size=world_size,
            copied=copied if world_size > 1 else 0,
            one_by_one=on_cpu,
        ),
    )


def _offload(memory: EngineMemory, config: EngineConfig, trained: int, parameters: int) -> None:
    """Move what config.engine offloads from the accelerator.  trained, parameters: a rank's share of them."""
    moved = {"cpu": memory.host, "nvme": memory.disk}
    if config.offload_optimizer != "none":
        target = moved[config.offload_optimizer]
        for part in (MASTERS, MOMENTS, EMA):
            if part in memory.resident:
                target[part] = memory.resident.pop(part)
        memory.host[GRADIENTS] = memory.resident.pop(GRADIENTS, 0) + 4 * trained + memory.step.pop(GRADIENTS, 0)
        memory.kept_gradient_bytes = 0.0
    if config.offload_param != "none":
        weights = _weight_bytes(config) * parameters
        memory.resident[WEIGHTS] -= weights
        moved[config.offload_param][WEIGHTS] = weights
