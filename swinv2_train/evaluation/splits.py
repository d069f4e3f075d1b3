"""The splits of an evaluation: opened, checked against the classes, and scored."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swinv2_train.config import SPLITS, ClassifyConfig, Config
from swinv2_train.data.loading.loader import EvalLoader, check_classes, check_same_classes
from swinv2_train.data.shards.shard_cache import shard_cache
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.sources.label_files import Answers, answered, read_answers
from swinv2_train.distributed import World, all_reduce_sum
from swinv2_train.evaluation.confusion import Confusion, ConfusionCounter
from swinv2_train.evaluation.scoring import evaluate
from swinv2_train.tasks.classify import ClassifyTask
from swinv2_train.tasks.task import Forward, Task

WORST_CLASSES = 5


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
    scores = evaluate(score_batch, batches)
    loader.close()
    return Scored(int(all_reduce_sum(images)), scores, None if counter is None else counter.read(world))


def compared(crops: dict[float, dict[str, float]]) -> dict[str, Any]:
    """The scores at each crop, and which crop has the highest top-1 (then the lowest loss); empty without crops."""
    if not crops:
        return {}
    best = max(crops, key=lambda value: (crops[value]["val/top1"], -crops[value]["val/loss"]))
    return {"crop_pcts": {f"{value:g}": _finite(scores) for value, scores in crops.items()}, "best_crop_pct": best}


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """JSON has no nan."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
