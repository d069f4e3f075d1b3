"""From a configuration to a Run: engine, loaders and position."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from swinv2_train.checkpoint import checkpoint_classes, device_note, ema_note, load_checkpoint, newest_checkpoint
from swinv2_train.config import Config, ConfigError, is_pipe
from swinv2_train.config.command_line import load_run_config
from swinv2_train.config.load import config_yaml
from swinv2_train.config.shown import tell
from swinv2_train.data.class_names import RUN_CLASSES
from swinv2_train.data.loading.loader import EvalLoader, accumulation_steps
from swinv2_train.data.loading.pipe_loader import build_train_loader
from swinv2_train.data.loading.workers import with_workers
from swinv2_train.data.shards.shard_cache import shard_cache_for
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.sources.label_choice import with_labels_of
from swinv2_train.data.sources.matched import MODELS_CLASSES, Say, check_pixel_classes, difference, matched
from swinv2_train.data.sources.mixture import Mixture, open_mixture
from swinv2_train.data.sources.pipe import NOT_ELASTIC, Stream, open_stream
from swinv2_train.data.sources.videos import check_videos
from swinv2_train.distributed import World
from swinv2_train.distributed.interruptible import on_main_unless_stopped
from swinv2_train.engine import build_engine
from swinv2_train.engine.activation_checkpointing import recompute_warning
from swinv2_train.evaluation.probe import Probe
from swinv2_train.monitoring.activity import RankActivity
from swinv2_train.monitoring.run_log import RunLog
from swinv2_train.monitoring.watchdog import timeout_warning
from swinv2_train.runtime import StopRequest, amend_start, record_environment, seed_everything
from swinv2_train.storage.atomic import replace_text
from swinv2_train.tasks import task_class
from swinv2_train.tasks.task import Task
from swinv2_train.training.attention_paths import AttentionPaths
from swinv2_train.training.initial_values import InitialValues
from swinv2_train.training.initial_weights import Initial
from swinv2_train.training.length_warnings import length_warnings
from swinv2_train.training.loop import Run
from swinv2_train.training.lr_schedule import Reached, batch_note, run_length
from swinv2_train.training.monitor import Monitor
from swinv2_train.training.param_groups import trained_note
from swinv2_train.training.patience import Patience
from swinv2_train.training.position import Position
from swinv2_train.training.saver import Saver

MEMORY_KEYS = (
    "recompute",
    "attention",
    "compile",
    "sequential_stages",
    "attention_chunk_windows",
    "attention_chunk_mib",
)
"""Keys of the model section that say how it is computed and change no weight."""


RANK_FILES = ("logs", "health", "stacks", "sample_keys", "bad_samples", "profile")
"""Folders of a run directory in which each rank writes on in files of its own."""
WRITTEN = ("checkpoints", "bad_steps", "pictures", "wandb", "tensorboard", "metrics.jsonl", *RANK_FILES)
"""What a run goes on writing in its run directory; other files there are replaced whole, and links with them."""


def build_run(
    config: Config,
    world: World,
    task: Task,
    param_groups: list[dict[str, Any]],
    sources: Sources,
    log: RunLog,
    newest: Path | None,
    initial: Initial | None,
    activity: RankActivity | None = None,
    probe: Probe | None = None,
    stop: StopRequest | None = None,
) -> Run:
    """Engine, loaders and position of a run: restored from its newest checkpoint, or at the start.

    initial: the weights that a new run starts from, where task.init_from names some.  stop: may come while attention
    kernels are compiled or weights are read; StopNow on every rank.
    """
    batch, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    accumulation = accumulation_steps(batch, micro_batch, world.world_size)
    config.task.check_ranks(world.world_size, accumulation)
    activity = activity or RankActivity()

    def paths_changed(paths: dict[str, str]) -> None:
        activity.publish(attention=paths)
        if world.is_main:
            amend_start(Path(config.run_dir), {"attention_paths": paths})

    attention = AttentionPaths(config, world, task.encoder, log.say, paths_changed, stop)
    activity.publish(attention=attention.record())
    engine = build_engine(task.module, param_groups, config, world, accumulation, task.block_types)
    seed_everything(config.seed, world.rank)
    state: dict[str, Any] = {"step": 0, "images_seen": 0}
    if newest is not None:
        state = load_checkpoint(newest, engine, world, config.seed, stop)
        log.say(f"resuming from {newest}")
        for note in (ema_note(newest, config.optim.ema_decay), device_note(newest, world)):
            if note is not None:
                log.say(note)
    else:
        engine.initialise(InitialValues(task.module, config.seed), stop)
        if initial is not None:
            engine.load_full(initial.weights, stop)
            log.say(initial.report)
            if not_finite := initial.not_finite_text():
                log.say(f"warning: {not_finite}")
    if isinstance(sources.training, Stream):
        log.say(NOT_ELASTIC)
    for warning in (
        recompute_warning(config.model.recompute),
        timeout_warning(config.runtime, world.world_size),
    ):
        if warning is not None:
            log.say(f"warning: {warning}")
    data = with_workers(config.data, world.cores)
    loader = build_train_loader(
        sources.training, data, task.train_transform, config.seed, batch, micro_batch,
        world.rank, world.world_size, state["images_seen"],
    )  # fmt: skip
    if newest is not None:
        loader.check_state(state["data"])
    evaluation = None
    if sources.evaluation is not None:
        evaluation = EvalLoader(
            sources.evaluation, data, task.eval_transform, micro_batch, world.rank, world.world_size
        )
    if note := trained_note(task.module):
        log.say(note)
    for note in task.notes(sources.training):
        log.say(f"note: {note}")
    log.resume_at(state["step"])
    reached = Reached.of(state, batch)
    length = run_length(config.train, config.optim.schedule, sources.training.num_samples, reached)
    total = length.last_step
    if note := batch_note(reached, config.train, total):
        log.say(f"note: {note}")
    for line in length_warnings(config, length, reached.step):
        log.say(line)
    log.say(f"{config.run_dir}: step {state['step']} of {total}, {batch} images each, {world.world_size} processes")
    position = Position(
        reached.step, reached.images_seen, loader, world.device, reached.first_batch_size, batch, sources.classes,
        Patience(config.train, state.get("patience")) if config.train.patience is not None else None,
        loader.bad_images_before,
    )  # fmt: skip
    saved_step = None if newest is None else position.step
    return Run(
        config=config,
        world=world,
        task=task,
        attention=attention,
        engine=engine,
        position=position,
        saver=Saver(config, world, engine, position, log, activity, saved_step),
        monitor=Monitor(config, world, position, total, task.multiply_adds, log, activity),
        eval_loader=evaluation,
        probe=probe,
        accumulation_steps=accumulation,
        length=length,
    )


def checked_newest(run_dir: Path, config: Config) -> Path | None:
    """The newest complete checkpoint of run_dir; ConfigError when it belongs to another model or task."""
    if run_dir.is_file():
        raise ConfigError(f"run_dir ({run_dir}) is a file; name a directory")
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return None
    saved = load_run_config(run_dir)
    ours, theirs = (_identity(each) for each in (config, saved))
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"run_dir ({run_dir}) holds a run with {key}={theirs.get(key)}, but this command has {key}={value}; "
                "choose another run_dir, or the same model"
            )
    return newest


def _identity(config: Config) -> dict[str, Any]:
    """What makes a run's weights: the task, the model without its memory policies, and what is trained of it."""
    settings = dataclasses.asdict(config.model)
    model = {f"model.{key}": value for key, value in settings.items() if key not in MEMORY_KEYS}
    own = {"task.name": config.task.name, "optim.freeze": config.optim.freeze}
    lora = {f"optim.lora.{key}": value for key, value in dataclasses.asdict(config.optim.lora).items()}
    if config.optim.lora.rank == 0:
        lora = {"optim.lora.rank": 0}
    return {**own, **lora, **config.task.identity(), **model}


def make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir ({run_dir}) cannot be made: {error}; choose another") from error
    if not os.access(run_dir, os.W_OK):  # also where the whole file system is read-only
        raise ConfigError(f"run_dir ({run_dir}) is read-only; make it writable, or choose another")
    of_ranks = (path for name in RANK_FILES for path in (run_dir / name).glob("*"))
    for path in (*(run_dir / name for name in WRITTEN), *of_ranks):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link (to {os.readlink(path)}), and a run writes nothing outside of its run_dir; put what "
                "it leads to in its place. To have it on another disk, move the whole run directory there: run_dir may "
                "lie on any disk, and be a link itself"
            )
        if os.path.lexists(path) and not (path.is_dir() or path.is_file()):
            raise ConfigError(f"{path} is no regular file, so that a run would wait for it; remove it")


def write_run_files(
    run_dir: Path, config: Config, world: World, start: dict[str, Any], classes: tuple[str, ...] | None
) -> None:
    """What is run here, and where: written when nothing can be refused any more.

    start: what is kept of this start in environment.json (planning/start_line.py).  classes: what they are called.
    """
    replace_text(run_dir / "config.yaml", config_yaml(config))
    if classes is not None:
        replace_text(run_dir / RUN_CLASSES, json.dumps(classes, indent=0) + "\n")
    record_environment(run_dir, world.world_size, start)


class Sources(NamedTuple):
    """Where images come from."""

    training: Source | Stream
    evaluation: Source | None
    classes: tuple[str, ...] | None = None
    """What the labels of both are called; None where they are numbers alone, or of no use."""


def open_sources(config: Config, world: World, newest: Path | None = None, stop: StopRequest | None = None) -> Sources:
    """Where training and evaluation images come from; rank 0 lists and indexes what was not yet.  A pipe has no index.

    newest: the checkpoint that the run goes on from; its classes are the model's, else the training images' are.  stop:
    may come while a server is waited for.
    Raises ConfigError for missing or damaged shards, and for those whose targets are not the task's; StopNow.
    """

    def open_both() -> Sources:
        data, pattern = config.data, config.data.eval_shards
        names = _known_classes(config, newest)
        training = _open_training(config, names, tell)
        of_classes = config.task.label_classes is not None or config.task.pixel_classes is not None
        if names is None and not isinstance(training, Stream) and of_classes:
            names = training.classes
        evaluation = None
        if pattern is not None:
            cache = shard_cache_for(pattern, data)
            evaluation = open_source(
                pattern,
                "data.eval_shards",
                tell,
                cache,
                data.verify,
                data.image_member,
                data.label_folders,
                data.annotations,
            )
            evaluation = _labelled(config, evaluation, "data.eval_shards", tell)
            evaluation = _checked(config, evaluation, "data.eval_shards", names, tell)
        return Sources(training, evaluation, names)

    opened: Sources = on_main_unless_stopped(world, stop, open_both)
    return opened


def _known_classes(config: Config, newest: Path | None) -> tuple[str, ...] | None:
    """What the model's classes are called before any image is seen: those of the run, and of pixels as configured."""
    task = config.task
    if task.label_classes is None and task.pixel_classes is None:
        return None
    kept = None if newest is None else checkpoint_classes(newest)
    check_pixel_classes(kept, task.pixel_class_names, f"run_dir ({config.run_dir})", "task.class_names")
    return task.pixel_class_names or kept


def _open_training(config: Config, names: tuple[str, ...] | None, say: Say) -> Source | Stream:
    """Where training images come from.  names: of the classes of the run that goes on; None without."""
    pattern, labelled = config.data.shards, config.task.label_classes is not None
    if config.data.mix:
        return _open_mixture(config, names, say)
    if is_pipe(pattern):
        if labelled:
            say(f"note: a pipe names no classes: its labels are taken as the numbers of {MODELS_CLASSES}")
        stream = open_stream(pattern)
        if config.model.frames is not None:
            check_videos(stream, "data.shards", config.data.image_member)
        return stream
    data = config.data
    cache = shard_cache_for(pattern, data)
    source = open_source(
        pattern, "data.shards", say, cache, data.verify, data.image_member, data.label_folders, data.annotations
    )
    source = _labelled(config, source, "data.shards", say)
    if labelled and names is not None and source.classes is not None and set(names) != set(source.classes):
        raise ConfigError(
            f"run_dir ({config.run_dir}) holds a run of {len(names)} classes, but data.shards has {len(source.classes)}"
            f" ({difference(source.classes, names)}); name images of the same classes, or start a new run_dir "
            "from its weights (task.init_from)"
        )
    if labelled and names is None and source.classes is not None:
        names = source.classes  # the model's first images say what its classes are
    return _checked(config, source, "data.shards", names, say)


def _open_mixture(config: Config, names: tuple[str, ...] | None, say: Say) -> Mixture:
    """The sources of data.mix, their labels by the names of classes: the run's, or all sources' together."""
    if config.task.label_classes is None:
        return _open_unlabelled_mixture(config, names, say)
    plain = open_mixture(config.data, say, lambda source, key: _labelled(config, source, key, say))
    without = [name for name, source in zip(plain.names, plain.sources, strict=True) if source.classes is None]
    if without and len(without) < len(plain.names):
        raise ConfigError(
            f"data.mix: {', '.join(without)} names no classes, but other sources do, and their labels meet by name; "
            "put a classes.txt beside its shards"
        )
    names = plain.classes if names is None else names
    prepared = [
        _checked(config, source, f"data.mix.{name}.shards", names, say)
        for name, source in zip(plain.names, plain.sources, strict=True)
    ]
    return dataclasses.replace(plain, sources=tuple(prepared))


def _open_unlabelled_mixture(config: Config, names: tuple[str, ...] | None, say: Say) -> Mixture:
    """The sources of data.mix for a task that no labels serve; classes of pixels have the same numbers in all."""

    def checked(source: Source, key: str) -> Source:
        nonlocal names
        source = _labelled(config, source, key, say)
        _checked(config, source, key, names, say)
        if config.task.pixel_classes is not None and len(source.classes or ()) > len(names or ()):
            names = source.classes
        return source

    return open_mixture(config.data, say, checked)


def _labelled(config: Config, source: Source, key: str, say: Say) -> Source:
    """The source with the labels that the task takes, where these are not its own."""
    task = config.task
    return with_labels_of(source, key, config.data, task.label_kind, task.label_rows, say)


def _checked(config: Config, source: Source, key: str, names: tuple[str, ...] | None, say: Say) -> Source:
    """The source with the model's own labels, which a task's check has looked at."""
    if config.task.label_classes is not None:
        source = matched(source, key, names, config.task.label_classes, MODELS_CLASSES, say)
    elif config.task.pixel_classes is not None:
        check_pixel_classes(source.classes, names, key, MODELS_CLASSES)
    task_class(config.task).check_source(config.task, source, key)
    if config.model.frames is not None:
        check_videos(source, key)
    return source
