"""An engine's sharded state on disk as float32 tensors that are read one at a time, whatever number of ranks wrote it."""

from __future__ import annotations

import functools
from pathlib import Path

from swinv2_train.engine.shards import Shards, dtype_of
from swinv2_train.lazy import LazyTensor, LazyTensors


def read_weights(directory: Path) -> LazyTensors:
    """The float32 masters, other parameters and persistent buffers by official name, from what an engine's ``save``
    wrote in directory.

    Each access reads one tensor into memory of its own; floating point becomes float32.  Raises ConfigError that names
    the file which is missing or damaged, at once or when it is needed.  Sizes are checked, checksums are not: a tensor's
    own would be needed to read no more than it.
    """
    shards = Shards(directory)
    shards.check_files()
    return LazyTensors(
        {
            name: LazyTensor(tensor.shape, dtype_of(tensor.dtype), functools.partial(shards.read, name))
            for name, tensor in shards.described.items()
        }
    )
