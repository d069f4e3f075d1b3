"""``python -m swinv2_train.train experiment=NAME run_dir=DIR [KEY=VALUE ...]``: train, or go on where it stopped."""

from __future__ import annotations

import dataclasses
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from swinv2_train.checkpoint import find_checkpoint, newest_checkpoint, read_state, verified_checkpoint
from swinv2_train.checkpoint.finding import step_of
from swinv2_train.config import Config, ConfigError, MachineError
from swinv2_train.config.command_line import compose_words, run_command
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, exit_code_of
from swinv2_train.config.shown import shown
from swinv2_train.data.loading.loader import accumulation_steps
from swinv2_train.data.loading.workers import worker_death
from swinv2_train.data.shards.shard_cache import shard_cache_for
from swinv2_train.distributed import World, init_distributed, on_main, shutdown_distributed
from swinv2_train.distributed.interruptible import StopOfAnyRank, on_main_unless_stopped
from swinv2_train.distributed.same_start import check_agreement
from swinv2_train.engine.compile import compile_choice
from swinv2_train.evaluation.probe import Probe, build_probe
from swinv2_train.models.initial import on_meta
from swinv2_train.models.kernels import failures
from swinv2_train.monitoring.activity import DATA_WAIT, ENDING, FIRST_STEP, STARTING, STEP, RankActivity
from swinv2_train.monitoring.console import Console, open_console
from swinv2_train.monitoring.outage import outage_recorded
from swinv2_train.monitoring.run_log import RunLog, scores_unfinished
from swinv2_train.monitoring.watchdog import Heartbeat
from swinv2_train.planning.start_line import describe_start
from swinv2_train.planning.start_warning import memory_warning
from swinv2_train.report.page import write_report
from swinv2_train.report.plots import plots_problem
from swinv2_train.runtime import (
    RunDirLock,
    StopNow,
    StopRequest,
    arithmetic,
    read_environment,
    set_threads,
    tune_allocator,
)
from swinv2_train.tasks.task import Task
from swinv2_train.training import loop
from swinv2_train.training.borrowed_process import borrowed_process
from swinv2_train.training.build import (
    Sources,
    build_run,
    checked_newest,
    make_run_dir,
    open_sources,
    write_run_files,
)
from swinv2_train.training.initial_weights import Initial, initial_weights, with_pinned_weights
from swinv2_train.training.lora import build_trained_task
from swinv2_train.training.lr_schedule import Reached, RunLength, run_length
from swinv2_train.training.param_groups import build_param_groups
from swinv2_train.training.patience import Patience
from swinv2_train.training.preflight import preflight
from swinv2_train.training.trained import TrainedRun, trained_run
from swinv2_train.weights.export import ExportRequest, export


@dataclass(frozen=True)
class End:
    """How a run ended."""

    exit_code: int
    world: World
    """Whose process group is still up."""
    stopped_by: str | None = None
    """The name of a signal, or another reason."""
    error: Exception | None = None
    """What ended it as a failure; the console has told it."""


def train(config: Config) -> int:
    """Run a configuration to its end, from its newest complete checkpoint where there is one; returns the exit code."""
    end = run_to_end(config)
    if end.error is None:  # else another rank may not come along
        shutdown_distributed()
    return end.exit_code


def train_here(*overrides: str) -> TrainedRun:
    """Train in this process, or go on where a run stopped: what the command does with the same KEY=VALUE words.

        import swinv2_train as s2
        run = s2.train("experiment=cifar10_finetune", "data.shards=photos", "run_dir=runs/photos")
        model = s2.load(run.run_dir)

    The run speaks on sys.stdout, and afterwards the process is as it was.  Ctrl-C, a notebook's interrupt and SIGTERM
    make it save and stop, and have their own effect then (KeyboardInterrupt); only in the main thread does a run hear
    of them.  Under torchrun every rank calls it alike.

    Raises ConfigError for wrong input before anything is written, and what made the run fail.
    """
    with borrowed_process(["swinv2_train.train", *overrides]):
        config = compose_words(overrides)
        end = run_to_end(config)
        if end.error is not None:
            raise end.error
        trained: TrainedRun = on_main(end.world, lambda: trained_run(config, end.exit_code == EXIT_DONE))
    if (number := signal.Signals.__members__.get(str(end.stopped_by))) is not None:
        signal.raise_signal(number)
    return trained


def run_to_end(config: Config) -> End:
    """Run a configuration to its end, as train does; what fails on the way is told, and returned."""
    preflight(config, training=True)
    run_dir = Path(config.run_dir)
    with (
        StopRequest(config.runtime.stop_after_sec) as stop,
        RunDirLock(run_dir) as lock,
        StopOfAnyRank(stop) as stops,
    ):
        try:
            with outage_recorded(run_dir, lock):
                world = join(config, stops)
                config = with_pinned_weights(config, world, stop)
                start = settled_start(config, world, stop, lock)
        except StopNow as stopped:
            saved = on_main(world, lambda: newest_checkpoint(run_dir) is not None)
            if world.is_main:
                print(stopped_early(stopped, saved))
            return End(stopped.exit_code(saved), world, str(stopped))
        total, task = start.length.last_step, start.task
        accumulation = accumulation_steps(
            config.train.global_batch_size, config.train.micro_batch_size, world.world_size
        )
        if task is None:
            on_main(world, lambda: say_complete(config, start))
            return End(EXIT_DONE, world)
        with open_console(run_dir, world.rank) as console:
            activity = RankActivity()
            stop.told = partial(acknowledge, console, activity, accumulation)
            heartbeat = Heartbeat(
                activity, run_dir, world.rank, world.world_size, config.runtime, console, incoming_data(config)
            ).start()
            log = RunLog(run_dir, config.log, console, world.is_main, dataclasses.asdict(config))
            exit_code, reason, outage = EXIT_FAILED, None, False
            try:
                if world.is_main and (warning := memory_warning(config, world, task)):
                    log.say(f"warning: {warning} (swinv2-plan --recommend)")
                with arithmetic(config.runtime.deterministic), failures.surviving(partial(tell_failure, log, world)):
                    run = build_run(
                        config, world, task, start.groups, start.sources, log, start.newest, start.initial, activity,
                        start.probe, stop,
                    )  # fmt: skip
                    on_main(world, lambda: announce(run, log, start.initial))
                    with run.monitor.manual_gc:
                        exit_code = EXIT_DONE if loop.fit(run, stop) else EXIT_STOPPED
                    if run.position.is_out_of_patience:
                        total = run.position.step
                if exit_code == EXIT_STOPPED:
                    reason = stop.requested or "a signal"
                    log.say(f"stopped by {reason} after step {run.position.step}; the same command resumes")
                elif world.is_main:
                    with activity.doing(ENDING):
                        log_artifacts(config, log)
            except StopNow as early:
                exit_code, reason = early.exit_code(start.newest is not None), str(early)
                log.say(stopped_early(early, start.newest is not None))
            except ConfigError as error:
                exit_code, reason, outage = exit_code_of(error), str(error), isinstance(error, MachineError)
                raise
            except Exception as raised:  # noqa: BLE001  the rank's log gets it whole and the console one line
                told = worker_death(raised) or failures.lost_device(raised) or raised
                console.fail(told)
                reason, outage = f"{type(told).__name__}: {told}", isinstance(told, MachineError)
                return End(EXIT_FAILED, world, error=told)
            finally:
                was_stopped = exit_code == EXIT_STOPPED or exit_code > 128  # by a signal, with nothing to go on from
                heartbeat.close(EXIT_STOPPED if was_stopped else exit_code, reason, outage)
                log.close(EXIT_DONE if was_stopped else exit_code)
                if world.is_main and (exit_code != EXIT_USER_ERROR or (run_dir / "metrics.jsonl").exists()):
                    write_report_of(run_dir, total, console)
                elif world.is_main:  # of a run that never was
                    (run_dir / "report.html").unlink(missing_ok=True)
        return End(exit_code, world, reason)


def join(config: Config, stops: StopOfAnyRank) -> World:
    """The world of a run whose ranks all came and were started alike; from now on a stop of any reaches all."""
    world = init_distributed(config.runtime.process_group_timeout_sec)
    stops.listen()
    check_agreement(config)
    set_threads(config.runtime.num_threads, world.cores)
    if world.device.type == "cpu":
        tune_allocator()
    accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, world.world_size)
    return world


def stopped_early(stopped: StopNow, saved: bool) -> str:
    """What is said of a run that was stopped before the first step of its start."""
    return f"stopped by {stopped} before the first step; the same command {'resumes' if saved else 'begins again'}"


def acknowledge(console: Console, activity: RankActivity, accumulation: int, name: str, again: bool) -> None:
    """Say at once what a stop signal will end; in the thread that hears it, while the main thread computes."""
    doing = activity.current
    if doing == DATA_WAIT:
        what = "the wait for data"
    elif doing == STARTING:
        what = "the start"
    elif doing not in (*STEP, FIRST_STEP):
        what = f"after this: {doing}"
    elif accumulation == 1:
        what = "after this step"
    else:
        what = "after this micro-batch; the step's work so far is dropped"
    console.say(f"{name}{' again' if again else ''}: stopping {what}")


def tell_failure(log: RunLog, world: World, case: failures.Case, cause: str) -> None:
    """Of an attention kernel on this rank: in its log, and from rank 0 on the console.  A training step tells all."""
    text = failures.text(world.rank, case, cause)
    print(text, file=sys.stderr)
    log.say(f"warning: {text}")


def announce(run: loop.Run, log: RunLog, initial: Initial | None) -> None:
    """Say and write down what is run here, with what and for how long.  On rank 0, when nothing is refused any more."""
    start = describe_start(run.config, run.world, run.task, run.attention.record())
    before = [each.get("start", {}).get("precision") for each in read_environment(Path(run.config.run_dir))]
    if before and before[-1] not in (None, start.precision):
        log.say(f"note: engine.precision is {start.precision}; until here the run was in {before[-1]}")
    log.say(start.line(run.length.last_step - run.position.step))
    if compile_choice(run.config, run.world.device.type).blocks:
        log.say("note: the first step compiles the blocks, which may take minutes")
    if start.slow_bf16 is not None:
        log.say(f"warning: {start.slow_bf16}")
    run_dir = Path(run.config.run_dir)
    started_from = {} if initial is None or run.position.step else {"initial_weights": initial.report}
    write_run_files(run_dir, run.config, run.world, start.record() | started_from, run.position.classes)
    try:  # or the page of the start before would say that the run has stopped
        write_report(run_dir, run.length.last_step, curves=False)
    except Exception as error:  # noqa: BLE001  the run counts
        log.say(f"warning: no report ({type(error).__name__}: {error})")


@dataclass(frozen=True)
class Start:
    """What a start finds and decides before it writes anything; true as long as nobody else trains in the run_dir."""

    newest: Path | None
    """The checkpoint to go on from."""
    reached: Reached
    length: RunLength
    sources: Sources
    probe: Probe | None
    task: Task | None
    """What is trained; None where nothing is left to do."""
    groups: list[dict[str, Any]]
    initial: Initial | None
    """The weights that a new run starts from, where task.init_from names some."""
    patience: Patience | None = None
    """Of a run that is complete."""


def settled_start(config: Config, world: World, stop: StopRequest, lock: RunDirLock) -> Start:
    """decide_start under the lock of the run directory, which is made where something is to be trained."""
    run_dir = Path(config.run_dir)
    on_main_unless_stopped(world, stop, lock.acquire)
    start = decide_start(config, world, stop)
    if start.task is not None:
        on_main(world, lambda: make_run_dir(run_dir))
        if on_main(world, lambda: lock.acquire() and newest_checkpoint(run_dir) is not None):
            start = decide_start(config, world, stop)  # another run was here, and this one waited for its end
    return start


def decide_start(config: Config, world: World, stop: StopRequest) -> Start:
    """Where the run of config.run_dir stands, and all that can be refused before it is written to.  Collective.

    Raises StopNow on every rank where a stop comes while images are listed, weights are read or a server is waited for.
    """
    run_dir = Path(config.run_dir)
    newest = verified_checkpoint(on_main(world, lambda: checked_newest(run_dir, config)), world, stop)
    state: dict[str, Any] = (
        {"step": 0, "images_seen": 0} if newest is None else on_main(world, partial(read_state, newest))
    )
    sources = open_sources(config, world, newest, stop)
    probe = build_probe(config, world, (sources.training, sources.evaluation), stop)
    reached = Reached.of(state, config.train.global_batch_size)
    length = run_length(config.train, config.optim.schedule, sources.training.num_samples, reached)
    unfinished = on_main(world, lambda: newest is not None and scores_unfinished(run_dir, reached.step))
    patience = Patience(config.train, state.get("patience"))
    if (reached.step >= length.last_step or patience.is_exhausted) and not unfinished:
        return Start(newest, reached, length, sources, probe, None, [], None, patience)
    with on_meta():  # each rank makes those of its own share, in the engine
        task = build_trained_task(config, world.device)
    task.begin(sources.training, sources.classes)
    groups = build_param_groups(task.module, config.optim)
    initial = initial_weights(config, task, world, sources.classes, stop) if newest is None else None
    return Start(newest, reached, length, sources, probe, task, groups, initial)


def incoming_data(config: Config) -> Callable[[], object]:
    """What changes while shards of an address are on their way to this host."""
    data = config.data
    training = (data.shards, *(source.shards for source in data.mix.values()))
    cache = shard_cache_for("::".join((*training, str(data.eval_shards))), data)
    return (lambda: None) if cache is None else cache.incoming


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
            log.artifact("weights", [out] if out.exists() else export(config, ExportRequest("microsoft", out)))
    except Exception as error:  # noqa: BLE001  the run's own outcome counts
        traceback.print_exc()
        log.say(f"warning: no wandb artifacts ({type(error).__name__}: {error})")


def say_complete(config: Config, start: Start) -> None:
    """Nothing is left to do; a report that a kill prevented is written now."""
    run_dir, step, images = Path(config.run_dir), start.reached.step, start.reached.images_seen
    write_report(run_dir, step)
    epochs, samples = config.train.epochs, start.sources.training.num_samples
    if config.train.max_steps is not None:
        past = f"train.max_steps ({config.train.max_steps})" if step > config.train.max_steps else None
    else:
        assert epochs is not None, "load_config demands one of the two"
        beyond = images >= epochs * samples + start.reached.batch_size
        past = f"train.epochs ({epochs:g} of {samples} images)" if beyond else None
    if past is None and step < start.length.last_step:
        past = str(start.patience)
    done = f"all {step} steps are done" if past is None else f"its {step} steps ({images} images) are past {past}"
    print(f"{shown(run_dir)}: {done}; report: {shown(run_dir / 'report.html')}")


def write_report_of(run_dir: Path, total: int, console: Console) -> None:
    """Write the report; a report that fails must not change how the run ended."""
    try:
        console.say(f"report: {write_report(run_dir, total)}")
        if problem := plots_problem():
            console.say(f"note: no pictures/curves.png: {problem}")
    except Exception as error:  # noqa: BLE001  the run's own outcome counts
        traceback.print_exc()
        console.say(f"warning: no report ({type(error).__name__}: {error}); traceback in {console.log_path}")


def main() -> None:
    """The console script swinv2-train."""
    run_command(train)


class _CallableModule(ModuleType):
    """swinv2_train.train is this module as soon as anybody imports it, and train_here in programs all the same."""

    __call__ = staticmethod(train_here)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _CallableModule
