"""``python -m swinv2_train.evaluate ...``: the scores of a run's checkpoint or of any weights, as one JSON line.

  run_dir=DIR [checkpoint=DIR]                  a run's newest complete checkpoint, or the one that is named
  weights=PATH [format=NAME] run_dir=DIR        other weights, with the run's configuration
  weights=PATH [format=NAME] [GROUP=OPTION]     other weights, with a configuration as the train command composes it
  ema=true                                      the averages of a run's weights (optim.ema_decay) in place of these

and, with each: [KEY=VALUE ...] overrides of the configuration; out=DIR writes evaluation.json (each class, each split)
and pictures there; crop_pcts=[0.875,0.95,1.0] also scores the images at these crops.  Computed in float32 (from a run,
by its float32 masters) by any number of processes; every image counts once.  docs/evaluation.md has examples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swinv2_train import loop
from swinv2_train.agreement import check_agreement
from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.command_line import compose_source, own_flag, run_on_weights
from swinv2_train.config import ClassifyConfig, Config, ConfigError
from swinv2_train.data.cache import shard_cache
from swinv2_train.data.labels import Answers, answered, read_answers
from swinv2_train.data.loader import EvalLoader, check_classes, check_same_classes
from swinv2_train.data.source import Source, open_source
from swinv2_train.distributed import World, all_reduce_sum, init_distributed, raise_together, shutdown_distributed
from swinv2_train.engine.local import to_device
from swinv2_train.engine.startup import avoid_compiler
from swinv2_train.gate import SPLITS
from swinv2_train.metrics import Confusion, ConfusionCounter
from swinv2_train.pictures import confusion_map
from swinv2_train.probe import check_probe
from swinv2_train.runtime import replace_text, set_threads
from swinv2_train.tasks import Forward, Task, build_task
from swinv2_train.tasks.classify import ClassifyTask
from swinv2_train.train import build_probe, on_main
from swinv2_train.weights import Head, LoadReport, load_weights, read_weights

OWN_KEYS = ("checkpoint", "weights", "format", "ema", "out", "crop_pcts")
WORST_CLASSES = 5


@dataclass(frozen=True)
class Request:
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


@dataclass(frozen=True)
class Split:
    """Images to score."""

    key: str
    """The config key that named its shards."""
    source: Source
    answers: Answers | None
    """Right classes from a file; None = the shards' own."""


@dataclass(frozen=True)
class Scored:
    """What came out of a split."""

    images: int
    """Images that counted: without stand-ins of damaged ones, and without those that have no right class."""
    scores: dict[str, float]
    confusion: Confusion | None
    """None where images have several right classes, and for tasks without classes."""

    def summary(self) -> dict[str, Any]:
        """What fits into a line."""
        found: dict[str, Any] = {"images": self.images, **_finite(self.scores)}
        if self.confusion is not None:
            accuracy, images = self.confusion.accuracy(), self.confusion.images()
            present = np.flatnonzero(images)
            worst = present[np.argsort(accuracy[present], kind="stable")][:WORST_CLASSES]
            found["mean_class_accuracy"] = float(accuracy[present].mean()) if len(present) else None
            found["classes_without_samples"] = len(images) - len(present)
            found["worst_classes"] = {str(number): float(accuracy[number]) for number in worst}
        return found

    def everything(self) -> dict[str, Any]:
        """The summary, every class and every pair of classes that occurred."""
        found = self.summary()
        if self.confusion is not None:
            pairs = np.stack([self.confusion.true, self.confusion.predicted, self.confusion.count], axis=1)
            found["class_images"] = self.confusion.images().tolist()
            found["class_accuracy"] = [None if math.isnan(value) else value for value in self.confusion.accuracy()]
            found["confusion"] = pairs.tolist()  # [right class, predicted class, images]
        return found


def evaluate(config: Config, request: Request) -> dict[str, Any]:
    """Score weights on data.eval_shards and data.eval_splits over all ranks; print the line and write request.out.

    Returns what the line holds.  Raises ConfigError for wrong input, before a model is built where that is possible.
    """
    check_request(config, request)
    world = init_distributed(config.runtime.process_group_timeout_sec)
    check_agreement(config)
    set_threads(config.runtime.num_threads, world.local_world_size)
    splits: dict[str, Split] = on_main(world, lambda: open_splits(config))
    out = on_main(world, lambda: make_out(request.out))
    probe = build_probe(config, world, (None, splits[""].source))
    task = build_task(config, world.device)
    loaders = {name: build_loader(config, task, split, world) for name, split in splits.items()}
    origin = load(task, config, request, world)
    module = task.module.to(world.device).eval()

    def forward(**inputs: torch.Tensor) -> Any:
        return module(**to_device(inputs, world.device))

    if probe is not None:
        avoid_compiler()  # its optimizer would import torch._dynamo
    with torch.no_grad():
        results = {name: score(task, forward, split, loaders[name], world) for name, split in splits.items()}
        crops: dict[float, dict[str, float]] = {}
        for value in request.crop_pcts:
            crops[value] = results[""].scores
            if value != config.data.eval_crop_pct:
                loader = build_loader(config, task, splits[""], world, value)
                crops[value] = score(task, forward, splits[""], loader, world).scores
        probed = {} if probe is None else probe.scores(partial(task.features, forward), lambda: None)
        line = {**origin, **results[""].summary(), **_finite(probed), **compared(crops)}
        if len(splits) > 1:
            line["splits"] = {name: scored.summary() for name, scored in results.items() if name}
        if out is not None:
            on_main(world, lambda: write_out(out, config, line, results))
            if task.has_picture:
                on_main(world, lambda: draw(out, task, forward, loaders[""]))
    on_main(world, lambda: print(json.dumps(line, allow_nan=False)))
    shutdown_distributed()
    return line


def check_request(config: Config, request: Request) -> None:
    """Everything that needs no file and no process group."""
    if config.data.eval_shards is None:
        raise ConfigError("data.eval_shards has no value; set it on the command line: data.eval_shards=PATTERN")
    check_probe(config, training=False)
    if request.format is not None and request.weights is None:
        raise ConfigError(f"format ({request.format}) is of weights=PATH, which is not given; add it, or leave it out")
    if request.weights is not None and request.checkpoint is not None:
        raise ConfigError("weights and checkpoint are both given; leave one of them out")
    if request.crop_pcts and not isinstance(config.task, ClassifyConfig):
        raise ConfigError("crop_pcts compares accuracies, which task=simmim has not; leave it out")
    for value in request.crop_pcts:
        if not 0 < value <= 1:
            raise ConfigError(f"crop_pcts ({value:g}) must be more than 0 and at most 1")


def open_splits(config: Config) -> dict[str, Split]:
    """data.eval_shards under the name "", and data.eval_splits by their names, checked against the classes.

    Raises ConfigError for a split whose labels would mean other classes than those of data.eval_shards.
    """
    named: dict[str, tuple[str, str | None, str | None]] = {"": ("data.eval_shards", config.data.eval_shards, None)}
    for name, split in config.data.eval_splits.items():
        named[name] = (f"{SPLITS}{name}.shards", split.shards, split.labels)
    splits: dict[str, Split] = {}
    for name, (key, pattern, labels) in named.items():
        source = open_source(str(pattern), key, cache=shard_cache(config.data))
        answers = None
        if isinstance(config.task, ClassifyConfig):
            if labels is None:
                check_classes(source, config.task.num_classes, key)
                if name:
                    check_same_classes(splits[""].source, source, ("data.eval_shards", key))
            else:
                answers, unused = read_answers(labels, source, config.task.num_classes, f"{SPLITS}{name}.labels")
                if unused:
                    print(f"note: {unused} entries of {labels} belong to no sample of {key}", file=sys.stderr)
        splits[name] = Split(key, source, answers)
    return splits


def make_out(out: str | None) -> Path | None:
    """The directory that out= names; ConfigError where it cannot be made."""
    if out is None:
        return None
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out ({out}) cannot be made: {error.strerror}; name another directory") from error
    return Path(out)


def load(task: Task, config: Config, request: Request, world: World) -> dict[str, Any]:
    """Put the weights that are asked for into the task's module, on every rank; returns where they come from."""
    if request.weights is not None:
        origin, path = "weights", Path(request.weights)
    else:
        origin, path = "checkpoint", on_main(world, lambda: find_checkpoint(Path(request.checkpoint or config.run_dir)))
    problem: ConfigError | None = None
    report: LoadReport | None = None
    try:
        head = wanted_head(config, path, request.format)
        report = load_weights(task.module, path, format=request.format, head=head, averaged=request.ema)
    except ConfigError as error:
        problem = error
    raise_together(problem)
    if origin == "weights" and world.is_main:
        print(report, file=sys.stderr)
    return {origin: str(path), **({"ema": request.ema} if origin == "checkpoint" or request.ema else {})}


def wanted_head(config: Config, path: Path, format: str | None) -> Head:
    """The rows that the file task.init_head lists, where the weights have another number of classes than the model.

    Otherwise the head that the weights have: a run that began with such a file has no use for it any more.
    """
    task = config.task
    if not isinstance(task, ClassifyConfig) or task.init_head in ("auto", "fresh"):
        return "load"
    theirs = read_weights(path, format).entries.get("head.weight")
    return "load" if theirs is not None and theirs.shape[0] == task.num_classes else Path(task.init_head)


def build_loader(config: Config, task: Task, split: Split, world: World, crop_pct: float | None = None) -> EvalLoader:
    """This rank's part of a split, at data.eval_crop_pct or another crop; ConfigError for images without labels."""
    transform = task.eval_transform
    if isinstance(task, ClassifyTask):
        data = dataclasses.replace(config.data, eval_crop_pct=crop_pct or config.data.eval_crop_pct)
        transform = dataclasses.replace(task.eval_transform, data=data, needs_label=split.answers is None)
    micro_batch = config.train.micro_batch_size
    return EvalLoader(split.source, config.data, transform, micro_batch, world.rank, world.world_size, split.key)


def score(task: Task, forward: Forward, split: Split, loader: EvalLoader, world: World) -> Scored:
    """The scores of a split over all ranks."""
    counter = None
    if isinstance(task, ClassifyTask) and (split.answers is None or max(map(len, split.answers.values())) == 1):
        counter = ConfusionCounter(task.num_classes)
    images = torch.zeros((), dtype=torch.float64)

    def score_batch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        images.add_(batch["weight"].sum())
        if not isinstance(task, ClassifyTask):
            return task.scores(forward, batch)
        scores, predicted = task.scores_and_predictions(forward, batch)
        if counter is not None:
            counter.add(batch["labels"].view(len(predicted), -1)[:, 0], predicted, batch["weight"])
        return scores

    batches = loader if split.answers is None else (answered(batch, split.answers) for batch in loader)
    scores = loop.evaluate(score_batch, batches)
    loader.close()
    return Scored(int(all_reduce_sum(images)), scores, None if counter is None else counter.read(world))


def compared(crops: dict[float, dict[str, float]]) -> dict[str, Any]:
    """The scores at each crop, and which crop has the highest top-1 (then the lowest loss); empty without crops."""
    if not crops:
        return {}
    best = max(crops, key=lambda value: (crops[value]["val/top1"], -crops[value]["val/loss"]))
    return {"crop_pcts": {f"{value:g}": _finite(scores) for value, scores in crops.items()}, "best_crop_pct": best}


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
    rows = (f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items())
    replace_text(out / "evaluation.json", "{\n" + ",\n".join(rows) + "\n}\n")  # a key a line
    for name, scored in results.items():
        if scored.confusion is not None:
            stem = f"confusion_{name}" if name else "confusion"
            Image.fromarray(confusion_map(scored.confusion)).save(out / f"{stem}.png")


def draw(out: Path, task: Task, forward: Forward, loader: EvalLoader) -> None:
    """The task's picture of rank 0's first images."""
    from PIL import Image

    Image.fromarray(task.picture(forward, next(iter(loader)))).save(out / "picture.png")
    loader.close()


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """JSON has no nan."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def parse(arguments: list[str]) -> tuple[Config, Request]:
    """The configuration and the command's own keys of a command line."""
    config, given = compose_source(arguments, OWN_KEYS)
    own: dict[str, Any] = {**given, "ema": own_flag(given, "ema")}
    if "crop_pcts" in own:
        try:
            own["crop_pcts"] = tuple(float(value) for value in given["crop_pcts"].strip("[] ").split(","))
        except ValueError:
            raise ConfigError(f"crop_pcts ({given['crop_pcts']}) must be numbers: crop_pcts=[0.875,1.0]") from None
    return config, Request(**own)


def main() -> None:
    """The console script swinv2-evaluate."""
    run_on_weights(__doc__, parse, evaluate)


if __name__ == "__main__":
    main()
