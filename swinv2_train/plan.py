"""``python -m swinv2_train.plan experiment=NAME hardware=a100_40gb plan.num_gpus=N [--recommend] [KEY=VALUE ...]``

Predicts a run before it is paid for: memory of a rank by part and phase, time of a step, images/s, days, checkpoints.

    run_dir=RUN          without experiment=, model= or task=: the configuration of that run, with the other
                         KEY=VALUE on top, and its number of ranks
    hardware=NAME        conf/hardware/: a100_40gb a100_80gb h100 h200 rtx4090 cpu, or a file of yours (.yaml) with
                         keys of these; without it, this machine
    plan.num_gpus=N      ranks (default: one node's)
    plan.num_images=N    images of the training shards, for days and GPU-days (default: their manifest's)
    plan.margin=0.05     share of the memory that must stay free
    plan.picture=FILE    draw where the bytes go, or the curve of plan.scaling, as PNG
    plan.json=FILE       write the same numbers as JSON
    plan.step_seconds=X  a step of one micro-batch as one rank was measured to take it (perf/step_sec of a run on one
                         rank with train.global_batch_size = train.micro_batch_size); without it, the hardware's rates
    plan.scaling=strong  8 to 1,024 GPUs with the same global batch; =weak: with the same images a rank, as many as
                         plan.num_gpus gives it of train.global_batch_size
    --recommend          search ZeRO stage, recomputation, sequential stages, micro-batch and accumulation for the
                         fastest setting that fits, and print its command

Everything else is the train command's.  Times assume the rates in the hardware file; memory is that of the real model,
run without contents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from swinv2_train.config import Config, ConfigError, HardwareConfig, ModelConfig, is_pipe
from swinv2_train.config.arguments import unquoted
from swinv2_train.config.command_line import compose_overrides, load_run_config, run_on_weights
from swinv2_train.config.load import home_expanded
from swinv2_train.data.shards.manifest import MANIFEST_NAME
from swinv2_train.data.sources.base import open_source
from swinv2_train.engine.compile import compile_choice
from swinv2_train.planning.hardware import fill_from_machine, required
from swinv2_train.planning.memory import plan_memory
from swinv2_train.planning.picture import draw_curve, draw_plan
from swinv2_train.planning.scaling import scaling_curve, scaling_json
from swinv2_train.planning.search import Search, recommend
from swinv2_train.planning.speed import measured_pass, pass_seconds, plan_speed
from swinv2_train.planning.table import (
    evaluation_line,
    host_line,
    memory_table,
    plan_json,
    reserved_line,
    scaling_lines,
    speed_lines,
    verdict,
)
from swinv2_train.planning.trace import evaluation_bytes
from swinv2_train.report.plots import plots_problem
from swinv2_train.runtime.cpu_speed import CpuSpeed, slow_bf16
from swinv2_train.runtime.environment import read_environment
from swinv2_train.training.lr_schedule import total_steps
from swinv2_train.training.preflight import preflight

WHOLE = ("experiment", "model", "task")
"""Groups of conf/ that make a command line a configuration of its own, whatever run_dir holds."""
PARTS = ("data", "optim", "engine", "log")
UNUSED = ("run_dir", "data.shards")
"""Keys that training needs and a plan can do without."""


def parse(arguments: list[str]) -> tuple[Config, list[str]]:
    """The configuration to plan for, and the arguments that a recommended command repeats.

    run_dir=RUN alone names a run's configuration; beside a group's choice, the command line is a whole one of its own.
    """
    repeated = [each for each in arguments if each != "--recommend" and not each.startswith("plan.")]
    overrides = ["plan.recommend=true" if each == "--recommend" else each for each in arguments]
    given = {each.partition("=")[0]: each for each in arguments}
    if "run_dir" not in given or set(WHOLE) & given.keys():
        return compose_overrides(overrides, UNUSED), repeated
    run_dir = home_expanded("run_dir", unquoted(given["run_dir"].partition("=")[2]))
    if not (Path(run_dir) / "config.yaml").is_file():
        print(f"note: run_dir ({run_dir}) holds no run yet; this plans what the command line says")
        return compose_overrides(overrides, UNUSED), repeated
    for group in PARTS:
        if group in given:
            raise ConfigError(
                f"{given[group]} chooses a whole group, which the run in run_dir ({run_dir}) has already; set single "
                f"keys ({group}.KEY=VALUE), or give the run's whole command line"
            )
    starts = read_environment(Path(run_dir))
    last = starts[-1] if starts else {}
    argv = last.get("argv")
    own = [each for each in argv[1:] if isinstance(each, str) and each.isprintable()] if isinstance(argv, list) else []
    own = [each for each in own if not each.startswith(("run_dir=", "plan."))]
    return plan_of_run(Path(run_dir), overrides, last.get("world_size")), [*own, *repeated]


def plan_of_run(run_dir: Path, overrides: list[str], num_ranks: int | None) -> Config:
    """A run's configuration with overrides on top, for the machine that these name, or for this one.

    num_ranks: of the run, where it is known; planned for unless plan.num_gpus says another number.
    """
    of_machine = [each for each in overrides if each.startswith(("hardware=", "hardware."))]
    config = load_run_config(run_dir, [each for each in overrides if each not in of_machine])
    hardware = compose_overrides(of_machine, UNUSED).hardware if of_machine else config.hardware
    return replace(config, hardware=hardware, plan=replace(config.plan, num_gpus=config.plan.num_gpus or num_ranks))


def plan(config: Config, arguments: list[str]) -> None:
    """Print the plan of a configuration, and draw or recommend where it asks for that.

    arguments: what the recommended command starts with.  Raises ConfigError where the run itself would.
    """
    preflight(config, training=True)
    gpus = num_gpus(config)
    hardware = fill_from_machine(config.hardware, min(gpus, config.hardware.gpus_per_node or gpus))
    check_request(config)
    title = f"{config.model.name} on {hardware.name}"
    slow = bf16_problem(config, hardware)
    in_fp32 = None if slow is None else replace(config, engine=replace(config.engine, precision="fp32"))
    if config.plan.recommend:
        print(recommend(config, hardware, gpus, arguments, steps(config)))
        if in_fp32 is not None:
            best = Search(in_fp32, hardware, gpus).fastest()
            print(f"hint: {slow}" + ("" if best is None else f", {best.speed.step_sec:.3g} s a step"))
        return
    if config.plan.scaling is not None:
        curve = scaling_curve(config, hardware, gpus)
        print(*scaling_lines(curve, hardware), sep="\n")
        write(config, lambda path: draw_curve(curve, path, title), scaling_json(curve))
        return
    memory, trace = plan_memory(config, hardware, gpus)
    estimated = pass_seconds(hardware, trace)
    passes = measured_pass(config, hardware, memory.sizes.parameters, estimated, estimated)
    speed = plan_speed(config, hardware, memory.sizes, passes, gpus)
    batch = config.train
    print(f"{config.model.name}, {_inputs(config.model)}, {config.task.name}: "
          f"{memory.sizes.parameters:,} parameters; {config.engine.name} ZeRO-{config.engine.zero_stage} "
          f"{config.engine.precision}, recompute {config.model.recompute}, sequential stages "
          f"{config.model.sequential_stages}, compiled: {compile_choice(config, str(hardware.device), here=False)}; "
          f"{batch.global_batch_size} images a step, {batch.micro_batch_size} at a "
          f"time on each of {gpus} ranks\n")  # fmt: skip
    print(memory_table(memory), verdict(memory, hardware, gpus), reserved_line(hardware), sep="\n")
    evaluation = evaluation_bytes(config, hardware.device == "cpu")
    if evaluation is not None:
        print(evaluation_line(config, memory, evaluation))
    print(host_line(memory, hardware, gpus), "", sep="\n")
    print(*speed_lines(config, hardware, memory, speed, trace.model_flops_per_image, gpus, steps(config)), sep="\n")
    if in_fp32 is not None:
        _, trace = plan_memory(in_fp32, hardware, gpus)
        fp32 = plan_speed(in_fp32, hardware, memory.sizes, pass_seconds(hardware, trace), gpus)
        print(f"hint: {slow}, {fp32.step_sec:.3g} s a step")
    write(config, lambda path: draw_plan(memory, path, title), plan_json(memory, speed, gpus))


def bf16_problem(config: Config, hardware: HardwareConfig) -> str | None:
    """What is to be said of bf16 on a CPU that has no units for it; None elsewhere.  hardware: without null values."""
    if hardware.device != "cpu" or config.engine.precision != "bf16":
        return None
    return slow_bf16(CpuSpeed(1e3 * required(hardware.tflops_fp32), 1e3 * required(hardware.tflops_bf16)))


def _inputs(model: ModelConfig) -> str:
    """What the model takes, and its window, in words."""
    if model.frames is None:
        return f"{model.img_size} px, window {model.window_size}"
    return f"{model.frames} frames of {model.img_size} px, window {model.window_frames} x {model.window_size}"


def check_request(config: Config) -> None:
    """Raise ConfigError for a picture that cannot be drawn, and for what --recommend does not go with."""
    if config.plan.picture is not None and (problem := plots_problem()):
        raise ConfigError(f"plan.picture ({config.plan.picture}): {problem}")
    if config.plan.recommend:
        for key in ("scaling", "step_seconds", "picture", "json"):
            value = getattr(config.plan, key)
            if value is not None:
                raise ConfigError(
                    f"plan.{key} ({value}) with --recommend, which compares settings of which none was measured; leave "
                    "one of the two out"
                )


def write(config: Config, draw: Callable[[Path], Path], numbers: dict[str, object]) -> None:
    """The picture and the JSON file that are asked for."""
    if config.plan.picture is not None:
        print(f"picture: {draw(Path(config.plan.picture))}")
    if config.plan.json is not None:
        path = Path(config.plan.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(numbers, indent=2) + "\n")
        print(f"JSON: {path}")


def num_gpus(config: Config) -> int:
    """plan.num_gpus, else the launcher's ranks, else one node; one for engine.name=local (ConfigError for more)."""
    if config.engine.name == "local":
        if config.plan.num_gpus not in (None, 1):
            raise ConfigError(
                f"plan.num_gpus ({config.plan.num_gpus}) with engine.name=local, which runs on one process; "
                "set engine.name=deepspeed"
            )
        return 1
    if config.plan.num_gpus is not None:
        return config.plan.num_gpus
    announced = os.environ.get("WORLD_SIZE", "")
    if announced.isdigit():
        return int(announced)
    return config.hardware.gpus_per_node or fill_from_machine(config.hardware, 1, rates=False).gpus_per_node or 1


def steps(config: Config) -> int | None:
    """Optimizer steps of the run; None where nobody knows how many images there are."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    images = config.plan.num_images
    shards = config.data.shards
    quick = bool(shards) and (Path(shards).is_dir() or (Path(shards).parent / MANIFEST_NAME).is_file())
    if images is None and not is_pipe(shards) and quick:
        images = open_source(
            shards,
            "data.shards",
            image_member=config.data.image_member,
            label_folders=config.data.label_folders,
            annotations=config.data.annotations,
        ).num_samples
    return None if images is None else total_steps(config.train, images)


def main() -> None:
    """The console script swinv2-plan."""
    run_on_weights(str(__doc__), parse, plan)


if __name__ == "__main__":
    main()
