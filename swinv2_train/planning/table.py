"""A plan as text: where the bytes go, how fast it is, whether it fits."""

from __future__ import annotations

from swinv2_train.config import Config, HardwareConfig
from swinv2_train.planning.check import missing
from swinv2_train.planning.memory import GIB, MemoryPlan
from swinv2_train.planning.speed import SpeedPlan

STATE_BYTES = {"fp32": 12, "bf16": 6}
"""A checkpoint's bytes per parameter: master and two averages."""


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
        return f"does not fit on {where}: {missing(plan)}"
    share = 1 - plan.peak / plan.available
    return (
        f"fits on {where}: peak {plan.peak / GIB:.2f} GiB in the {plan.when} of {plan.available / GIB:.1f} GiB, "
        f"{100 * share:.0f} % free (margin asked for: {100 * plan.margin:.0f} %)"
    )


def host_line(plan: MemoryPlan) -> str:
    """CPU memory of one rank, and its disk."""
    parts = ", ".join(f"{part} {nbytes / GIB:.2f}" for part, nbytes in plan.host.items())
    disk = "".join(f"; on disk: {part} {nbytes / GIB:.2f}" for part, nbytes in plan.disk.items())
    return f"CPU memory of one rank, GiB: {parts or 'nothing of size'}{disk}"


def speed_lines(
    config: Config, hardware: HardwareConfig, memory: MemoryPlan, speed: SpeedPlan, num_gpus: int, steps: int | None
) -> list[str]:
    """Seconds of a step and what follows from them."""
    parts = {
        "matrix products": speed.products,
        "memory traffic": speed.traffic,
        "starting operations": speed.launches,
        "communication": speed.exposed,
        "optimizer": speed.optimizer,
    }
    together = " + ".join(
        f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds >= 5e-4 * speed.step_sec
    )
    lines = [
        f"computed per image, forward and backward: {speed.flops_per_image / 1e12:.3g} TFLOP (recomputation included)",
        f"step of {speed.images} images: {speed.step_sec:.3g} s = {together}; hidden behind it: communication "
        f"{speed.hidden:.3g}",
        f"{speed.images_per_sec:.3g} images/s, {speed.images_per_sec / num_gpus:.3g} of each rank",
    ]
    if steps is None:
        lines.append("length of the run: unknown; set plan.num_images (or train.max_steps)")
    else:
        days = steps * speed.step_sec / 86400
        lines.append(f"{steps} steps: {days:.3g} days, {days * num_gpus:.3g} GPU-days")
    size = STATE_BYTES[config.engine.optimizer_states] * memory.num_parameters
    assert hardware.storage_gb_per_sec is not None, "complete"
    lines.append(
        f"checkpoint: {size / GIB:.2f} GiB over all ranks, {size / hardware.storage_gb_per_sec / 1e9:.3g} s to write"
    )
    return lines
