"""An engine's sharded state on disk as float32 tensors, one at a time, whatever number of ranks wrote it."""

from __future__ import annotations

import functools
from pathlib import Path

from swinv2_train.config import ConfigError
from swinv2_train.engine.state.files import StateFiles, dtype_of
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors


def read_state_weights(directory: Path, averaged: bool = False) -> LazyTensors:
    """Masters, parameters that are not trained and persistent buffers by official name, from an engine's snapshots.

    averaged: the masters' averages in their place; ConfigError where none were kept.  Each access reads one tensor into
    memory of its own; floating point becomes float32.  Raises ConfigError that names a file which is missing or cut.
    Checksums are not compared: they belong to files, and only parts of them are read.
    """
    saved = StateFiles(directory)
    if averaged and saved.ema_decay is None:
        raise ConfigError(
            f"{directory.parent}: holds no averages of the weights, as optim.ema_decay was null; leave ema=true out, "
            "or name a checkpoint that was saved with it"
        )
    saved.check_files()
    return LazyTensors(
        {
            name: LazyTensor(tensor.shape, dtype_of(tensor.dtype), functools.partial(saved.read, name, averaged))
            for name, tensor in saved.specs.items()
        }
    )
