"""``python -m swinv2_train.train experiment=NAME run_dir=DIR [KEY=VALUE ...]``: train, or go on where it stopped."""

from __future__ import annotations

import dataclasses
import traceback
from functools import partial
from pathlib import Path

from swinv2_train.checkpoint import find_checkpoint, verified_checkpoint
from swinv2_train.checkpoint.finding import step_of
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import run_command
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR
from swinv2_train.config.shown import shown
from swinv2_train.data.loading.loader import accumulation_steps
from swinv2_train.distributed import (
    init_distributed,
    on_main,
    shutdown_distributed,
)
from swinv2_train.distributed.same_start import check_agreement
from swinv2_train.evaluation.probe import build_probe
from swinv2_train.models.initial import on_meta
from swinv2_train.monitoring.console import Console, open_console
from swinv2_train.monitoring.run_log import RunLog, scores_unfinished
from swinv2_train.monitoring.watchdog import DATA_WAIT, ENDING, FIRST_STEP, STEP, Heartbeat, RankActivity
from swinv2_train.planning.start_line import describe_start
from swinv2_train.planning.start_warning import memory_warning
from swinv2_train.report.page import write_report
from swinv2_train.report.plots import plots_problem
from swinv2_train.runtime import (
    RunDirLock,
    StopRequest,
    read_environment,
    set_threads,
    tune_allocator,
)
from swinv2_train.tasks import build_task
from swinv2_train.training import loop
from swinv2_train.training.build import build_run, checked_newest, make_run_dir, open_sources, write_run_files
from swinv2_train.training.initial_weights import initial_weights
from swinv2_train.training.lr_schedule import total_steps
from swinv2_train.training.param_groups import build_param_groups
from swinv2_train.training.preflight import preflight
from swinv2_train.weights.export import ExportRequest, export


def train(config: Config) -> int:
    """Run a configuration to its end, from its newest complete checkpoint where there is one; returns the exit code."""
    preflight(config, training=True)
    run_dir = Path(config.run_dir)
    with StopRequest(config.runtime.stop_after_sec) as stop, RunDirLock(run_dir) as lock:
        world = init_distributed(config.runtime.process_group_timeout_sec)
        check_agreement(config)
        set_threads(config.runtime.num_threads, world.local_world_size)
        if world.device.type == "cpu":
            tune_allocator()
        accumulation = accumulation_steps(
            config.train.global_batch_size, config.train.micro_batch_size, world.world_size
        )
        on_main(world, lock.acquire)
        newest = verified_checkpoint(on_main(world, lambda: checked_newest(run_dir, config)), world)
        with stop.at_once(
            world.world_size == 1, newest is not None
        ):  # where other ranks wait, only between two of their collectives
            sources = open_sources(config, world)
            probe = build_probe(config, world, sources)
        total = total_steps(config.train, sources.training.num_samples)
        if newest is not None and step_of(newest) >= total and not scores_unfinished(run_dir, step_of(newest)):
            on_main(world, lambda: say_complete(run_dir, total))
            shutdown_distributed()
            return EXIT_DONE
        with on_meta():  # each rank makes those of its own share, in the engine
            task = build_task(config, world.device)
        groups = build_param_groups(task.module, config.optim)
        initial = initial_weights(config, task, world) if newest is None else None
        on_main(world, lambda: make_run_dir(run_dir))
        on_main(world, lock.acquire)
        with open_console(run_dir, world.rank) as console:
            activity = RankActivity()
            stop.told = partial(acknowledge, console, activity, accumulation)
            heartbeat = Heartbeat(activity, run_dir, world.rank, world.world_size, config.runtime, console).start()
            log = RunLog(run_dir, config.log, console, world.is_main, dataclasses.asdict(config))
            exit_code, reason = EXIT_FAILED, None
            try:
                if world.is_main and (warning := memory_warning(config, world, task)):
                    log.say(f"warning: {warning} (swinv2-plan --recommend)")
                run = build_run(config, world, task, groups, sources, log, newest, initial, activity, probe)
                on_main(world, lambda: announce(run, log))
                with run.monitor.manual_gc:
                    exit_code = EXIT_DONE if loop.fit(run, stop) else EXIT_STOPPED
                if exit_code == EXIT_STOPPED:
                    reason = stop.requested or "a signal"
                    log.say(f"stopped by {reason} after step {run.position.step}; the same command resumes")
                elif world.is_main:
                    with activity.doing(ENDING):
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
                if world.is_main and (exit_code != EXIT_USER_ERROR or (run_dir / "metrics.jsonl").exists()):
                    write_report_of(run_dir, total, console)
                elif world.is_main:  # of a run that never was
                    (run_dir / "report.html").unlink(missing_ok=True)
        shutdown_distributed()
        return exit_code


def acknowledge(console: Console, activity: RankActivity, accumulation: int, name: str, again: bool) -> None:
    """Say at once what a stop signal will end; in the thread that hears it, while the main thread computes."""
    doing = activity.current
    if doing == DATA_WAIT:
        what = "the wait for data"
    elif doing not in (*STEP, FIRST_STEP):
        what = f"after this: {doing}"
    elif accumulation == 1:
        what = "after this step"
    else:
        what = "after this micro-batch; the step's work so far is dropped"
    console.say(f"{name}{' again' if again else ''}: stopping {what}")


def announce(run: loop.Run, log: RunLog) -> None:
    """Say and write down what is run here, with what and for how long.  On rank 0, when nothing is refused any more."""
    start = describe_start(run.config, run.world, run.task)
    before = [each.get("start", {}).get("precision") for each in read_environment(Path(run.config.run_dir))]
    if before and before[-1] not in (None, start.precision):
        log.say(f"note: engine.precision is {start.precision}; until here the run was in {before[-1]}")
    log.say(start.line(run.total_steps - run.position.step))
    if run.config.model.compile != "none":
        log.say("note: the first step compiles the blocks, which may take minutes")
    if start.slow_bf16 is not None:
        log.say(f"warning: {start.slow_bf16}")
    run_dir = Path(run.config.run_dir)
    write_run_files(run_dir, run.config, run.world, start.record())
    try:  # or the page of the start before would say that the run has stopped
        write_report(run_dir, run.total_steps, curves=False)
    except Exception as error:  # noqa: BLE001  the run counts
        log.say(f"warning: no report ({type(error).__name__}: {error})")


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


def say_complete(run_dir: Path, total: int) -> None:
    """Nothing is left to do; a report that a kill prevented is written now."""
    write_report(run_dir, total)
    print(f"{shown(run_dir)}: all {total} steps are done; report: {shown(run_dir / 'report.html')}")


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


if __name__ == "__main__":
    main()
