"""Writing weight files one tensor at a time, complete or absent.

The safetensors library's own ``save_file`` wants every tensor at once, which for the largest models is more than a
process has; the format itself (a length, a JSON header, the tensors' bytes) asks for one at a time only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.lazy import LazyTensor

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


def write_torch(path: Path, entries: Mapping[str, LazyTensor]) -> None:
    """Write ``{"model": tensors}`` as torch.save does, through a nameless file beside it that holds them meanwhile.

    The file appears under its name when it is complete and on disk.  Raises ConfigError when path cannot be written.
    """
    with replacing(path) as unfinished, tempfile.TemporaryFile(dir=path.parent) as staged:
        fill_safetensors(staged, entries)
        staged.flush()
        _, offsets = _layout(entries)
        mapped = {name: _mapped(staged, offsets[name], entry) for name, entry in entries.items()}
        torch.save({"model": mapped}, unfinished)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside path, under a name that no other has, to be written; at the end it takes path's name.

    It is then on the disk.  When anything fails, it and the folders made for it are gone again.  Raises ConfigError
    when path cannot be written.
    """
    unfinished = path.with_name(f"{path.name[:40]}.{secrets.token_hex(8)}.unfinished")
    made: list[Path] = []
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        for folder in made:  # the innermost first; one that is in use by now stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
        raise


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


def _mapped(file: IO[bytes], offset: int, entry: LazyTensor) -> Tensor:
    size = entry.dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))
    raw = np.memmap(file, dtype=np.uint8, mode="c", offset=offset, shape=(size,))
    return torch.from_numpy(raw).view(entry.dtype).view(entry.shape)
