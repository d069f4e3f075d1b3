"""What each class counts in the loss of whole images (task.class_weights)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from swinv2_train.config import ClassifyConfig, ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import canonical, listed
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.label_counts import class_counts
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.storage.json_files import anything, read_json

KEY = "task.class_weights"
_FORMS = "a list of a number for each class, or an object from the name of each class to its number"


def class_weights(task: ClassifyConfig, source: Source | Stream, names: tuple[str, ...] | None) -> Tensor | None:
    """(classes,) float32; None = 1 for each.

    balanced, of n images and C classes that any has: of one class per image n / (C x images of the class), whose mean
    over all images is 1; of several, what applies counts (images without it) / (images with it).  A class without
    images (or without others) counts 1.  source: the training images.  names: of the classes.  Raises ConfigError.
    """
    if task.class_weights == "none":
        return None
    if task.class_weights != "balanced":
        return _of_file(task, names)
    applies, known = (torch.from_numpy(each).double() for each in class_counts(source, task.num_classes, KEY))
    single = task.target == "single"
    found = known / ((applies > 0).sum() * applies) if single else (known - applies) / applies
    return torch.where((applies > 0) & (found > 0), found, 1.0).float()


def _of_file(task: ClassifyConfig, names: tuple[str, ...] | None) -> Tensor:
    path = task.class_weights
    try:
        given = read_json(Path(path), 2**24, anything(), f"it holds {_FORMS}")
    except FileNotFoundError:
        raise ConfigError(
            f"{KEY} ({path}) is neither none nor balanced nor a file; name a JSON file: {_FORMS}"
        ) from None
    if isinstance(given, dict):
        if names is None:
            raise ConfigError(f"{KEY} ({path}) names classes, and the training images have numbers alone; write a list")
        by_name = {canonical(name): weight for name, weight in given.items()}
        wrong = [name for name in by_name if name not in names] or [name for name in names if name not in by_name]
        if wrong:
            raise ConfigError(
                f"{KEY} ({path}): '{shown(wrong[0])}' is in one of the two alone; classes are {listed(names)}"
            )
        given = [by_name[name] for name in names] + [1.0] * (task.num_classes - len(names))
    fits = isinstance(given, list) and len(given) == task.num_classes
    if not fits or any(isinstance(w, bool) or not isinstance(w, int | float) or not 0 <= w < 1e6 for w in given):
        raise ConfigError(
            f"{KEY} ({path}) must hold {_FORMS}: {task.num_classes} numbers (task.num_classes) from 0 to a million"
        )
    if not any(given):
        raise ConfigError(f"{KEY} ({path}) are all 0, which leaves nothing to learn; give one above 0")
    return torch.tensor(given, dtype=torch.float32)
