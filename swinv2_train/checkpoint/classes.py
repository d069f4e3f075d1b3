"""What a checkpoint's classes are called, in the order of its head's rows."""

from __future__ import annotations

import os
from pathlib import Path

from swinv2_train.checkpoint.saved_state import read_state
from swinv2_train.config import ConfigError, is_pipe
from swinv2_train.config.command_line import load_run_config
from swinv2_train.data.class_names import CLASSES_NAME, canonical, is_left_out, read_class_names
from swinv2_train.data.shards.pattern import expand_pattern
from swinv2_train.data.shards.transfers import is_remote
from swinv2_train.data.sources.huggingface import is_saved_dataset, open_saved_dataset


def checkpoint_classes(checkpoint: Path) -> tuple[str, ...] | None:
    """The names of a checkpoint's classes; None where they are known by number alone, or there are none.

    A checkpoint of a time when names were not kept has those of its run's training images, where these are still there.
    Raises ConfigError for a state.json that cannot be read.
    """
    state = read_state(checkpoint)
    kept = state["classes"] if "classes" in state else _of_training_images(checkpoint.parent.parent)
    return None if kept is None else tuple(kept)


def _of_training_images(run_dir: Path) -> tuple[str, ...] | None:
    """The classes in the order that they had before names were kept: folders as text, "10" before "2"."""
    try:
        config = load_run_config(run_dir)
        shards, count = config.data.shards, config.task.label_classes
        if count is None or not shards or is_pipe(shards) or is_remote(shards.removeprefix("file://")):
            return None
        directory = os.path.expanduser(shards.removeprefix("file://"))
        if not os.path.isdir(directory):
            names = read_class_names(Path(expand_pattern(shards)[0]).with_name(CLASSES_NAME))
        elif is_saved_dataset(directory):
            names = open_saved_dataset(directory).classes
        else:
            folders = [each.name for each in os.scandir(directory) if each.is_dir() and not is_left_out(each.name)]
            names = tuple(map(canonical, sorted(folders)))
    except (ConfigError, OSError):  # the images are gone, so nothing is known of them
        return None
    return names if names and len(names) <= count else None
