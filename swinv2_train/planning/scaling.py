"""The same run on 8 to 1,024 GPUs: time of a step, efficiency, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swinv2_train.config import Config, ConfigError, HardwareConfig
from swinv2_train.data.loading.loader import accumulation_steps
from swinv2_train.engine.build import engine_memory
from swinv2_train.planning.communication import INTER, INTRA, num_nodes, sent_by_card, total_sent
from swinv2_train.planning.memory import MemoryPlan, memory_by_phase, model_sizes
from swinv2_train.planning.speed import SpeedPlan, measured_pass, pass_seconds, plan_speed, planned_mfu
from swinv2_train.planning.trace import Trace, meta_task, trace_step
from swinv2_train.runtime.environment import GIB

COUNTS = tuple(2**k for k in range(3, 11))
COMPUTE, LAUNCHES, LATENCY, OPTIMIZER = "compute", "launches", "latency", "optimizer"


@dataclass(frozen=True)
class Point:
    """One number of GPUs."""

    num_gpus: int
    num_nodes: int
    micro_batch_size: int
    accumulation_steps: int
    mfu: float | None
    """Model FLOP utilisation of the data sheet's peak."""
    speed: SpeedPlan
    memory: MemoryPlan
    alone_sec: float
    """What a rank's images of a step take in the passes alone, with the configured micro-batch."""
    sent_by_card: float
    """Bytes that one network card sends in a step."""

    @property
    def efficiency(self) -> float:
        """Share of the step in which a rank does what it would do alone."""
        return self.alone_sec / self.speed.step_sec

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the step by what takes them."""
        speed = self.speed
        exposed = {INTRA: 0.0, INTER: 0.0} | {speed.link: speed.exposed}
        compute = {COMPUTE: speed.products + speed.traffic, LAUNCHES: speed.launches}
        return compute | exposed | {LATENCY: speed.latency, OPTIMIZER: speed.optimizer}

    @property
    def limit(self) -> str:
        """What most of the step is."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in a step, and receives."""
        return total_sent(self.speed.collectives, self.num_gpus)


@dataclass(frozen=True)
class Curve:
    """All numbers of GPUs that the batch can be divided among."""

    kind: str
    """strong or weak."""
    measured: float | None
    """plan.step_seconds; None where the data sheet was all there is."""
    points: list[Point]
    left_out: dict[int, str]
    """Why a number of GPUs is not among the points."""


def scaling_curve(config: Config, hardware: HardwareConfig, base_gpus: int) -> Curve:
    """The curve that plan.scaling asks for.

    base_gpus: ranks among which train.global_batch_size is divided; weak scaling keeps their share.  Strong scaling
    keeps the global batch, and where a rank's share is smaller than train.micro_batch_size, takes the largest
    micro-batch that divides it.
    Raises ConfigError where the batch cannot be divided among any number, or one process cannot be scaled.
    """
    assert config.plan.scaling is not None, "plan.scaling is asked for"
    if config.engine.name == "local":
        raise ConfigError(
            f"plan.scaling ({config.plan.scaling}) with engine.name=local, which runs on one process; "
            "set engine.name=deepspeed"
        )
    batch = config.train
    share = None
    if config.plan.scaling == "weak":
        share = accumulation_steps(batch.global_batch_size, batch.micro_batch_size, base_gpus) * batch.micro_batch_size
    traces = Traces(config, hardware)
    points: list[Point] = []
    left_out: dict[int, str] = {}
    for gpus in COUNTS:
        images = batch.global_batch_size if share is None else share * gpus
        reason = _refusal(config, images, gpus)
        if reason is None:
            points.append(traces.point(images, gpus))
        else:
            left_out[gpus] = reason
    if not points:
        raise ConfigError(left_out[COUNTS[0]])
    return Curve(config.plan.scaling, config.plan.step_seconds, points, left_out)


class Traces:
    """Makes points; each micro-batch is traced once."""

    def __init__(self, config: Config, hardware: HardwareConfig) -> None:
        self.config, self.hardware = config, hardware
        self.sizes = model_sizes(meta_task(config), config)
        self._known: dict[tuple[int, float], Trace] = {}
        self.alone = pass_seconds(hardware, self.of(config.train.micro_batch_size, 0.0))

    def of(self, micro_batch_size: int, kept_gradient_bytes: float) -> Trace:
        key = (micro_batch_size, kept_gradient_bytes)
        if key not in self._known:
            config = replace(self.config, train=replace(self.config.train, micro_batch_size=micro_batch_size))
            self._known[key] = trace_step(config, kept_gradient_bytes, self.hardware.device == "cpu")
        return self._known[key]

    def point(self, images: int, gpus: int) -> Point:
        """A step of `images` images on `gpus` ranks."""
        config, hardware, sizes, size = self.config, self.hardware, self.sizes, self.config.train.micro_batch_size
        micro = _micro_batch_size(images // gpus, size, config.task.mixes)
        accumulation = images // (micro * gpus)
        chosen = replace(config, train=replace(config.train, global_batch_size=images, micro_batch_size=micro))
        on_cpu, ema = hardware.device == "cpu", config.optim.ema_decay is not None
        engine = engine_memory(chosen.engine, sizes, gpus, accumulation, on_cpu, ema)
        trace = self.of(micro, engine.kept_gradient_bytes)
        estimated = pass_seconds(hardware, trace)
        passes = measured_pass(config, hardware, sizes.parameters, self.alone, estimated)
        alone = measured_pass(config, hardware, sizes.parameters, self.alone, self.alone)
        speed = plan_speed(chosen, hardware, sizes, passes, gpus)
        return Point(
            num_gpus=gpus,
            num_nodes=num_nodes(hardware, gpus),
            micro_batch_size=micro,
            accumulation_steps=accumulation,
            mfu=planned_mfu(chosen, hardware, trace.model_flops_per_image, speed, gpus),
            speed=speed,
            memory=memory_by_phase(chosen, hardware, engine, sizes, trace, gpus),
            alone_sec=alone.total * images / gpus / size,
            sent_by_card=sent_by_card(total_sent(speed.collectives, gpus), hardware, gpus),
        )


def scaling_json(curve: Curve) -> dict[str, object]:
    """The curve for a program: seconds, bytes, and GiB where the name says so."""
    return {
        "scaling": curve.kind,
        "step_seconds_measured_on_one_rank": curve.measured,
        "points": [
            {
                "num_gpus": each.num_gpus,
                "num_nodes": each.num_nodes,
                "global_batch_size": each.speed.images,
                "micro_batch_size": each.micro_batch_size,
                "accumulation_steps": each.accumulation_steps,
                "step_sec": each.speed.step_sec,
                "images_per_sec": each.speed.images_per_sec,
                "efficiency": each.efficiency,
                "mfu": each.mfu,
                "limit": each.limit,
                "parts_sec": each.parts,
                "hidden_communication_sec": each.speed.hidden,
                "sent_bytes": each.sent,
                "sent_bytes_by_network_card": each.sent_by_card,
                "messages": sum(collective.calls for collective in each.speed.collectives),
                "peak_gib": each.memory.peak / GIB,
                "fits": each.memory.fits,
            }
            for each in curve.points
        ],
        "left_out": {str(gpus): reason for gpus, reason in curve.left_out.items()},
    }


def _refusal(config: Config, images: int, gpus: int) -> str | None:
    """Why `images` images a step are none for `gpus` ranks, and the remedy."""
    pairs = config.task.mixes
    reason = _undivided(images, gpus, pairs)
    if reason is None:
        micro = _micro_batch_size(images // gpus, config.train.micro_batch_size, pairs)
        try:
            config.task.check_ranks(gpus, images // (micro * gpus))
        except ConfigError as error:
            return str(error)
    return reason


def _undivided(images: int, gpus: int, pairs: bool) -> str | None:
    """What is wrong with `images` images for `gpus` ranks, and the remedy.  pairs: for mixup."""
    if images < gpus:
        return (
            f"train.global_batch_size ({images}) is less than one image for each of {gpus} GPUs; set it to {gpus} or "
            "more"
        )
    if images % gpus:
        below = images // gpus * gpus
        return f"train.global_batch_size ({images}) is not a multiple of {gpus} GPUs; nearest: {below}, {below + gpus}"
    if pairs and images // gpus % 2:
        return (
            f"train.global_batch_size ({images}) is {images // gpus} images for each of {gpus} GPUs, and mixup pairs "
            f"them; set it to a multiple of {2 * gpus}"
        )
    return None


def _micro_batch_size(share: int, most: int, pairs: bool) -> int:
    """The largest micro-batch of at most `most` images that divides a rank's share of a step; even for pairs."""
    sizes = range(min(share, most), 0, -1)
    return next(size for size in sizes if share % size == 0 and not (pairs and size % 2))
