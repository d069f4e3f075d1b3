"""The safetensors format, written one tensor at a time: a length, a JSON header, the tensors' bytes.

The library's own ``save_file`` wants every tensor at once, which for the largest models is more than a process has.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from swinv2_train.storage.atomic import replacing_output
from swinv2_train.storage.lazy_tensors import LazyTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the names that the format has for them."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

PYTORCH = {"format": "pt"}
"""The metadata without which transformers refuses a file."""


def write_safetensors(path: Path, entries: Mapping[str, LazyTensor], metadata: Mapping[str, str] = {}) -> None:
    """Write the tensors to one safetensors file, reading each when its turn comes.

    metadata: what else its header says.  The file appears under its name when it is complete and on disk.  Raises
    ConfigError when path cannot be written.
    """
    with replacing_output(path) as unfinished:
        fill_safetensors(unfinished, entries, metadata)


def fill_safetensors(file: IO[bytes], entries: Mapping[str, LazyTensor], metadata: Mapping[str, str] = {}) -> None:
    """Write the tensors into a file that is open, reading each when its turn comes."""
    for chunk in safetensors_chunks(entries, {**PYTORCH, **metadata}):
        file.write(chunk)
        del chunk  # before the next tensor is read


def safetensors_chunks(entries: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The content of a file: its header, then every tensor's bytes, each read when it is asked for."""
    yield safetensors_header(entries, metadata)[0]
    for name, entry in entries.items():
        tensor = entry.read()
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(entry.shape), entry.dtype), f"{name} was said to differ"
        yield _bytes_of(tensor)
        del tensor


def safetensors_header(entries: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header with its length, and where in the file each tensor begins; the tensors follow in the given order."""
    content: dict[str, object] = {"__metadata__": metadata}
    begins, position = {}, 0
    for name, entry in entries.items():
        size = entry.dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))
        span = [position, position + size]
        content[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        begins[name], position = position, span[1]
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
