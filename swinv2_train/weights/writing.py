"""Writing weight files one tensor at a time, complete or absent.

torch's own ``save`` wants every tensor at once; those that it gets here are mapped from a file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.storage.atomic import replacing_output
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.storage.safetensors_files import PYTORCH, fill_safetensors, safetensors_header, write_safetensors
from swinv2_train.weights.files import CLASS_NAMES


def write_named_safetensors(path: Path, entries: Mapping[str, LazyTensor], classes: Sequence[str] | None) -> None:
    """Write a safetensors file whose metadata say what the classes are called."""
    write_safetensors(path, entries, {} if classes is None else {CLASS_NAMES: json.dumps(list(classes))})


def write_torch(path: Path, entries: Mapping[str, LazyTensor], classes: Sequence[str] | None = None) -> None:
    """Write ``{"model": tensors}`` as torch.save does, through a nameless file beside it that holds them meanwhile.

    classes: what the classes are called, which stands beside "model".
    The file appears under its name when it is complete and on disk.  Raises ConfigError when path cannot be written.
    """
    with replacing_output(path) as unfinished, tempfile.TemporaryFile(dir=path.parent) as staged:
        fill_safetensors(staged, entries)
        staged.flush()
        _, offsets = safetensors_header(entries, PYTORCH)
        mapped = {name: _mapped(staged, offsets[name], entry) for name, entry in entries.items()}
        content: dict[str, Any] = {"model": mapped}
        if classes is not None:
            content[CLASS_NAMES] = list(classes)
        torch.save(content, unfinished)


def _mapped(file: IO[bytes], offset: int, entry: LazyTensor) -> Tensor:
    size = entry.dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))
    raw = np.memmap(file, dtype=np.uint8, mode="c", offset=offset, shape=(size,))
    return torch.from_numpy(raw).view(entry.dtype).view(entry.shape)
