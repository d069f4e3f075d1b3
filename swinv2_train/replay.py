"""``python -m swinv2_train.replay run_dir=RUN_DIR [KEY=VALUE ...]``: the step that a run could not take, once more.

A run writes the images of every step that was not finite (or whose loss jumped) to RUN_DIR/bad_steps and, of the first
such step of a start, the state before it: weights, optimizer, random numbers.  This command takes that step again, of
the same images in the same order, and prints which layer's output and which gradient are the first that are not finite,
and of which images.  Nothing of the run is changed; what the command writes is in RUN_DIR/bad_steps.

On as many ranks as the run had, it is the same step bit for bit.  On others the images are the same and the state is
put together for them, but random numbers (drop path) are others, and it says so.  KEY=VALUE: the run's configuration
with other values, to find out what helps (engine.precision=fp32, optim.grad_clip=1).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import chain
from pathlib import Path

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.checkpoint.finding import step_of
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import compose_source, run_on_weights
from swinv2_train.distributed import gather_objects, on_main, shutdown_distributed
from swinv2_train.distributed.front import Front
from swinv2_train.distributed.same_start import join_ranks
from swinv2_train.models.initial import on_meta
from swinv2_train.models.kernels import failures
from swinv2_train.monitoring.console import open_console
from swinv2_train.monitoring.metrics import LossWatch
from swinv2_train.monitoring.run_log import RunLog
from swinv2_train.runtime import StopRequest, arithmetic, keep_random_state
from swinv2_train.training.bad_step import FOLDER, BadStep, read_bad_step
from swinv2_train.training.build import build_run, open_sources
from swinv2_train.training.loop import BadStepError, Run, close_loaders, loss_shares, open_prefetcher, take_step
from swinv2_train.training.lora import build_trained_task
from swinv2_train.training.lr_schedule import lr_at
from swinv2_train.training.not_finite import FirstNotFinite, watching
from swinv2_train.training.param_groups import build_param_groups
from swinv2_train.training.preflight import preflight


def replay(config: Config, _: None) -> list[str]:
    """Take the step again over all ranks and print what was found; returns the lines, the same on every rank.

    Raises ConfigError where nothing is kept, or what is kept does not fit what the configuration names.
    """
    preflight(config, training=True)
    run_dir, folder = Path(config.run_dir), Path(config.run_dir) / FOLDER
    world = join_ranks(config)
    checkpoint, kept = on_main(world, partial(find_kept, run_dir))
    own = own_run(config)
    console = open_console(folder, world.rank)
    try:
        log = RunLog(folder, own.log, console, world.is_main)
        with (
            StopRequest(config.runtime.stop_after_sec) as stop,
            arithmetic(config.runtime.deterministic),
            failures.surviving(lambda case, cause: log.say(f"warning: {failures.text(world.rank, case, cause)}")),
        ):
            sources = open_sources(own, world, checkpoint, stop)._replace(evaluation=None)
            with on_meta():
                task = build_trained_task(own, world.device)
            task.begin(sources.training, sources.classes)
            groups = build_param_groups(task.module, own.optim)
            run = build_run(own, world, task, groups, sources, log, checkpoint, None, stop=stop)
            try:
                lines = report(kept, run, repeat(run, kept, stop))
            finally:
                close_loaders(run)
        for line in lines:
            log.say(line)
        log.close(0)
    finally:
        console.close()
    shutdown_distributed()
    return lines


def find_kept(run_dir: Path) -> tuple[Path, BadStep]:
    """The state before a step that was not taken, and what is kept of that step."""
    folder = run_dir / FOLDER
    checkpoint = newest_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:
        raise ConfigError(
            f"run_dir ({run_dir}) holds no step that was not taken ({FOLDER}/checkpoints): all were finite, or the "
            "state could not be written, which the run's log says"
        )
    return checkpoint, read_bad_step(folder, step_of(checkpoint) + 1)


def own_run(config: Config) -> Config:
    """The run's configuration as that of a run in its folder of bad steps, which logs nowhere else.

    Its blocks are not compiled, or no hook would see inside.
    """
    return dataclasses.replace(
        config,
        run_dir=str(Path(config.run_dir) / FOLDER),
        log=dataclasses.replace(config.log, wandb="disabled", tensorboard=False, progress="none"),
        model=dataclasses.replace(config.model, compile="none"),
        data=dataclasses.replace(config.data, record_keys=False),
    )


def repeat(run: Run, kept: BadStep, stop: StopRequest) -> tuple[BadStepError | None, FirstNotFinite]:
    """Take the step; how it failed, and what this rank has seen."""
    prefetcher, front = open_prefetcher(run, stop), Front()
    ready = prefetcher.take()
    if not ready.micro_batches:
        raise KeyboardInterrupt(stop.requested or "")
    here = sorted(
        key for keys in gather_objects([batch["keys"] for batch in ready.micro_batches]) for key in chain(*keys)
    )
    then = sorted(key for passes in kept.images for rows in passes for _, key in rows)
    if here != then:
        raise ConfigError(
            f"the images of step {kept.step} are not those of the run ({len(here)} now, {len(then)} then): give "
            "train.global_batch_size, seed and data.* as the run has them"
        )
    optim, position, length = run.config.optim, run.position, run.length
    curve_step = length.curve_step(position.step, position.images_seen)
    lr = lr_at(curve_step, length.curve_steps, optim.schedule, length.warmup_steps, optim.lr)
    put_back, outcome, failed = keep_random_state(run.world.device), None, None
    with watching(run.task.module) as found:
        shares, copies = loss_shares(run, ready.micro_batches), ready.copies
        try:
            while outcome is None:  # once more without a kernel that fails
                outcome = take_step(run, found.marked(copies), shares, lr, LossWatch(None), prefetcher, front, stop)
                if outcome is None:
                    put_back()
                    copies = prefetcher.copies(ready.micro_batches)
        except BadStepError as error:
            failed = error
    return failed, found


def report(kept: BadStep, run: Run, result: tuple[BadStepError | None, FirstNotFinite]) -> list[str]:
    """What is said.  Collective."""
    failed, found = result
    lines = [f"step {kept.step} in the run: {kept.cause}"]
    if run.world.world_size != kept.world_size:
        lines.append(
            f"note: {run.world.world_size} ranks take it here and {kept.world_size} did in the run: the images are the "
            "same, random numbers (drop path) are not"
        )
    everyone = gather_objects((found.forward, found.images, found.backward))
    for rank, (forward, images, backward) in enumerate(everyone):
        if forward is not None:
            of = f", of {', '.join(images)}" if images else ""
            lines.append(f"rank {rank}, {forward} is the first that is not finite{of}")
        elif backward is not None:  # of an output that is not finite no gradient is
            lines.append(f"rank {rank}, {backward} is the first that is not finite")
    if failed is None:
        lines.append(f"step {kept.step} here: finite, so nothing of the run's fault is repeated")
    else:
        lines.append(f"step {kept.step} here: not finite again ({failed.__cause__})")
        if not any(forward or backward for forward, _, backward in everyone):
            lines.append("every layer's output and its gradient is finite: the loss, or gradients of weights, are not")
    return lines


def parse(arguments: list[str]) -> tuple[Config, None]:
    """The configuration of the run, with the command line's values on top."""
    return compose_source(arguments, ())[0], None


def main() -> None:
    """The console script swinv2-replay."""
    run_on_weights(__doc__, parse, replay)


if __name__ == "__main__":
    main()
