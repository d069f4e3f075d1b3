"""Which classes the images of a source have, known before the first one is read."""

from __future__ import annotations

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.data.sample import LABEL, LABELS
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.labelled import TableLabels
from swinv2_train.data.sources.mixture import Mixture
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.data.sources.virtual_shards import VirtualShards


def sample_classes(source: Source | Stream, key: str) -> np.ndarray:
    """int64 (samples,): the class of each image over all shards, -1 without one.

    key: the config key that asks, for errors.  Raises ConfigError where classes are known of read images alone.
    """
    if isinstance(source, Mixture):
        return np.concatenate([sample_classes(part, key) for part in source.sources])
    if isinstance(source, VirtualShards):
        return source.labels
    if isinstance(source, TableLabels) and source.labels.kind == LABEL:
        return source.labels.values
    if isinstance(source, Manifest) and source.cache is None:
        found = np.concatenate([np.load(path, mmap_mode="r")["label"] for path in source.index_paths])
        number = np.array([*source.numbers, -1]) if source.numbers is not None else None
        known = np.where(found >= 0, found, -1)
        return known if number is None else number[known]
    raise ConfigError(
        f"{key} needs the class of every image before the first step, which a pipe, shards at an address and .json "
        "files do not tell; name shards on a disk, a folder or a table (data.labels)"
    )


def class_counts(source: Source | Stream, classes: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images to which each class applies, and those of which it is known whether it does, (classes,) int64 each.

    Raises as sample_classes does.
    """
    if isinstance(source, TableLabels) and source.labels.kind == LABELS:
        labels = source.labels
        applies = np.bincount(labels.values[labels.values >= 0], minlength=classes)
        unknown = np.bincount(-1 - labels.values[labels.values < 0], minlength=classes)
        known = int((~labels.absent()).sum()) - unknown
        known[list(labels.unknown)] = 0
        return applies, known
    if isinstance(source, Mixture) and any(not isinstance(part, VirtualShards | Manifest) for part in source.sources):
        parts = [class_counts(part, classes, key) for part in source.sources]
        return sum(applies for applies, _ in parts), sum(known for _, known in parts)  # type: ignore[return-value]
    found = sample_classes(source, key)
    found = found[found >= 0]
    return np.bincount(found, minlength=classes), np.full(classes, len(found))
