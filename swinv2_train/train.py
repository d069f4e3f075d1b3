"""``python -m swinv2_train.train experiment=NAME run_dir=DIR [KEY=VALUE ...]``: train, or go on where it stopped."""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from swinv2_train import loop
from swinv2_train.agreement import check_agreement
from swinv2_train.checkpoint import ema_note, find_checkpoint, load_checkpoint, newest_checkpoint, verified_checkpoint
from swinv2_train.command_line import read_run, run_command
from swinv2_train.config import ClassifyConfig, Config, ConfigError, is_pipe
from swinv2_train.data.augment import check_augment
from swinv2_train.data.cache import shard_cache
from swinv2_train.data.loader import EvalLoader, accumulation_steps, check_classes, check_same_classes
from swinv2_train.data.source import Source, open_source
from swinv2_train.data.stream import NOT_ELASTIC, Stream, build_train_loader, open_stream
from swinv2_train.distributed import World, broadcast_object, gather_objects, init_distributed, shutdown_distributed
from swinv2_train.engine import build_engine, check_engine
from swinv2_train.engine.recompute import recompute_warning
from swinv2_train.export import Request, export
from swinv2_train.garbage import Garbage
from swinv2_train.gate import config_yaml
from swinv2_train.health import ENDING, Heartbeat, Pulse
from swinv2_train.lazy import LazyTensors
from swinv2_train.log import Console, RunLog, open_console
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.fused import fused_problem
from swinv2_train.models.initial import without_values
from swinv2_train.optim import build_param_groups
from swinv2_train.planning.check import memory_warning
from swinv2_train.probe import Probe, check_probe, open_probe
from swinv2_train.profiling import Trace
from swinv2_train.report import write_report
from swinv2_train.runtime import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    RunDirLock,
    StopRequest,
    record_environment,
    replace_text,
    seed_everything,
    set_threads,
    tune_allocator,
)
from swinv2_train.schedule import total_steps, warmup_steps
from swinv2_train.tasks import Task, build_model, build_task
from swinv2_train.tasks.initial import InitialValues
from swinv2_train.weights import Head, match_weights, read_weights, trained_windows

MEMORY_KEYS = (
    "recompute",
    "attention",
    "compile",
    "sequential_stages",
    "attention_chunk_windows",
    "attention_chunk_mib",
)
"""Keys of the model section that say how it is computed and change no weight."""


def train(config: Config) -> int:
    """Run a configuration to its end, from its newest complete checkpoint where there is one; returns the exit code."""
    check_engine(config.engine)
    check_probe(config, training=True)
    if isinstance(config.task, ClassifyConfig):
        check_augment(config.task)
    run_dir = Path(config.run_dir)
    with StopRequest(config.runtime.stop_after_sec) as stop, RunDirLock(run_dir) as lock:
        world = init_distributed(config.runtime.process_group_timeout_sec)
        check_agreement(config)
        set_threads(config.runtime.num_threads, world.local_world_size)
        if world.device.type == "cpu":
            tune_allocator()
        accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, world.world_size)
        on_main(world, lock.acquire)
        newest = verified_checkpoint(on_main(world, lambda: checked_newest(run_dir, config)), world)
        shards = open_shards(config, world)
        probe = build_probe(config, world, shards)
        total = total_steps(config.train, shards[0].num_samples)
        if newest is not None and step_of(newest) >= total:
            on_main(world, lambda: say_complete(run_dir, total))
            shutdown_distributed()
            return EXIT_DONE
        with without_values():  # each rank makes those of its own share, in the engine
            task = build_task(config, world.device)
        groups = build_param_groups(task.module, config.optim)
        initial = initial_weights(config, task.module, world) if newest is None else None
        on_main(world, lambda: make_run_dir(run_dir))
        on_main(world, lock.acquire)
        with open_console(run_dir, world.rank) as console:
            pulse = Pulse()
            heartbeat = Heartbeat(pulse, run_dir, world.rank, world.world_size, config.runtime, console).start()
            log = RunLog(run_dir, config.log, console, world.is_main, dataclasses.asdict(config))
            exit_code, reason = EXIT_FAILED, None
            try:
                run = build_run(config, world, task, groups, shards, log, newest, initial, pulse, probe)
                on_main(world, lambda: write_run_files(run_dir, config, world))
                with run.garbage:
                    exit_code = EXIT_DONE if loop.fit(run, stop) else EXIT_STOPPED
                if exit_code == EXIT_STOPPED:
                    reason = stop.requested or "a signal"
                    log.say(f"stopped by {reason} after step {run.step}; the same command resumes")
                elif world.is_main:
                    with pulse.doing(ENDING):
                        log_artifacts(config, log)
            except ConfigError as error:
                exit_code, reason = EXIT_USER_ERROR, str(error)
                raise
            except Exception as error:  # noqa: BLE001  the rank's log gets it whole and the console one line
                console.fail(error)
                reason = f"{type(error).__name__}: {error}"
                return EXIT_FAILED
            finally:
                heartbeat.close(exit_code, reason)
                log.close(EXIT_DONE if exit_code == EXIT_STOPPED else exit_code)
                if world.is_main and exit_code != EXIT_USER_ERROR:
                    write_report_of(run_dir, total, console)
        shutdown_distributed()
        return exit_code


def build_run(
    config: Config,
    world: World,
    task: Task,
    param_groups: list[dict[str, Any]],
    shards: tuple[Source | Stream, Source | None],
    log: RunLog,
    newest: Path | None,
    initial: Initial | None,
    pulse: Pulse | None = None,
    probe: Probe | None = None,
) -> loop.Run:
    """Engine, loaders and position of a run: restored from its newest checkpoint, or at the start.

    initial: the weights that a new run starts from, where task.init_from names some.
    """
    batch, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    accumulation = accumulation_steps(batch, micro_batch, world.world_size)
    if world.is_main and (warning := memory_warning(config, world, task.module)):
        log.say(f"warning: {warning} (swinv2-plan --recommend)")
    engine = build_engine(task.module, param_groups, config, world, accumulation)
    seed_everything(config.seed, world.rank)
    state: dict[str, Any] = {"step": 0, "images_seen": 0}
    if newest is not None:
        state = load_checkpoint(newest, engine, world, config.seed)
        log.say(f"resuming from {newest}")
        if note := ema_note(newest, config.optim.ema_decay):
            log.say(note)
    else:
        engine.initialise(InitialValues(task.module, config.seed))
        if initial is not None:
            engine.load_full(initial.weights)
            log.say(initial.report)
    if isinstance(shards[0], Stream):
        log.say(NOT_ELASTIC)
    if warning := recompute_warning(config.model.recompute):
        log.say(f"warning: {warning}")
    if config.model.attention == "fused" and (problem := without_fused(task.module, world)) is not None:
        log.say(f"note: model.attention (fused) is not used: {problem}; the reference serves")
    loader = build_train_loader(
        shards[0], config.data, task.train_transform, config.seed, batch, micro_batch, world.rank, world.world_size,
        state["images_seen"],
    )  # fmt: skip
    if newest is not None:
        loader.check_state(state["data"])
    evaluation = None
    if shards[1] is not None:
        evaluation = EvalLoader(shards[1], config.data, task.eval_transform, micro_batch, world.rank, world.world_size)
    labels = shards[0].label_range
    if isinstance(config.task, ClassifyConfig) and labels and labels[1] + 1 < config.task.num_classes:
        log.say(f"note: task.num_classes is {config.task.num_classes}, but the labels end at {labels[1]}")
    log.resume_at(state["step"])
    total = total_steps(config.train, shards[0].num_samples)
    log.say(f"{config.run_dir}: step {state['step']} of {total}, {batch} images each, {world.world_size} processes")
    return loop.Run(
        config=config,
        world=world,
        task=task,
        engine=engine,
        train_loader=loader,
        eval_loader=evaluation,
        log=log,
        accumulation_steps=accumulation,
        total_steps=total,
        warmup_steps=warmup_steps(config.optim.schedule, config.train, shards[0].num_samples),
        step=state["step"],
        images_seen=state["images_seen"],
        saved_step=-1 if newest is None else state["step"],
        bad_images=loader.bad_images_before,
        pulse=pulse or Pulse(),
        trace=Trace(config.runtime, Path(config.run_dir), world.rank) if config.runtime.profile else None,
        garbage=Garbage(config.runtime.gc_every_steps),
        probe=probe,
    )


def without_fused(module: nn.Module, world: World) -> str | None:
    """Where any rank has no fused kernels, none uses them, or their numbers would differ; why, or None."""
    problems = gather_objects(fused_problem(world.device))
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem is not None]
    if not found:
        return None
    for attention in module.modules():
        if isinstance(attention, WindowAttention):
            attention.fused = False
    return found[0] if world.world_size > 1 else found[0].removeprefix("rank 0: ")


def on_main(world: World, function: Callable[[], Any]) -> Any:
    """Rank 0's result of a function on every rank; what it raises, every rank raises.

    A file that cannot be read or written is the user's to mend, so an OSError becomes a ConfigError.
    """
    result: Any = None
    problem: str | None = None
    if world.is_main:
        try:
            result = function()
        except (ConfigError, OSError) as error:
            problem = str(error)
        except Exception:
            broadcast_object((None, f"rank 0 failed:\n{traceback.format_exc()}", False))
            raise
    result, problem, expected = broadcast_object((result, problem, True))
    if problem is not None:
        raise ConfigError(problem) if expected else RuntimeError(problem)
    return result


def checked_newest(run_dir: Path, config: Config) -> Path | None:
    """The newest complete checkpoint of run_dir; ConfigError when it belongs to another model or task."""
    if run_dir.is_file():
        raise ConfigError(f"run_dir ({run_dir}) is a file; name a directory")
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return None
    saved = read_run(run_dir)
    ours, theirs = (_identity(each) for each in (config, saved))
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"run_dir ({run_dir}) holds a run with {key}={theirs.get(key)}, but this command has {key}={value}; "
                "choose another run_dir, or the same model"
            )
    return newest


def _identity(config: Config) -> dict[str, Any]:
    """What makes a run's weights: the task and the model without its memory policies."""
    settings = dataclasses.asdict(config.model)
    model = {f"model.{key}": value for key, value in settings.items() if key not in MEMORY_KEYS}
    classes = {"task.num_classes": config.task.num_classes} if isinstance(config.task, ClassifyConfig) else {}
    return {"task.name": config.task.name, **classes, **model}


def make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir ({run_dir}) cannot be made: {error}; choose another") from error
    if not os.access(run_dir, os.W_OK):  # also where the whole file system is read-only
        raise ConfigError(f"run_dir ({run_dir}) is read-only; make it writable, or choose another")


def write_run_files(run_dir: Path, config: Config, world: World) -> None:
    """What is run here, and where: written when nothing can be refused any more."""
    replace_text(run_dir / "config.yaml", config_yaml(config))
    record_environment(run_dir, world.world_size)


class Initial(NamedTuple):
    """What a new run starts from."""

    weights: LazyTensors | None
    """By the module's names, read one at a time; on rank 0 alone."""
    report: str


def initial_weights(config: Config, module: nn.Module, world: World) -> Initial | None:
    """The weights of task.init_from as the module wants them; nothing is read yet but names and shapes.

    Raises ConfigError on every rank when they cannot be read or do not fit.
    """
    task = config.task
    if task.init_from is None:
        return None
    init_from, matched = task.init_from, []

    def match() -> str:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        fixed: dict[str, Head] = {"auto": "auto", "fresh": "fresh"}
        head = fixed.get(task.init_head, Path(task.init_head))
        try:
            source = read_weights(init_from, task.init_format)
            weights, report = match_weights(source, shapes, head=head)
        except ConfigError as error:
            raise ConfigError(f"task.init_from: {error}") from error
        matched.append(weights)
        return "\n".join([f"weights from {source.origin}: {report}", *other_windows(config, module)])

    report = on_main(world, match)
    return Initial(matched[0] if matched else None, report)


def other_windows(config: Config, module: nn.Module) -> list[str]:
    """A warning where the position bias of task.init_from belongs to other windows than this model assumes.

    Known of our own runs and of Hugging Face directories; other files do not tell.
    """
    source = Path(str(config.task.init_from))
    theirs = trained_windows(source)
    runs = [folder for folder in (source, source.parent.parent) if (folder / "config.yaml").is_file()]
    if runs:
        with without_values():
            theirs = build_model(read_run(runs[0]).model, num_classes=0).pretrained_window_sizes
    encoder = module.encoder if isinstance(module, SimMIM) else module
    assert isinstance(encoder, SwinTransformerV2)
    if theirs is None or theirs == encoder.pretrained_window_sizes:
        return []
    value = ",".join(str(rows) if rows == cols else f"[{rows},{cols}]" for rows, cols in theirs)
    return [
        f"warning: their position bias was trained at other windows than this model assumes; "
        f"model.pretrained_window_sizes=[{value}] keeps its meaning (arXiv:2111.09883 section 3.3)"
    ]


def open_shards(config: Config, world: World) -> tuple[Source | Stream, Source | None]:
    """Where training and evaluation images come from; rank 0 lists and indexes what was not yet.  A pipe has no index.

    Raises ConfigError for missing or damaged shards, and for labels that the task has no class for.
    """

    def open_one(key: str, pattern: str) -> Source:
        source = open_source(pattern, key, partial(print, flush=True), shard_cache(config.data))
        if isinstance(config.task, ClassifyConfig):
            check_classes(source, config.task.num_classes, key)
        return source

    def open_both() -> tuple[Source | Stream, Source | None]:
        keys, pattern, eval_pattern = ("data.shards", "data.eval_shards"), config.data.shards, config.data.eval_shards
        training = open_stream(pattern) if is_pipe(pattern) else open_one(keys[0], pattern)
        evaluation = None if eval_pattern is None else open_one(keys[1], eval_pattern)
        if isinstance(config.task, ClassifyConfig) and evaluation is not None and not isinstance(training, Stream):
            check_same_classes(training, evaluation, keys)
        return training, evaluation

    training, evaluation = on_main(world, open_both)
    return training, evaluation


def build_probe(config: Config, world: World, shards: tuple[Source | Stream | None, Source | None]) -> Probe | None:
    """What probe.methods asks for; ConfigError on every rank for images without labels.

    shards: of training and evaluation, where they are open already.
    """
    if not config.probe.methods:
        return None
    patterns = (config.data.shards, config.data.eval_shards)
    known = {
        str(key): found
        for key, found in zip(patterns, shards, strict=True)
        if found is not None and not isinstance(found, Stream)
    }
    return Probe(config, on_main(world, lambda: open_probe(config, known, partial(print, flush=True))), world)


def log_artifacts(config: Config, log: RunLog) -> None:
    """What log.wandb_artifacts keeps of a complete run; no failure of it changes how the run ended."""
    run_dir, kinds = Path(config.run_dir), config.log.wandb_artifacts
    if config.log.wandb == "disabled":
        return
    try:
        if "pictures" in kinds:
            log.artifact("pictures", sorted((run_dir / "pictures").glob(f"{config.task.name}_*.png")))
        if "weights" in kinds:
            newest = find_checkpoint(run_dir)
            out = run_dir / "wandb" / f"weights_{step_of(newest):08d}.safetensors"
            out.parent.mkdir(exist_ok=True)
            log.artifact("weights", [out] if out.exists() else export(config, Request("microsoft", out)))
    except Exception as error:  # noqa: BLE001  the run's own outcome counts
        traceback.print_exc()
        log.say(f"warning: no wandb artifacts ({type(error).__name__}: {error})")


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def say_complete(run_dir: Path, total: int) -> None:
    """Nothing is left to do; a report that a kill prevented is written now."""
    if not (run_dir / "report.html").exists():
        write_report(run_dir, total)
    print(f"{run_dir}: all {total} steps are done; report: {run_dir / 'report.html'}")


def write_report_of(run_dir: Path, total: int, console: Console) -> None:
    """Write the report; a report that fails must not change how the run ended."""
    try:
        console.say(f"report: {write_report(run_dir, total)}")
    except Exception as error:  # noqa: BLE001  the run's own outcome counts
        traceback.print_exc()
        console.say(f"warning: no report ({type(error).__name__}: {error}); traceback in {console.log_path}")


def main() -> None:
    """The console script swinv2-train."""
    run_command(train)


if __name__ == "__main__":
    main()
