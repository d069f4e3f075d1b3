"""How long a step should take: every operation of the trace against the rates of card and fabric."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from swinv2_train.config import Config, ConfigError, HardwareConfig
from swinv2_train.data.loading.loader import accumulation_steps
from swinv2_train.engine.model_sizes import ModelSizes
from swinv2_train.monitoring.metrics import mfu
from swinv2_train.planning.communication import Collective, collectives, ring, seconds
from swinv2_train.planning.hardware import required
from swinv2_train.planning.op_cost import Operation
from swinv2_train.planning.trace import Trace

ADAMW_BYTES = 30
"""Traffic of an AdamW step per parameter: master and two moments read and written, gradient read, weight written."""
EMA_BYTES = 12
"""Traffic of averaging the weights (optim.ema_decay) per parameter: average read and written, master read."""


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
    """Communication that the step waits for: its bytes."""
    latency: float
    """Communication that the step waits for: its messages, however small they are."""
    optimizer: float
    images: int
    """Images of the global batch."""
    flops_per_image: int
    """As computed, recomputation included; a multiply-add is two."""
    link: str
    """The slower part of the fabric: intra-node or inter-node."""
    collectives: tuple[Collective, ...]

    @property
    def passes(self) -> float:
        """Forward and backward passes alone."""
        return self.products + self.traffic + self.launches

    @property
    def step_sec(self) -> float:
        return self.passes + self.exposed + self.latency + self.optimizer

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
    backward: float
    """Share of the backward pass in products and traffic."""
    flops: int
    moved_to_host: int
    """Bytes of block inputs that go to CPU memory and come back."""

    @property
    def total(self) -> float:
        return max(self.products + self.traffic, self.host)

    def times(self, factor: float) -> PassSeconds:
        """The same passes, faster or slower by a factor."""
        return replace(self, products=self.products * factor, traffic=self.traffic * factor, host=self.host * factor)


def pass_seconds(hardware: HardwareConfig, trace: Trace) -> PassSeconds:
    """Each operation takes the longer of its arithmetic and its memory traffic.  hardware: without null values."""
    products, traffic = _device_seconds(hardware, trace.operations)
    forward = sum(_device_seconds(hardware, trace.operations[: trace.forward_operations]))
    host = len(trace.operations) * required(hardware.op_overhead_us) * 1e-6
    backward = 1 - forward / (products + traffic)
    return PassSeconds(products, traffic, host, backward, trace.flops, trace.host_bytes)


def extrapolated_pass(hardware: HardwareConfig, few: Trace, more: Trace, times: float) -> PassSeconds:
    """The passes of `times` as many images as few has, from few and more, which has twice as many.

    Each operation's arithmetic and bytes grow along a straight line, so this is what a trace of as many images says;
    where the number of operations depends on the images, the whole grows along one, and it is no more than that.
    """

    def number(one: float, two: float) -> float:
        return one + (two - one) * (times - 1)

    flops, moved = round(number(few.flops, more.flops)), round(number(few.host_bytes, more.host_bytes))
    if len(few.operations) != len(more.operations):
        one, two = pass_seconds(hardware, few), pass_seconds(hardware, more)
        products, traffic, host = (
            number(getattr(one, name), getattr(two, name)) for name in ("products", "traffic", "host")
        )
        return PassSeconds(products, traffic, host, two.backward, flops, moved)
    pairs = zip(few.operations, more.operations, strict=True)
    grown = [
        Operation(round(number(a.flops, b.flops)), round(number(a.nbytes, b.nbytes)), a.precision) for a, b in pairs
    ]
    return pass_seconds(hardware, replace(few, operations=grown, host_bytes=moved))


def measured_pass(
    config: Config, hardware: HardwareConfig, num_parameters: int, configured: PassSeconds, passes: PassSeconds
) -> PassSeconds:
    """A micro-batch's passes by plan.step_seconds, measured on one rank; as they are where it is null.

    configured: the estimate for train.micro_batch_size images, which is what was measured; the estimate in passes, for
    any number of images, changes as much.  The optimizer's part of the measured step is estimated and taken off.
    Raises ConfigError where nothing is left.
    """
    if config.plan.step_seconds is None:
        return passes
    optimizer = optimizer_seconds(config, hardware, num_parameters, 1)
    if config.plan.step_seconds <= optimizer:
        raise ConfigError(
            f"plan.step_seconds ({config.plan.step_seconds}) is no more than the optimizer alone takes by "
            f"hardware.memory_gb_per_sec ({optimizer:.3g} s on one rank); give the time of a whole step: perf/step_sec "
            "of a run on one rank with train.global_batch_size = train.micro_batch_size"
        )
    total = config.plan.step_seconds - optimizer
    change = total / (configured.products + configured.traffic)
    return replace(
        passes,
        products=passes.products * change,
        traffic=passes.traffic * change,
        host=min(passes.host, total),
    )


def plan_speed(
    config: Config, hardware: HardwareConfig, sizes: ModelSizes, passes: PassSeconds, ranks: int
) -> SpeedPlan:
    """A step of accumulated micro-batches, each of which takes at least what the host needs to start its operations.

    What goes over the fabric overlaps with the passes where the engine does that (planning/communication.py); none of
    it slows the passes down.
    """
    accumulation = accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, ranks)
    sent = collectives(config.engine, sizes, ranks, accumulation, passes.backward)
    hidden, exposed, latency = _communication(hardware, sent, passes, ranks, accumulation)
    return SpeedPlan(
        products=accumulation * passes.products,
        traffic=accumulation * passes.traffic,
        launches=accumulation * max(0.0, passes.host - passes.products - passes.traffic),
        hidden=hidden,
        exposed=exposed,
        latency=latency,
        optimizer=optimizer_seconds(config, hardware, sizes.trained, ranks),
        images=config.train.global_batch_size,
        flops_per_image=passes.flops // config.train.micro_batch_size,
        link=ring(hardware, ranks)[0],
        collectives=tuple(sent),
    )


def planned_mfu(
    config: Config, hardware: HardwareConfig, model_flops_per_image: int, speed: SpeedPlan, ranks: int
) -> float | None:
    """Model FLOP utilisation of the hardware's peak in the engine's precision, 0..1."""
    peak = required(hardware.tflops_bf16 if config.engine.precision == "bf16" else hardware.tflops_fp32) * 1e12
    return mfu(model_flops_per_image, speed.images_per_sec, peak, ranks)


def optimizer_seconds(config: Config, hardware: HardwareConfig, num_parameters: int, ranks: int) -> float:
    """AdamW on a rank's share of the parameters, and what averages the weights."""
    shard = 1 if config.engine.name == "local" or config.engine.zero_stage == 0 else ranks
    moved = ADAMW_BYTES + (EMA_BYTES if config.optim.ema_decay is not None else 0)
    taken = moved * num_parameters / shard / _traffic_rate(hardware)
    if config.engine.offload_optimizer != "none":  # gradients out and weights in
        taken += 6 * num_parameters / shard / (required(hardware.host_gb_per_sec) * 1e9)
    return taken


def _device_seconds(hardware: HardwareConfig, operations: Iterable[Operation]) -> tuple[float, float]:
    """Seconds bound by arithmetic, and seconds bound by memory."""
    efficiency = required(hardware.matmul_efficiency) * 1e12
    rates = {"bf16": required(hardware.tflops_bf16) * efficiency, "fp32": required(hardware.tflops_fp32) * efficiency}
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
    hardware: HardwareConfig, sent: list[Collective], passes: PassSeconds, ranks: int, accumulation: int
) -> tuple[float, float, float]:
    """Seconds (hidden behind the passes, that the step waits for bytes, that it waits for messages)."""
    room = accumulation * passes.total
    parts = []
    for each in sent:
        for_bytes, for_messages = seconds(each, hardware, ranks)
        for share, beside in ((1 - each.last, each.beside), (each.last, 0.0)):
            parts.append(((share * for_bytes, share * for_messages), beside))
    if hardware.device == "cuda":  # block inputs go to CPU memory and come back
        moved = 2 * passes.moved_to_host * accumulation / (required(hardware.host_gb_per_sec) * 1e9)
        parts.append(((moved, 0.0), 1.0))
    hidden = exposed = latency = 0.0
    for (for_bytes, for_messages), share in sorted(parts, key=lambda part: part[1]):
        together = for_bytes + for_messages
        behind = min(together, max(0.0, share * room - hidden))
        left = 1 - behind / together if together else 0.0
        hidden, exposed, latency = hidden + behind, exposed + left * for_bytes, latency + left * for_messages
    return hidden, exposed, latency


def _traffic_rate(hardware: HardwareConfig) -> float:
    return required(hardware.memory_gb_per_sec) * required(hardware.memory_efficiency) * 1e9
