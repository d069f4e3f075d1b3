"""An engine's sharded state on disk as float32 tensors, one at a time, whatever number of ranks wrote it."""

from __future__ import annotations

import functools
from pathlib import Path

from swinv2_train.engine.shards import Shards, dtype_of
from swinv2_train.lazy import LazyTensor, LazyTensors


def read_weights(directory: Path) -> LazyTensors:
    """Masters, parameters that are not trained and persistent buffers by official name, from an engine's snapshots.

    Each access reads one tensor into memory of its own; floating point becomes float32.  Raises ConfigError that names
    a file which is missing or cut.  Checksums are not compared: they belong to files, and only parts of them are read.
    """
    shards = Shards(directory)
    shards.check_files()
    return LazyTensors(
        {
            name: LazyTensor(tensor.shape, dtype_of(tensor.dtype), functools.partial(shards.read, name))
            for name, tensor in shards.described.items()
        }
    )
