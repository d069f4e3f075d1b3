"""How long a step should take: every operation of the trace against the rates of card and fabric."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swinv2_train.config import Config, HardwareConfig
from swinv2_train.data.loader import accumulation_steps
from swinv2_train.planning.operations import Operation
from swinv2_train.planning.trace import Trace

ADAMW_BYTES = 30
"""Traffic of an AdamW step per parameter: master and two averages read and written, gradient read, weight written."""


@dataclass(frozen=True)
class SpeedPlan:
    """Seconds of one optimizer step of one rank.  Waiting for the loader is not in it."""

    products: float
    """Operations bound by arithmetic."""
    traffic: float
    """Operations bound by the device's memory."""
    launches: float
    """What the device waits for the host to start operations."""
    hidden: float
    """Communication that goes on during the passes."""
    exposed: float
    """Communication that the step waits for."""
    optimizer: float
    images: int
    """Of the global batch."""
    flops_per_image: int
    """As computed, recomputation included; a multiply-add is two."""

    @property
    def step_sec(self) -> float:
        return self.products + self.traffic + self.launches + self.exposed + self.optimizer

    @property
    def images_per_sec(self) -> float:
        return self.images / self.step_sec


@dataclass(frozen=True)
class PassSeconds:
    """One micro-batch forward and backward on one rank, without communication."""

    products: float
    traffic: float
    host: float
    """What the host needs to start all operations."""
    flops: int
    moved_to_host: int
    """Bytes of block inputs that go to CPU memory and come back."""

    def times(self, images: int) -> PassSeconds:
        """The same with so many times the images: each operation takes so many times as long, and is started once."""
        return PassSeconds(
            self.products * images, self.traffic * images, self.host, self.flops * images, self.moved_to_host * images
        )


def pass_seconds(hardware: HardwareConfig, trace: Trace) -> PassSeconds:
    """Each operation takes the longer of its arithmetic and its memory traffic.  hardware: without null values."""
    products, traffic = _device_seconds(hardware, trace.operations)
    host = len(trace.operations) * _rate(hardware.op_overhead_us) * 1e-6
    return PassSeconds(products, traffic, host, trace.flops, trace.host_bytes)


def plan_speed(
    config: Config, hardware: HardwareConfig, num_parameters: int, passes: PassSeconds, ranks: int
) -> SpeedPlan:
    """A step of accumulated micro-batches, each of which takes at least what the host needs to start its operations.

    Communication by ring algorithms: a gather or a scatter of n bytes takes n (W-1)/W over the rate of the slowest
    link, a sum over all ranks twice that.  It overlaps with the passes where the engine does that (ZeRO-2 and 3 with
    engine.overlap_comm).
    """
    accumulation = accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, ranks)
    products, traffic = accumulation * passes.products, accumulation * passes.traffic
    host = accumulation * passes.host
    hidden, exposed = _communication(config, hardware, num_parameters, passes, ranks, accumulation)
    shard = 1 if config.engine.name == "local" or config.engine.zero_stage == 0 else ranks
    optimizer = ADAMW_BYTES * num_parameters / shard / _traffic_rate(hardware)
    if config.engine.offload_optimizer != "none":  # gradients out and weights in
        optimizer += 6 * num_parameters / shard / (_rate(hardware.host_gb_per_sec) * 1e9)
    return SpeedPlan(
        products=products,
        traffic=traffic,
        launches=max(0.0, host - products - traffic),
        hidden=hidden,
        exposed=exposed,
        optimizer=optimizer,
        images=config.train.global_batch_size,
        flops_per_image=passes.flops // config.train.micro_batch_size,
    )


def _device_seconds(hardware: HardwareConfig, operations: Iterable[Operation]) -> tuple[float, float]:
    """Seconds bound by arithmetic, and seconds bound by memory."""
    efficiency = _rate(hardware.matmul_efficiency) * 1e12
    rates = {"bf16": _rate(hardware.tflops_bf16) * efficiency, "fp32": _rate(hardware.tflops_fp32) * efficiency}
    bandwidth = _traffic_rate(hardware)
    products = traffic = 0.0
    for operation in operations:
        arithmetic, memory = operation.flops / rates[operation.precision], operation.nbytes / bandwidth
        if arithmetic > memory:
            products += arithmetic
        else:
            traffic += memory
    return products, traffic


def _communication(
    config: Config, hardware: HardwareConfig, n: int, passes: PassSeconds, ranks: int, accumulation: int
) -> tuple[float, float]:
    """(seconds hidden behind the passes, seconds that the step waits)."""
    engine = config.engine
    weight = 2 if engine.precision == "bf16" else 4
    local = ranks <= _rate(hardware.gpus_per_node)
    link = _rate(hardware.intra_node_gb_per_sec if local else hardware.inter_node_gb_per_sec) * 1e9
    a_pass = n * (ranks - 1) / ranks / link  # seconds a byte of each parameter needs once around
    beside = after = 0.0
    if ranks > 1 and engine.name != "local":
        if engine.zero_stage == 3:  # gathered in both passes, scattered in the second, of each micro-batch
            beside = 3 * weight * a_pass * accumulation
        elif engine.zero_stage == 2 or (engine.zero_stage == 1 and engine.precision == "fp32"):
            beside, after = 2 * weight * a_pass * accumulation, weight * a_pass
        else:
            after = 2 * weight * a_pass + (weight * a_pass if engine.zero_stage else 0.0)
        if not engine.overlap_comm:
            beside, after = 0.0, beside + after
    moved = 2 * passes.moved_to_host * accumulation / (_rate(hardware.host_gb_per_sec) * 1e9)  # out and in
    if hardware.device == "cuda":
        beside += moved
    hidden = min(beside, accumulation * (passes.products + passes.traffic))
    return hidden, after + beside - hidden


def _traffic_rate(hardware: HardwareConfig) -> float:
    return _rate(hardware.memory_gb_per_sec) * _rate(hardware.memory_efficiency) * 1e9


def _rate(value: float | None) -> float:
    assert value is not None, "hardware is completed before it is planned with"
    return value
