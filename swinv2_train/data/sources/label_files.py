"""Right classes from a file, for evaluation images that their shards do not label, or label differently."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.data.sources.base import Source

LabelOverrides = Mapping[str, tuple[int, ...]]
"""Sample key -> its right classes; an image with none does not count."""

_IMAGENET_VAL = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})")
_FILE_BYTES = 2**28
_FORMS = (
    "either a list with the classes of ImageNet's validation images in order (ReaL's form), or an object "
    '{"SAMPLE KEY": [class, ...], ...}'
)


def read_label_overrides(path: str, source: Source, num_classes: int, key: str) -> tuple[LabelOverrides, int]:
    """The right classes of every sample of the shards, and how many entries of the file belong to none of them.

    path: JSON, a list of lists of classes, whose entry n - 1 belongs to the sample key ILSVRC2012_val_0000000n (with or
    without folders before it), or an object from sample key to list of classes.  key: the config key that errors name.
    Raises ConfigError for a file of another form, a sample without entry, a class outside 0 .. num_classes - 1, two
    samples of the same key, or when no image has a class.
    """
    entries = _read_entries(path, key)
    overrides: dict[str, tuple[int, ...]] = {}
    reader = source.open_reader()
    for shard, count in enumerate(source.counts):
        for index in range(count):
            sample = reader.key(shard, index)
            if sample in overrides:
                raise ConfigError(f"{key} ({path}): two samples of the shards have the key '{sample}'; rename one")
            name = _entry_name(sample, path, key) if isinstance(entries, list) else sample
            classes = _entry(entries, name)
            if classes is None:
                raise ConfigError(
                    f"{key} ({path}) has no entry for the sample '{sample}' (the file has {len(entries)}, the shards "
                    f"{source.num_samples}); name the file that belongs to these shards"
                )
            overrides[sample] = _checked(classes, sample, num_classes, path, key)
    reader.close()
    if not any(overrides.values()):
        raise ConfigError(f"{key} ({path}): no image has a right class; name the file that belongs to these shards")
    return overrides, len(entries) - len(overrides)


def with_labels(batch: dict[str, Any], overrides: LabelOverrides) -> dict[str, Any]:
    """The batch with "labels" int64 (B, L), filled up with -1, and weight 0 for images without a right class."""
    rows = [overrides.get(key, ()) for key in batch["keys"]]  # a padding row has the key ""
    labels = torch.full((len(rows), max(1, *map(len, rows))), -1)
    for row, classes in enumerate(rows):
        classes = classes or (0,)  # what does not count still needs a finite loss
        labels[row, : len(classes)] = torch.tensor(classes)
    counts = torch.tensor([float(bool(row)) for row in rows])
    return {**batch, "labels": labels, "weight": batch["weight"] * counts}


def _read_entries(path: str, key: str) -> list[Any] | dict[str, Any]:
    try:
        entries = json.loads(read_bytes(Path(path), _FILE_BYTES))
    except OSError as error:
        raise ConfigError(f"{key} ({path}) cannot be read: {error.strerror}; name a JSON file") from error
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}; it holds {_FORMS}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key} ({path}) is not JSON ({error}); it holds {_FORMS}") from error
    if not isinstance(entries, (list, dict)):
        raise ConfigError(f"{key} ({path}) is a {type(entries).__name__}; it holds {_FORMS}")
    return entries


def _entry_name(sample: str, path: str, key: str) -> int:
    """The place in a list in validation order."""
    match = _IMAGENET_VAL.fullmatch(sample)
    if match is None:
        raise ConfigError(
            f"{key} ({path}) is a list in the order of ImageNet's validation images, but the sample key '{sample}' "
            'does not end in ILSVRC2012_val_ and 8 digits; write the file as {"SAMPLE KEY": [class, ...], ...}'
        )
    return int(match[1]) - 1


def _entry(entries: list[Any] | dict[str, Any], name: int | str) -> Any:
    if isinstance(entries, dict):
        return entries.get(str(name))
    return entries[name] if isinstance(name, int) and 0 <= name < len(entries) else None


def _checked(classes: Any, sample: str, num_classes: int, path: str, key: str) -> tuple[int, ...]:
    if not isinstance(classes, list) or any(type(label) is not int for label in classes):
        raise ConfigError(
            f"{key} ({path}): the entry of '{sample}' is {reprlib.repr(classes)}; it must be a list of classes"
        )
    for label in classes:
        if not 0 <= label < num_classes:
            raise ConfigError(
                f"{key} ({path}): the class {label} of '{sample}' is not within 0..{num_classes - 1}; name a file of "
                "this model's classes, or set task.num_classes"
            )
    return tuple(dict.fromkeys(classes))  # a class that is listed twice counts once
