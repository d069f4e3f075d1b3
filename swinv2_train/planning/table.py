"""A plan as text: where the bytes go, how fast it is, whether it fits."""

from __future__ import annotations

import dataclasses

from swinv2_train.config import Config, HardwareConfig
from swinv2_train.planning.communication import sent_by_card, total_sent
from swinv2_train.planning.hardware import required
from swinv2_train.planning.memory import MemoryPlan
from swinv2_train.planning.scaling import Curve
from swinv2_train.planning.speed import SpeedPlan, planned_mfu
from swinv2_train.planning.start_warning import describe_shortfall
from swinv2_train.report.charts import value_text
from swinv2_train.runtime.environment import GIB

STATE_BYTES = {"fp32": 12, "bf16": 6}
"""A checkpoint's bytes per parameter: master and AdamW's two moments."""
EMA_BYTES = 4
"""A checkpoint's bytes per parameter for the weight's own average (optim.ema_decay)."""


def memory_table(plan: MemoryPlan) -> str:
    """Parts in rows, phases of a step in columns, GiB of one rank."""
    phases = list(plan.phases)
    names = list(dict.fromkeys(part for parts in plan.phases.values() for part in parts))
    width = max(len(name) for name in [*names, "peak"])
    lines = [f"{'GiB of one rank':{width}}  " + "  ".join(f"{phase:>17}" for phase in phases)]
    for name in names:
        cells = [plan.phases[phase].get(name, 0) / GIB for phase in phases]
        if max(cells) >= 0.0005:
            lines.append(f"{name:{width}}  " + "  ".join(f"{cell:17.3f}" if cell else f"{'':17}" for cell in cells))
    totals = [sum(plan.phases[phase].values()) / GIB for phase in phases]
    lines.append(f"{'together':{width}}  " + "  ".join(f"{total:17.3f}" for total in totals))
    return "\n".join(lines)


def verdict(plan: MemoryPlan, hardware: HardwareConfig, num_gpus: int) -> str:
    """One line: fits or not, by how much."""
    where = f"{num_gpus} x {hardware.name}"
    if not plan.fits:
        return f"does not fit on {where}: {describe_shortfall(plan)}; --recommend looks for a setting that does"
    share = 1 - plan.peak / plan.available
    return (
        f"fits on {where}: peak {plan.peak / GIB:.2f} GiB in the {plan.peak_phase} of {plan.available / GIB:.1f} GiB, "
        f"{100 * share:.0f} % free (margin asked for: {100 * plan.margin:.0f} %)"
    )


def evaluation_line(config: Config, plan: MemoryPlan, nbytes: int) -> str:
    """What a forward pass of evaluation takes, and a warning where it does not fit.  nbytes: beside the weights."""
    count, height, width = config.task.evaluated_at_once(config) or (0, 0, 0)
    together = plan.resident + nbytes
    line = f"evaluation: {count} x {height} x {width} px at a time: {nbytes / GIB:.2f} GiB beside what stays"
    if together > plan.available:
        line += f"; warning: {together / GIB:.2f} GiB together do not fit in {plan.available / GIB:.1f}"
    return line


def reserved_line(hardware: HardwareConfig) -> str:
    """What of the device's memory the plan does not count on, and what for."""
    reserved, memory = required(hardware.reserved_gib), required(hardware.memory_gib)
    for_what = "" if hardware.device == "cpu" else ": CUDA's context, NCCL's buffers, workspaces, fragments"
    return f"set aside: {reserved:.3g} of {memory:.3g} GiB (hardware.reserved_gib{for_what}; an assumption)"


def host_line(plan: MemoryPlan, hardware: HardwareConfig, num_gpus: int) -> str:
    """CPU memory of one rank, and of a node's, and its disk."""
    parts = ", ".join(f"{part} {nbytes / GIB:.2f}" for part, nbytes in plan.host.items())
    disk = "".join(f"; on disk: {part} {nbytes / GIB:.2f}" for part, nbytes in plan.disk.items())
    ranks, together = min(num_gpus, hardware.gpus_per_node or num_gpus), sum(plan.host.values()) / GIB
    node = f"; together {together:.2f}" + (f", {ranks * together:.2f} for a node's {ranks} ranks" if ranks > 1 else "")
    return f"CPU memory of one rank, GiB: {parts + node if parts else 'nothing of size'}{disk}"


def length_line(steps: int | None, step_sec: float, num_gpus: int) -> str:
    """How long the run takes, in units that a person reads, and what it costs."""
    if steps is None:
        return "length of the run: unknown; set plan.num_images (or train.max_steps)"
    seconds = steps * step_sec
    return f"{steps} steps: {time_text(seconds)}, {value_text(seconds / 86400 * num_gpus)} GPU-days"


def time_text(seconds: float) -> str:
    """Seconds, minutes, hours or days, to three digits."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def speed_lines(
    config: Config,
    hardware: HardwareConfig,
    memory: MemoryPlan,
    speed: SpeedPlan,
    model_flops_per_image: int,
    num_gpus: int,
    steps: int | None,
) -> list[str]:
    """Seconds of a step and what follows from them."""
    parts = {
        "matrix products": speed.products,
        "memory traffic": speed.traffic,
        "starting operations": speed.launches,
        "communication": speed.exposed,
        "messages' latency": speed.latency,
        "optimizer": speed.optimizer,
    }
    together = " + ".join(
        f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds >= 5e-4 * speed.step_sec
    )
    utilisation = planned_mfu(config, hardware, model_flops_per_image, speed, num_gpus)
    lines = [
        f"model FLOPs per image, forward and backward: {model_flops_per_image / 1e12:.3g} TFLOP; computed: "
        f"{speed.flops_per_image / 1e12:.3g} TFLOP (recomputation included)",
        f"step of {speed.images} images: {speed.step_sec:.3g} s = {together}; hidden behind it: communication "
        f"{speed.hidden:.3g}",
        f"{speed.images_per_sec:.3g} images/s, {speed.images_per_sec / num_gpus:.3g} of each rank"
        + (f"; MFU {100 * utilisation:.0f} %" if utilisation else ""),
        source_line(config.plan.step_seconds),
        communication_line(speed, hardware, num_gpus),
    ]
    lines.append(length_line(steps, speed.step_sec, num_gpus))
    kept = STATE_BYTES[config.engine.optimizer_states] + (EMA_BYTES if config.optim.ema_decay is not None else 0)
    frozen = memory.sizes.parameters - memory.sizes.trained
    size = kept * memory.sizes.trained + (2 if config.engine.precision == "bf16" else 4) * frozen
    assert hardware.storage_gb_per_sec is not None, "complete"
    lines.append(
        f"checkpoint: {size / GIB:.2f} GiB over all ranks, {size / hardware.storage_gb_per_sec / 1e9:.3g} s to write"
    )
    return lines


def source_line(step_seconds: float | None) -> str:
    """Whether the passes' time was measured."""
    if step_seconds is None:
        return "passes estimated from data-sheet rates and assumed efficiencies, not measured (plan.step_seconds)"
    return f"passes from the {step_seconds:g} s that a step of one micro-batch took on one rank (plan.step_seconds)"


def communication_line(speed: SpeedPlan, hardware: HardwareConfig, num_gpus: int) -> str:
    """GiB that a rank sends in a step, by what they are."""
    if not speed.collectives:
        return "nothing goes over the fabric"
    sent = total_sent(speed.collectives, num_gpus)
    parts = ", ".join(
        f"{each.what} {each.sent(num_gpus) / GIB:.3g} ({each.kind}s)"
        for each in speed.collectives
        if each.sent(num_gpus) >= 5e-4 * sent
    )
    by_card = sent_by_card(sent, hardware, num_gpus)
    between = f"; {by_card / GIB:.3g} GiB by each network card" if by_card else ""
    messages = sum(each.calls for each in speed.collectives)
    return f"each rank sends and receives {sent / GIB:.3g} GiB a step in {messages} messages: {parts}{between}"


def scaling_lines(curve: Curve, hardware: HardwareConfig) -> list[str]:
    """The curve as a table."""
    head = "  GPUs  nodes     images  micro x acc   step s  images/s  efficiency    MFU"
    columns = [
        name
        for name in curve.points[0].parts
        if any(each.parts[name] > 5e-4 * each.speed.step_sec for each in curve.points)
    ]
    lines = [
        f"{curve.kind} scaling on {hardware.name}; {source_line(curve.measured)}",
        head + "".join(f"{name:>12}" for name in columns) + f"{'limit':>12}  sent GiB  peak GiB",
    ]
    for each in curve.points:
        batch = f"{each.micro_batch_size} x {each.accumulation_steps}"
        row = (
            f"{each.num_gpus:6,}{each.num_nodes:7}{each.speed.images:11,}{batch:>13}{each.speed.step_sec:9.4g}"
            f"{value_text(each.speed.images_per_sec):>10}{100 * each.efficiency:9.1f} %"
            + (f"{100 * each.mfu:5.1f} %" if each.mfu is not None else f"{'':6}")
        )
        row += "".join(f"{each.parts[name]:12.3g}" for name in columns) + f"{each.limit:>12}{each.sent / GIB:10.3g}"
        lines.append(row + f"{each.memory.peak / GIB:10.1f}" + ("" if each.memory.fits else "  does not fit"))
    lines += [f"{gpus:6,}  left out: {reason}" for gpus, reason in curve.left_out.items()]
    return lines


def plan_json(memory: MemoryPlan, speed: SpeedPlan, num_gpus: int) -> dict[str, object]:
    """Memory and speed for a program: bytes of one rank, seconds of a step."""
    return {
        "num_gpus": num_gpus,
        "parameters": memory.sizes.parameters,
        "peak_bytes": memory.peak,
        "available_bytes": memory.available,
        "fits": memory.fits,
        "phases_bytes": memory.phases,
        "host_bytes": memory.host,
        "disk_bytes": memory.disk,
        "step_sec": speed.step_sec,
        "images_per_sec": speed.images_per_sec,
        "hidden_communication_sec": speed.hidden,
        "exposed_communication_sec": speed.exposed + speed.latency,
        "sent_bytes": total_sent(speed.collectives, num_gpus),
        "collectives": [dataclasses.asdict(each) | {"sent_bytes": each.sent(num_gpus)} for each in speed.collectives],
    }
