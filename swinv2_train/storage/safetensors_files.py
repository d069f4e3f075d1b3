"""The safetensors format, written one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from swinv2_train.storage.atomic import replacing
from swinv2_train.storage.lazy_tensors import LazyTensor

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(path: Path, entries: Mapping[str, LazyTensor]) -> None:
    """Write the tensors to one safetensors file, reading each when its turn comes.

    The file appears under its name when it is complete and on disk.  Raises ConfigError when path cannot be written.
    """
    with replacing(path) as unfinished:
        fill_safetensors(unfinished, entries)


def fill_safetensors(file: IO[bytes], entries: Mapping[str, LazyTensor]) -> None:
    """The same into a file that is open."""
    header, _ = _layout(entries)
    file.write(header)
    for name, entry in entries.items():
        tensor = entry.read()
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(entry.shape), entry.dtype), f"{name} was said to differ"
        file.write(_bytes_of(tensor))
        del tensor


def _layout(entries: Mapping[str, LazyTensor]) -> tuple[bytes, dict[str, int]]:
    """The header with its length, and where in the file each tensor begins; the tensors follow in the given order."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for name, entry in entries.items():
        size = entry.dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))
        span = [position, position + size]
        content[name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        begins[name], position = position, span[1]
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
