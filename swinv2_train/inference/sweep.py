"""A model over all images of a source, by any number of processes: what predict and embed have in common.

Every image gets a row, in the order of the source; rows are kept on disk as they come (journal.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.config import Config, ConfigError, is_pipe
from swinv2_train.config.arguments import prepared, unquoted
from swinv2_train.config.command_line import compose_source, own_flag
from swinv2_train.config.load import home_expanded, no_value
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown
from swinv2_train.data.loading.listed import ListedBatch, ListedLoader
from swinv2_train.data.loading.loader import check_kind
from swinv2_train.data.loading.workers import with_workers
from swinv2_train.data.shards.cache_files import is_our_cache
from swinv2_train.data.shards.shard_cache import shard_cache_for
from swinv2_train.data.sources.base import Source, open_unlabelled
from swinv2_train.data.sources.videos import check_videos
from swinv2_train.distributed import World, all_reduce_max, barrier, on_main, raise_together, shutdown_distributed
from swinv2_train.distributed.same_start import join_ranks
from swinv2_train.engine.adamw import avoid_compiler
from swinv2_train.evaluation.scoring import in_lockstep
from swinv2_train.inference.journal import Journal, Row, missing, share
from swinv2_train.inference.loaded import LoadedModel, resolved
from swinv2_train.models.kernels import failures
from swinv2_train.monitoring.console import counted
from swinv2_train.runtime import arithmetic
from swinv2_train.weights.hub import fetch_on_every_host, pinned

MODEL_KEYS = ("images", "out", "checkpoint", "weights", "format", "ema")
"""The keys that say of which model and images; a command has more of its own."""
_OF_RUN = ("model", "task")
_OF_DATA = (
    "eval_crop", "eval_crop_pct", "interpolation", "mean", "std", "bands", "scale", "nodata", "image_member",
    "array_layout", "frame_stride", "video_decoder",
)  # fmt: skip
"""Keys on which answers depend."""


@dataclass(frozen=True)
class ModelRequest:
    """Which weights, over which images, to where."""

    images: str
    out: str
    checkpoint: str | None = None
    """A checkpoint directory; None = the newest of the run."""
    weights: str | None = None
    """Weights of any known format in place of a checkpoint."""
    format: str | None = None
    ema: bool = False

    def origin(self, weights: str) -> dict[str, str]:
        """Where the weights were, as the line that a command ends with says it."""
        return {"weights" if self.weights else "checkpoint": weights}

    def weights_path(self, config: Config) -> str:
        """Where the weights are, a hub's by its commit.  Raises ConfigError where there are none."""
        return pinned(self.weights) if self.weights else str(find_checkpoint(Path(self.checkpoint or config.run_dir)))


def parse_model(
    arguments: list[str], own_keys: tuple[str, ...], out: str
) -> tuple[Config, ModelRequest, dict[str, str]]:  # fmt: skip
    """The configuration, what is asked of which model, and the rest of a command's own keys.  out: how it is called.

    The configuration is a run's, or what weights imply without a run; other KEY=VALUE are on top of either.
    """
    keys = (*MODEL_KEYS, *own_keys)
    given = {key: unquoted(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    needed = {"images": "FOLDER|SHARDS|FILE", "out": out}
    if "weights" in given and "checkpoint" in given:
        raise ConfigError("weights and checkpoint are both given; leave one of them out")
    if "format" in given and "weights" not in given:
        raise ConfigError(f"format ({given['format']}) is of weights=PATH, which is not given; add it, or leave it out")
    if "weights" in given and "run_dir" not in given:
        own = {key: home_expanded(key, given[key]) for key in keys if key in given}
        if absent := {key: value for key, value in needed.items() if key not in own}:
            raise ConfigError(no_value(absent))
        words = prepared([word for word in arguments if word.partition("=")[0] not in keys])
        own["weights"] = pinned(own["weights"])
        config, _ = resolved(own["weights"], words, own.get("format"))
    else:
        config, own = compose_source(arguments, keys, needed)
    if is_pipe(own["images"]):
        raise ConfigError("images is a pipe, which cannot be gone through again after a stop; name shards or a folder")
    cache = config.data.cache_dir
    if cache is not None and "data.cache_dir" not in given and not is_our_cache(Path(cache).expanduser()):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=None))
    model: dict[str, Any] = {key: own.pop(key) for key in MODEL_KEYS if key in own}
    return config, ModelRequest(**{**model, "ema": own_flag(model, "ema")}), own


class Sweep(NamedTuple):
    """All images of a source, and who works on them."""

    world: World
    source: Source
    say: Callable[[str], None]
    """Tells a user something, once."""


def open_sweep(config: Config, request: ModelRequest, check: Callable[[], None]) -> Sweep:
    """Join the process group and open the images; preflight has been called.

    check: of rank 0, refuses the place for answers by a ConfigError, before images are listed.
    """
    world = join_ranks(config)

    def say(text: str) -> None:
        if world.is_main:
            print(text, file=sys.stderr, flush=True)

    on_main(world, check)
    return Sweep(world, on_main(world, lambda: open_images(config, request, say)), say)


def open_images(
    config: Config, request: ModelRequest, say: Callable[[str], None], key: str = "images"
) -> Source:  # fmt: skip
    """What images, or the key of this name, says.  Raises ConfigError, a ShardError, where there are none, or others
    than the model takes.
    """
    cache = shard_cache_for(request.images, config.data)
    source = open_unlabelled(request.images, key, say, cache, config.data.verify, config.data.image_member)
    check_kind(source, key, config.model.frames is not None)
    check_videos(source, key)
    return source


def load_model(config: Config, request: ModelRequest, world: World) -> tuple[LoadedModel, str]:
    """The model on every rank, and where its weights are.  What one rank finds wrong, all raise."""
    path: str = on_main(world, lambda: request.weights_path(config))
    fetch_on_every_host(path, world)
    model, problem = None, None
    try:
        model = LoadedModel(config, path, world.device, request.ema, request.format)
    except ConfigError as error:
        problem = error
    raise_together(problem)
    assert model is not None, "an error was raised"
    if world.is_main and request.weights is not None:
        print(shown(f"weights from {path}: {model.report}", MESSAGE_CHARACTERS, lines=True), file=sys.stderr)
    return model, path


def job_of(config: Config, request: ModelRequest, weights: str, source: Source, own: Mapping[str, Any]) -> Row:
    """On what rows depend, by name, as plain values.  own: of the command's keys."""
    found: Row = {"images": source.digest, "weights": weights, "ema": request.ema, **own}
    if os.path.isfile(weights):
        status = os.stat(weights)
        found["the weight file"] = [status.st_size, status.st_mtime_ns]
    values = dataclasses.asdict(config)
    for section in _OF_RUN:
        found |= {f"{section}.{key}": value for key, value in values[section].items()}
    return found | {f"data.{key}": values["data"][key] for key in _OF_DATA}


def sweep(
    config: Config, over: Sweep, transform: Any, journal: Journal, work: Callable[[ListedBatch], Sequence[Row]]
) -> None:
    """Have every image that has no row yet get one; the journal has begun.  Collective.

    work: from a batch of the transform's rows to a row for each of its images, plain values.
    """
    world, source, say = over
    batch_size = config.train.micro_batch_size
    start, done = on_main(world, lambda: (journal.start, journal.pieces()))
    problem = None
    try:
        journal.open(start, world.rank)
    except ConfigError as error:
        problem = error
    raise_together(problem)
    ranges = share(missing(done, source.num_samples), batch_size, world.rank, world.world_size)
    if done and ranges:
        say(f"going on: {sum(piece.images for piece in done):,} of {source.num_samples:,} images are done")
    loader = ListedLoader(source, with_workers(config.data, world.cores), transform, batch_size, ranges)
    most = all_reduce_max(len(loader))

    def worked() -> Iterator[dict[str, Any]]:
        for batch in counted(loader, len(loader), "images: batch", say) if len(loader) else ():
            journal.add(batch.first, work(batch))
            yield {}
        for _ in range(most - len(loader)):
            yield {}

    def stood_in(case: failures.Case, cause: str) -> None:
        print(f"warning: {failures.text(world.rank, case, cause)}", file=sys.stderr)

    avoid_compiler()
    with torch.no_grad(), arithmetic(config.runtime.deterministic), failures.surviving(stood_in):
        for _ in in_lockstep(worked()):
            pass
    loader.close()
    barrier()


def close_sweep(over: Sweep, line: dict[str, Any]) -> dict[str, Any]:
    """Print what was done as one JSON line, and leave the process group.  Returns the line."""
    on_main(over.world, lambda: print(json.dumps(line)))
    shutdown_distributed()
    return line
