"""Features of the images among which neighbours are looked for: computed now, or those that the embed command wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swinv2_train.config import Config, ConfigError, is_pipe
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.data.loading.listed import ListedLoader
from swinv2_train.data.sources.base import Source, open_unlabelled
from swinv2_train.inference.loaded import LoadedModel
from swinv2_train.inference.vectors import Vectors

FACTS, POOLED = "embedding.json", "pooled.npy"
"""Of an embed command's directory."""
_MOST_FACTS_BYTES = 2**20
_SAME = 0.999
"""The least cosine of one image's features then and now, for the model to be the same; fp16 gives 0.9999."""


class Seen(NamedTuple):
    """One image of a source, as a transform gives it."""

    number: int
    key: str
    problem: str | None
    """Why it cannot be read; None where it can."""
    batch: dict[str, Any]
    """Of this image alone."""


def see(config: Config, source: Source, transform: Any, numbers: Sequence[int], told: set[str]) -> Iterator[Seen]:
    """Images by their numbers, each a batch of its own, read in this process; random numbers are the image's own.

    told: of which images and files it was told already that something is wrong with them.
    """
    data = replace(config.data, num_workers=0)
    loader = ListedLoader(source, data, transform, 1, [(number, number + 1) for number in numbers], told)
    for batch in loader:
        yield Seen(batch.first, batch.keys[0], batch.problems[0], batch.rows)
    loader.close()


class Gallery(NamedTuple):
    """Images among which neighbours are looked for."""

    source: Source
    numbers: np.ndarray
    """(N,) int64: of the images in the source."""
    features: np.ndarray
    """(N, C), NaN where an image cannot be read."""
    unreadable: dict[str, str]
    """Keys of such images, and why."""


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers below count, from the first to the last: int64."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def computed_gallery(
    config: Config, model: LoadedModel, source: Source, most: int, progress: Callable[[str], None], told: set[str]
) -> Gallery:  # fmt: skip
    """At most so many images of a source, evenly taken, seen one at a time.  told: as see() takes it."""
    vectors, numbers = Vectors.build("pooled", config), evenly(source.num_samples, most)
    features = np.full((len(numbers), model.task.encoder.num_features), np.nan, np.float32)
    unreadable = {}
    for place, seen in enumerate(see(config, source, vectors, numbers.tolist(), told)):
        if seen.problem is not None:
            unreadable[seen.key] = seen.problem
        else:
            features[place] = model.vectors(seen.batch, vectors)["pooled"][0].numpy()
        if (place + 1) % 100 == 0:
            progress(f"gallery: image {place + 1} of {len(numbers)}")
    return Gallery(source, numbers, features, unreadable)


def is_saved_gallery(path: Path) -> bool:
    """Whether it is a directory of the embed command's."""
    return (path / FACTS).is_file()


def saved_gallery(config: Config, model: LoadedModel, path: Path, told: set[str]) -> Gallery:
    """What the embed command wrote into a directory.  told: as see() takes it.

    Raises ConfigError where it has no pooled features, where its images cannot be opened any more, and where the
    features are not this model's: one image is seen again.
    """
    facts = json.loads(read_bytes(path / FACTS, _MOST_FACTS_BYTES))
    if not isinstance(facts, dict) or facts.get("features") != "pooled" or not (path / POOLED).is_file():
        raise ConfigError(f"gallery ({path}) holds no pooled features; embed the images anew with features=pooled")
    images, remedy = str(facts.get("images_from")), "name the images themselves: gallery=FOLDER|SHARDS"
    if is_pipe(images) or "://" in images:  # a directory of somebody's is data: it starts and fetches nothing
        raise ConfigError(f"gallery ({path}) is of {images}, which is not on this machine; {remedy}")
    try:
        source = open_unlabelled(images, "gallery", image_member=config.data.image_member)
    except ConfigError as error:
        raise ConfigError(f"gallery ({path}) is of {images}, which cannot be opened ({error}); {remedy}") from error
    features = np.load(path / POOLED, mmap_mode="r", allow_pickle=False)
    shape = source.num_samples, model.task.encoder.num_features
    if features.shape != shape:
        raise ConfigError(f"gallery ({path}) has features {features.shape}, its images and the model {shape}; {remedy}")
    numbers = np.arange(source.num_samples)
    readable = numbers[np.isfinite(features).all(axis=1)]
    if len(readable):
        vectors = Vectors.build("pooled", config)
        (seen,) = see(config, source, vectors, [int(readable[0])], told)
        then = np.array(features[readable[0]], np.float32)
        now = np.zeros_like(then) if seen.problem else model.vectors(seen.batch, vectors)["pooled"][0].numpy()
        if then @ now < _SAME * np.linalg.norm(then) * np.linalg.norm(now) or not now.any():
            raise ConfigError(f"gallery ({path}) has features of another model or other images than these; {remedy}")
    return Gallery(source, numbers, features, {})
