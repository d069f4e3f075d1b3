"""The splits of an evaluation: opened, checked against the classes, and scored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swinv2_train.config import SPLITS, Config
from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.data.loading.workers import with_workers
from swinv2_train.data.shards.shard_cache import shard_cache_for
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.sources.label_choice import with_labels_of
from swinv2_train.data.sources.label_files import LabelOverrides, read_label_overrides, with_labels
from swinv2_train.data.sources.matched import MODELS_CLASSES, Say, check_pixel_classes, matched
from swinv2_train.data.sources.videos import check_videos
from swinv2_train.distributed import World, all_reduce_sum
from swinv2_train.evaluation.confusion import Confusion, ConfusionCounter
from swinv2_train.evaluation.scoring import SumsOverRanks, evaluate_loader
from swinv2_train.monitoring.console import counted
from swinv2_train.tasks import task_class
from swinv2_train.tasks.detection_scores import DETECTIONS
from swinv2_train.tasks.detection_tables import detection_tables
from swinv2_train.tasks.metrics import CONFUSION, Metric, Records, Rows, Sums
from swinv2_train.tasks.target_scores import LABEL_COUNTS, RANKING, label_tables
from swinv2_train.tasks.task import Batch, Forward, Task

WORST_CLASSES = 5
COMPARED = ("val/top1", "val/loss")
"""What says which crop is the best: the highest of the one, then the lowest of the other."""


@dataclass(frozen=True)
class Split:
    """Images to score."""

    key: str
    """The config key that named its shards."""
    source: Source
    label_overrides: LabelOverrides | None
    """Right classes from a file; None = the shards' own."""


@dataclass(frozen=True)
class Scored:
    """What came out of a split."""

    images: int
    """Images that counted: without stand-ins of damaged ones, and without those that have no right class."""
    scores: dict[str, float]
    confusion: Confusion | None
    """Of images or of pixels; None where images have several right classes, and for tasks without classes."""
    classes: tuple[str, ...] | None
    """What the classes are called; None where they have numbers alone."""
    tables: dict[str, Any] | None = None
    """Of every class, where there is no confusion of them: of found objects (tasks/detection_tables.py), and of classes
    of which several may apply (tasks/target_scores.py).
    """

    def summary(self) -> dict[str, Any]:
        """What fits into a line."""
        found: dict[str, Any] = {"images": self.images, **_finite(self.scores)}
        if self.confusion is not None:
            images = self.confusion.images()
            accuracy = self.confusion.accuracy() if self.confusion.unit == "images" else self.confusion.iou()
            present = np.flatnonzero(images)
            if self.confusion.unit == "images":  # of pixels it is among the scores
                found["mean_class_accuracy"] = float(accuracy[present].mean()) if len(present) else None
            found |= self._worst(images, accuracy)
        elif self.tables is not None and "class_images" in self.tables:
            found |= self._worst(np.array(self.tables["class_images"]), np.array(self.tables["class_ap"], np.float64))
        return found

    def _worst(self, images: np.ndarray, quality: np.ndarray) -> dict[str, Any]:
        """Which classes have the lowest quality, (classes,) float64, of those that occur in images, (classes,) int64.

        The key of a class is its number.
        """
        present = np.flatnonzero(images)
        worst = present[np.argsort(quality[present], kind="stable")][:WORST_CLASSES]
        found: dict[str, Any] = {
            "classes_without_samples": len(images) - len(present),
            "worst_classes": {str(number): float(quality[number]) for number in worst},
        }
        if self.classes is not None:
            found["worst_class_names"] = {str(number): self.classes[number] for number in worst}
        return found

    def everything(self) -> dict[str, Any]:
        """The summary, every class and every pair of classes that occurred."""
        found = self.summary()
        if self.confusion is not None:
            pairs = np.stack([self.confusion.true, self.confusion.predicted, self.confusion.count], axis=1)
            found["classes"] = self.classes
            found[f"class_{self.confusion.unit}"] = self.confusion.images().tolist()
            found["class_accuracy"] = [None if math.isnan(value) else value for value in self.confusion.accuracy()]
            if self.confusion.unit == "pixels":
                found["class_iou"] = [None if math.isnan(value) else value for value in self.confusion.iou()]
            found["confusion"] = pairs.tolist()  # [right class, predicted class, images or pixels]
        return found | ({} if self.tables is None else {"classes": self.classes, **self.tables})


def open_splits(config: Config, names: tuple[str, ...] | None, say: Say) -> dict[str, Split]:
    """data.eval_shards under the name "", and data.eval_splits by their names, with the labels of the model's classes.

    names: of these classes, as far as they are known.  say: receives notes, a line each.  Raises ConfigError for images
    of other classes.
    """
    classes = config.task.label_classes
    named: dict[str, tuple[str, str | None, str | None]] = {"": ("data.eval_shards", config.data.eval_shards, None)}
    for name, split in config.data.eval_splits.items():
        named[name] = (f"{SPLITS}{name}.shards", split.shards, split.labels)
    splits: dict[str, Split] = {}
    for name, (key, pattern, labels) in named.items():
        data = config.data
        cache = shard_cache_for(str(pattern), data)
        source = open_source(
            str(pattern), key, None if data.annotations is None else say, cache, data.verify, data.image_member,
            data.label_folders, data.annotations,
        )  # fmt: skip
        if config.model.frames is not None:
            check_videos(source, key)
        label_overrides = None
        if labels is not None:
            label_overrides = _label_overrides(config, labels, source, key, f"{SPLITS}{name}.labels", names, say)
        else:
            task = config.task
            source = with_labels_of(source, key, data, task.label_kind, task.label_rows, say)
            if classes is not None:
                beside = splits[""].source.classes if name and names is None else None
                whose = MODELS_CLASSES if beside is None else "the classes of data.eval_shards"
                source = matched(source, key, names or beside, classes, whose, say)
            elif config.task.pixel_classes is not None:
                check_pixel_classes(source.classes, names, key, MODELS_CLASSES)
            task_class(config.task).check_source(config.task, source, key)
        splits[name] = Split(key, source, label_overrides)
    return splits


def _label_overrides(
    config: Config,
    labels: str,
    source: Source,
    key: str,
    labels_key: str,
    names: tuple[str, ...] | None,
    say: Say,
) -> LabelOverrides:
    """The right classes that a file has for the images of a source; labels_key named the file."""
    classes = config.task.label_classes
    assert classes is not None, f"{labels_key} for a task without classes"
    found = read_label_overrides(labels, source, classes, labels_key, names)
    if found.unused:
        say(f"note: {found.unused} entries of {labels} belong to no sample of {key}")
    if found.by_number and names is not None:
        say(f"note: {labels} has numbers: they are taken as the numbers of {MODELS_CLASSES}")
    return found.labels


def build_loader(config: Config, task: Task, split: Split, world: World, crop_pct: float | None = None) -> EvalLoader:
    """This rank's part of a split, at data.eval_crop_pct or another crop; ConfigError for images without labels."""
    data = dataclasses.replace(config.data, eval_crop_pct=crop_pct or config.data.eval_crop_pct)
    needs = task.eval_transform.needs if split.label_overrides is None else ()
    transform = dataclasses.replace(task.eval_transform, data=data, needs=needs)
    micro_batch = config.train.micro_batch_size
    loaded = with_workers(config.data, world.cores)
    return EvalLoader(split.source, loaded, transform, micro_batch, world.rank, world.world_size, split.key)


def score(
    task: Task, forward: Forward, split: Split, loader: EvalLoader, say: Say, names: tuple[str, ...] | None = None
) -> Scored:
    """The scores of a split over all ranks.

    say: told every few seconds how far they are.  names: of the model's classes; None where they have numbers alone.
    """
    counter, predictions, pixels, kept = None, task.predictions, PixelsOverRanks(), KeptWholes()
    if predictions is not None and (
        split.label_overrides is None or max(map(len, split.label_overrides.values())) == 1
    ):
        counter = ConfusionCounter(predictions.num_classes)
    images = torch.zeros((), dtype=torch.float64)

    def score_batch(batch: Batch) -> Mapping[str, Metric]:
        images.add_(batch["weight"].sum())
        if predictions is None:
            return kept.seen(pixels.seen(task.scores(forward, batch), batch["weight"]))
        scores, predicted = predictions.score(forward, batch)
        if counter is not None:
            counter.add(batch["labels"].view(len(predicted), -1)[:, 0], predicted, batch["weight"])
        return scores

    batches: Iterator[Batch] = counted(loader, len(loader), f"evaluating {split.key}: batch", say)
    if split.label_overrides is not None:
        batches = (with_labels(batch, split.label_overrides) for batch in batches)
    scores = evaluate_loader(score_batch, batches)
    loader.close()
    confusion, tables = pixels.read() if counter is None else counter.read(), kept.tables()
    if names is not None and confusion is not None:
        names = (*names, *map(str, range(len(names), len(confusion.images()))))
    elif names is not None and tables is not None and "class_images" in tables:
        names = (*names, *map(str, range(len(names), len(tables["class_images"]))))
    return Scored(int(all_reduce_sum(images)), scores, confusion, names, tables)


class PixelsOverRanks:
    """Keeps what a task counts of pixels by right and predicted class, where it does."""

    def __init__(self) -> None:
        self._sums = SumsOverRanks()
        self._total: Confusion | None = None

    def seen(self, metrics: Mapping[str, Metric], weight: torch.Tensor) -> Mapping[str, Metric]:
        """The metrics of a batch, as they are; weight: (B,)."""
        counts = metrics.get(CONFUSION)
        if isinstance(counts, Sums):
            self._sums.add({CONFUSION: Sums(counts.values, self._keep)}, weight)
        return metrics

    def read(self) -> Confusion | None:
        """Of all ranks, the same on each; None where nothing was counted.  One collective where it was."""
        self._sums.read()
        return self._total

    def _keep(self, matrix: torch.Tensor) -> dict[str, float]:
        self._total = Confusion.of_pixels(matrix)
        return {}


class KeptWholes:
    """Keeps what of all images comes together for a task's scores, and of which there is a table of classes."""

    def __init__(self) -> None:
        self._wholes: dict[str, Any] = {}

    def seen(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """The metrics of a batch; those of which tables are made leave the whole here when they finish."""
        return {name: self._kept(name, metric) for name, metric in metrics.items()}

    def tables(self) -> dict[str, Any] | None:
        """What there is of every class; None for other tasks.  The same on every rank."""
        if DETECTIONS in self._wholes:
            return detection_tables(self._wholes[DETECTIONS])
        if LABEL_COUNTS in self._wholes:
            return label_tables(self._wholes[LABEL_COUNTS], self._wholes[RANKING])
        return None

    def _kept(self, name: str, metric: Metric) -> Metric:
        if name not in (DETECTIONS, LABEL_COUNTS, RANKING) or not isinstance(metric, Sums | Rows | Records):
            return metric
        finish: Callable[[Any], dict[str, float]] = metric.finish

        def keeping(whole: Any) -> dict[str, float]:
            self._wholes[name] = whole
            return finish(whole)

        return metric._replace(finish=keeping)


def compared(crops: dict[float, dict[str, float]]) -> dict[str, Any]:
    """The scores at each crop, and which crop has the highest top-1 (then the lowest loss); empty without crops."""
    if not crops:
        return {}
    accuracy, loss = COMPARED
    best = max(crops, key=lambda value: (crops[value][accuracy], -crops[value][loss]))
    return {"crop_pcts": {f"{value:g}": _finite(scores) for value, scores in crops.items()}, "best_crop_pct": best}


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """JSON has no nan."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
