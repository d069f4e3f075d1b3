"""``python -m swinv2_train.evaluate ...``: the scores of a run's checkpoint or of any weights, as one JSON line.

  run_dir=DIR [checkpoint=DIR]                  a run's newest complete checkpoint, or the one that is named
  weights=PATH [format=NAME] run_dir=DIR        other weights, with the run's configuration
  weights=PATH [format=NAME] [GROUP=OPTION]     other weights, with a configuration as the train command composes it
  weights=hf://USER/NAME[@REVISION][/FILE]      the same from the Hugging Face hub
  ema=true                                      the averages of a run's weights (optim.ema_decay) in place of these

and, with each: [KEY=VALUE ...] overrides of the configuration; out=DIR writes evaluation.json (each class, each split)
and pictures there; crop_pcts=[0.875,0.95,1.0] also scores the images at these crops.  Computed in float32 (from a run,
by its float32 masters) by any number of processes; every image counts once.  docs/evaluation.md has examples.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swinv2_train.checkpoint import checkpoint_classes, find_checkpoint, newest_checkpoint
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import compose_source, own_flag, run_on_weights
from swinv2_train.config.secret_texts import public
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.data.sources.matched import Say, check_pixel_classes
from swinv2_train.distributed import (
    World,
    on_main,
    raise_together,
    shutdown_distributed,
)
from swinv2_train.distributed.same_start import join_ranks
from swinv2_train.engine.adamw import avoid_compiler
from swinv2_train.engine.local import to_device
from swinv2_train.evaluation.confusion import confusion_map
from swinv2_train.evaluation.probe import build_probe
from swinv2_train.evaluation.saved_places import confined
from swinv2_train.evaluation.splits import COMPARED, Scored, Split, _finite, build_loader, compared, open_splits, score
from swinv2_train.models.kernels import failures
from swinv2_train.monitoring.console import ticking
from swinv2_train.runtime import arithmetic
from swinv2_train.storage.atomic import replace_text
from swinv2_train.tasks import build_task
from swinv2_train.tasks.task import Forward, Picture, Task
from swinv2_train.training.attention_paths import compile_kernel
from swinv2_train.training.preflight import preflight
from swinv2_train.weights import Head, LoadReport, load_weights, read_weights, weights_classes
from swinv2_train.weights.hub import fetch_on_every_host, pinned
from swinv2_train.weights.matching import read_indices

OWN_KEYS = ("checkpoint", "weights", "format", "ema", "out", "crop_pcts")


@dataclass(frozen=True)
class EvaluateRequest:
    """What the command line asks for besides the configuration."""

    checkpoint: str | None = None
    """A checkpoint directory; None = the newest of the run."""
    weights: str | None = None
    """Weights of any known format in place of a checkpoint."""
    format: str | None = None
    """The format of weights; None = by its names."""
    ema: bool = False
    """The averages of a run's weights in place of these."""
    out: str | None = None
    """Where evaluation.json and the pictures go; None = nowhere."""
    crop_pcts: tuple[float, ...] = ()
    """Values of data.eval_crop_pct to compare."""
    notes: tuple[str, ...] = ()
    """What is said of a run's saved configuration, before a server is asked."""


def evaluate(config: Config, request: EvaluateRequest) -> dict[str, Any]:
    """Score weights on data.eval_shards and data.eval_splits over all ranks; print the line and write request.out.

    Returns what the line holds.  Raises ConfigError for wrong input, before a model is built where that is possible.
    """
    check_request(config, request)
    world = join_ranks(config)
    if request.weights is not None:
        address = request.weights
        request = dataclasses.replace(request, weights=on_main(world, lambda: pinned(address)))
    notes: list[str] = []
    for note in request.notes if world.is_main else ():
        print(note, file=sys.stderr, flush=True)
    names: tuple[str, ...] | None = on_main(world, lambda: models_classes(config, request, notes.append))
    splits: dict[str, Split] = on_main(world, lambda: open_splits(config, names, notes.append))
    out = on_main(world, lambda: make_out(request.out))
    probe = build_probe(config, world, (None, splits[""].source))
    task = build_task(config, world.device)
    loaders = {name: build_loader(config, task, split, world) for name, split in splits.items()}
    origin = load(task, config, request, world)
    for note in notes:  # of rank 0, and nothing can be refused any more
        print(shown(note, MESSAGE_CHARACTERS, lines=True), file=sys.stderr)
    module = task.module.to(world.device).eval()

    def forward(**inputs: torch.Tensor) -> Any:
        return module(**to_device(inputs, world.device))

    def say(text: str) -> None:
        if world.is_main:
            print(text, file=sys.stderr, flush=True)

    if config.model.attention == "fused":
        compile_kernel(world, say)
    avoid_compiler()  # the first call of the attention kernel, and the probe, would import torch._dynamo: 3 s of CPU

    def stood_in(case: failures.Case, cause: str) -> None:
        print(f"warning: {failures.text(world.rank, case, cause)}", file=sys.stderr)

    with torch.no_grad(), arithmetic(config.runtime.deterministic), failures.surviving(stood_in):
        results = {name: score(task, forward, split, loaders[name], say, names) for name, split in splits.items()}
        crops: dict[float, dict[str, float]] = {}
        for value in request.crop_pcts:
            crops[value] = results[""].scores
            if value != config.data.eval_crop_pct:
                loader = build_loader(config, task, splits[""], world, value)
                crops[value] = score(task, forward, splits[""], loader, say).scores
        probed = {} if probe is None else probe.scores(partial(task.features, forward), ticking("probing: batch", say))
        line = {**origin, **results[""].summary(), **_finite(probed), **compared(crops)}
        if len(splits) > 1:
            line["splits"] = {name: scored.summary() for name, scored in results.items() if name}
        if out is not None:
            on_main(world, lambda: write_out(out, config, line, results))
            if task.picture is not None:
                on_main(world, partial(write_picture, out, task.picture, forward, loaders[""], names))
    on_main(world, lambda: print(json.dumps(line, allow_nan=False)))
    shutdown_distributed()
    return line


def check_request(config: Config, request: EvaluateRequest) -> None:
    """Everything that needs no file and no process group."""
    preflight(config, training=False)
    if request.format is not None and request.weights is None:
        raise ConfigError(f"format ({request.format}) is of weights=PATH, which is not given; add it, or leave it out")
    if request.weights is not None and request.checkpoint is not None:
        raise ConfigError("weights and checkpoint are both given; leave one of them out")
    if request.crop_pcts and not set(COMPARED) <= set(config.task.measured):
        raise ConfigError(f"crop_pcts compares accuracies, which task={config.task.name} has not; leave it out")
    for value in request.crop_pcts:
        if not 0 < value <= 1:
            raise ConfigError(f"crop_pcts ({value:g}) must be more than 0 and at most 1")


def make_out(out: str | None) -> Path | None:
    """The directory that out= names; ConfigError where it cannot be made."""
    if out is None:
        return None
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out ({out}) cannot be made: {error.strerror}; name another directory") from error
    return Path(out)


def models_classes(config: Config, request: EvaluateRequest, say: Say) -> tuple[str, ...] | None:
    """What the classes of the weights that are asked for are called; None where they have numbers alone.

    say: receives a note where that had to be assumed.
    """
    count = config.task.label_classes
    if config.task.pixel_classes is not None:
        return _pixel_classes(config, request)
    if count is None:
        return None
    if request.weights is None:
        return checkpoint_classes(find_checkpoint(Path(request.checkpoint or config.run_dir)))
    names = weights_classes(request.weights)
    if names is not None:
        if config.task.init_head not in ("auto", "fresh") and len(names) > count:
            names = tuple(names[row] for row in read_indices(Path(config.task.init_head)) if 0 <= row < len(names))
        return names if len(names) <= count else None
    run = Path(config.run_dir)
    if not (run / "config.yaml").is_file() or (newest := newest_checkpoint(run)) is None:
        return None
    names = checkpoint_classes(newest)
    if names is not None:
        say(f"note: {request.weights} names no classes; those of {run} are assumed")
    return names


def _pixel_classes(config: Config, request: EvaluateRequest) -> tuple[str, ...] | None:
    """As models_classes, of a task that names the class of each pixel; the configuration's names are the user's own."""
    ours, path = config.task.pixel_class_names, request.weights or request.checkpoint or config.run_dir
    theirs = weights_classes(path)
    if theirs is not None and len(theirs) > (config.task.pixel_classes or 0):
        return ours
    check_pixel_classes(theirs, ours, path, "task.class_names")
    return ours or theirs


def load(task: Task, config: Config, request: EvaluateRequest, world: World) -> dict[str, Any]:
    """Put the weights that are asked for into the task's module, on every rank; returns where they come from."""
    if request.weights is not None:
        origin, path = "weights", request.weights
        fetch_on_every_host(path, world)
    else:
        origin, path = "checkpoint", on_main(world, lambda: find_checkpoint(Path(request.checkpoint or config.run_dir)))
    problem: ConfigError | None = None
    report: LoadReport | None = None
    try:
        head = wanted_head(task.module, config.task.init_head, path, request.format)
        report = load_weights(task.module, path, format=request.format, head=head, averaged=request.ema)
    except ConfigError as error:
        problem = error
    raise_together(problem)
    if origin == "weights" and world.is_main:
        print(shown(f"weights from {path}: {report}", MESSAGE_CHARACTERS, lines=True), file=sys.stderr)
    return {origin: str(path), **({"ema": request.ema} if origin == "checkpoint" or request.ema else {})}


def wanted_head(module: nn.Module, init_head: str, path: str | Path, format: str | None) -> Head:
    """The rows that the file task.init_head lists, where the weights have another number of classes than the model.

    Otherwise the head that the weights have: a run that began with such a file has no use for it any more.
    """
    ours = module.state_dict().get("head.weight")
    if ours is None or init_head in ("auto", "fresh"):
        return "load"
    theirs = read_weights(path, format).entries.get("head.weight")
    return "load" if theirs is not None and theirs.shape[0] == ours.shape[0] else Path(init_head)


def write_out(out: Path, config: Config, line: dict[str, Any], results: dict[str, Scored]) -> None:
    """evaluation.json, and a confusion matrix per split with classes."""
    from PIL import Image

    data, model = config.data, config.model
    facts = {
        "task": config.task.name,
        "model": {name: getattr(model, name) for name in ("name", "img_size", "window_size")},
        "data": {
            name: getattr(data, name)
            for name in ("eval_shards", "eval_crop", "eval_crop_pct", "interpolation", "mean", "std")
        },
    }
    content = {**facts, **line, **results[""].everything()}
    if "splits" in line:
        content["splits"] = {
            name: {**dataclasses.asdict(data.eval_splits[name]), **scored.everything()}
            for name, scored in results.items()
            if name
        }
    shown = public(content)  # the addresses of the images among it
    rows = (f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in shown.items())
    replace_text(out / "evaluation.json", "{\n" + ",\n".join(rows) + "\n}\n")  # a key a line
    for name, scored in results.items():
        if scored.confusion is not None:
            stem = f"confusion_{name}" if name else "confusion"
            Image.fromarray(confusion_map(scored.confusion, scored.classes)).save(out / f"{stem}.png")


def write_picture(
    out: Path, picture: Picture, forward: Forward, loader: EvalLoader, names: tuple[str, ...] | None
) -> None:
    """The task's picture of rank 0's first images."""
    from PIL import Image

    Image.fromarray(picture(forward, next(iter(loader)), names)).save(out / "picture.png")
    loader.close()


def parse(arguments: list[str]) -> tuple[Config, EvaluateRequest]:
    """The configuration and the command's own keys of a command line."""
    config, given = compose_source(arguments, OWN_KEYS, {"data.eval_shards": "PATTERN"})
    own: dict[str, Any] = {**given, "ema": own_flag(given, "ema")}
    if "crop_pcts" in own:
        try:
            own["crop_pcts"] = tuple(float(value) for value in given["crop_pcts"].strip("[] ").split(","))
        except ValueError:
            raise ConfigError(f"crop_pcts ({given['crop_pcts']}) must be numbers: crop_pcts=[0.875,1.0]") from None
    if any(argument.startswith("run_dir=") for argument in arguments):
        keys = [argument.partition("=")[0].lstrip("+") for argument in arguments]
        config, notes = confined(config, keys)
        own["notes"] = tuple(notes)
    return config, EvaluateRequest(**own)


def main() -> None:
    """The console script swinv2-evaluate."""
    run_on_weights(__doc__, parse, evaluate)


if __name__ == "__main__":
    main()
