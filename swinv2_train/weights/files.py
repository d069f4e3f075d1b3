"""Weight files as named tensors, under the names that they hold: found, read safely, one tensor at a time.

Nothing that a file says is ever run: safetensors holds no code, and pickled files go through torch's weights-only
unpickler, which builds tensors and plain values alone.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import canonical
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.storage.safetensors_files import DTYPES

CONTAINERS = (
    *("model", "state_dict", "model_state_dict", "module", "net", "teacher", "student"),
    *("model_ema", "state_dict_ema"),
)
"""Keys under which training programs keep the weights, the first that is there is read."""
_CONTAINERS_DEEP = 3
"""Inside of each other, as {"state_dict": {"model": ...}}."""

HUGGINGFACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a Hugging Face directory may hold, in the order in which transformers looks."""


_INDEX_BYTES = 2**25
MOST_TENSORS = 10_000
"""The most tensors in a file; the largest Swin V2 has about 1,500."""
_HEADER_BYTES = 2**25
"""The most that the header of a safetensors file may hold."""
_RATIO, _UNPACKED_BYTES = 50, 2**26
"""A compressed file may unpack to so many times its size, or to so many bytes: weights shrink by a tenth."""


_REPEATED_BYTES = 2**31
"""What a tensor may hold by repeating few values of the file; more would be memory that nobody paid for."""


CLASS_NAMES = "class_names"
"""Where files of ours keep the names of the classes."""


class WeightFile(NamedTuple):
    """The tensors of a file or directory, and the containers in it that were not read."""

    entries: dict[str, LazyTensor]
    left_out: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    """What the rows of its head are called, where the file itself says it."""


def names_of(value: object) -> tuple[str, ...] | None:
    """A list of names as a tuple; None for anything else, a list without any, and one with a name twice."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        return None
    names = tuple(map(canonical, value))
    return names if len(set(names)) == len(names) else None


def open_weights(path: Path) -> WeightFile:
    """The tensors at path by the names they have there: a safetensors or torch file, or a Hugging Face directory.

    Safetensors and torch's zip files are read one tensor at each access; the older torch format (before 1.6) and zip
    files that someone has compressed have to be read whole.  Raises ConfigError, naming file, fault and remedy, for
    whatever is no weight file.
    """
    try:
        if path.is_dir():
            found = next((path / name for name in HUGGINGFACE_FILES if (path / name).is_file()), None)
            if found is None:
                raise ConfigError(
                    f"{path} is a directory without weights: neither a run with checkpoints nor a complete checkpoint, "
                    f"and without {', '.join(HUGGINGFACE_FILES)}; name a weight file or a run directory"
                )
            return open_weights(found)
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file; check the path")
        if path.name.endswith(".index.json"):
            return _open_index(path)
        return _open_file(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _open_file(path: Path) -> WeightFile:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ConfigError(f"{path}: the file is empty; fetch it again")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _open_torch(path, zipped=start.startswith(b"PK"))
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return WeightFile(_open_safetensors(path), (), _safetensors_classes(path))
    if start.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path}: a Git LFS pointer, not the weights themselves; fetch them with git lfs pull")
    raise ConfigError(f"{path}: neither a safetensors nor a torch file (it begins with {start[:16]!r}); fetch it again")


def index_parts(index: Path) -> list[str]:
    """Names of the files in which a model's tensors are, by the list beside them.  Raises ConfigError."""
    return list(dict.fromkeys(_weight_map(index).values()))


def _open_index(index: Path) -> WeightFile:
    """A model in several files beside a list of which file has which tensor."""
    weight_map = _weight_map(index)
    entries: dict[str, LazyTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        part = index.parent / name
        if part.parent != index.parent or not part.is_file():
            raise ConfigError(f"{index} names {shown(name)!r}, which is not beside it; fetch all files of the model")
        for key, entry in _open_file(part).entries.items():
            if weight_map.get(key) == name:
                entries[key] = entry
    lacking = sorted(weight_map.keys() - entries.keys())
    if lacking:
        raise ConfigError(
            f"{index}: {shown(weight_map[lacking[0]])} does not hold {_some(lacking)}, which it lists; "
            "fetch the files again"
        )
    return WeightFile(entries, ())


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        weight_map = json.loads(read_bytes(index, _INDEX_BYTES))["weight_map"]
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index}: cannot be read as an index ({error}); fetch it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{index}: its weight_map does not give a file for each tensor; fetch it again")
    if not weight_map:
        raise ConfigError(f"{index}: its weight_map lists no tensors; fetch it again")
    return weight_map


# --------------------------------------------------------------------------------------------------------------------
# safetensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    from safetensors import safe_open

    def read(name: str) -> Tensor:
        with _safetensors_errors(path), safe_open(path, "pt") as file:  # opened anew: nothing stays mapped in between
            return file.get_tensor(name).clone()  # else it stays a view of the file, which may be replaced

    entries = {}
    _check_header(path)
    with _safetensors_errors(path), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  the file is no mapping
            part = file.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                kind = part.get_dtype()
                raise ConfigError(f"{path}: {shown(name)} is {kind}; save it as float32, float16 or bfloat16")
            entries[name] = LazyTensor(tuple(part.get_shape()), dtype, _bound(read, name))
    return entries


def _check_header(path: Path) -> None:
    """Refuse a header that is larger than any of a model, or that names a tensor twice, which the library hides.

    What else is wrong with it (offsets that overlap, leave gaps or lead out of the file, sizes that are not their
    shape's) the library finds when it opens the file, before it reads a tensor.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_BYTES:
            raise ConfigError(
                f"{path}: a damaged or truncated safetensors file (its header is said to hold {length:,} bytes, more "
                f"than {_HEADER_BYTES:,}); fetch it again"
            )
        header = file.read(length)
    twice: list[str] = []

    def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and not twice:
            seen: set[str] = set()
            twice.append(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
        return found

    try:
        content = json.loads(header, object_pairs_hook=no_name_twice)
    except (ValueError, RecursionError) as error:
        reason = shown(error, 200)
        raise ConfigError(f"{path}: a damaged or truncated safetensors file ({reason}); fetch it again") from error
    if twice:
        raise ConfigError(f"{path}: {shown(twice[0])} stands twice in its header; save the weights again")
    if len(content) > MOST_TENSORS:
        raise ConfigError(f"{path}: holds {len(content):,} tensors, more than {MOST_TENSORS:,}; name a model's weights")


def _safetensors_classes(path: Path) -> tuple[str, ...] | None:
    from safetensors import safe_open

    with _safetensors_errors(path), safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get(CLASS_NAMES, "null")
    try:
        return names_of(json.loads(said))
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ConfigError(f"{path}: a damaged or truncated safetensors file ({error}); fetch it again") from error


# --------------------------------------------------------------------------------------------------------------------
# torch.save


class _Inert:
    """Stands for an object that a training program stored beside the weights; keeps nothing of what it is given."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _InertMapping:
    """Stands for a dictionary of that kind: what is built is an OrderedDict, the one mapping that torch lets a file
    fill.
    """

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return OrderedDict()


_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_InertMapping, "yacs.config.CfgNode"),  # 'config' of the official training checkpoints
    (_InertMapping, "mmengine.config.config.ConfigDict"),
    *(
        (_Inert, name)
        for name in (
            "argparse.Namespace",  # 'args' of timm's
            "pathlib.PosixPath",
            "mmengine.logging.history_buffer.HistoryBuffer",  # 'message_hub' of mmpretrain's
            "builtins.getattr",  # how its methods are stored; as a stand-in it looks nothing up
            "numpy.dtype",
            "numpy.ndarray",
            "numpy.core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct",
            *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
        )
    ),
]
"""Metadata of known training programs.  None of these is imported or called: every one becomes a stand-in."""

_DEEPSPEED = "module"
"""Where DeepSpeed's mp_rank_00_model_states.pt has the weights."""
_DEEPSPEED_MARKS = ("ds_version", "ds_config", "dp_world_size", "global_samples")
"""What else stands there, one of them at least."""


def _can_be_mapped(path: Path) -> bool:
    """Whether the records of a zip file lie in it as they are; compressed ones do not.

    torch takes the bytes of a mapped tensor from where the archive's list says that they begin, and does not ask for
    more; nor does it see when a record cannot be decompressed.  Raises zipfile.BadZipFile, or what else zipfile raises,
    when the list and the records contradict each other.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        unpacked, packed = sum(record.file_size for record in records), path.stat().st_size
        if unpacked > max(_RATIO * packed, _UNPACKED_BYTES):
            raise zipfile.BadZipFile(f"{packed:,} bytes are said to unpack to {unpacked:,}")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} has not the content that the archive's list says")
            return False
        borders = [*(record.header_offset for record in records[1:]), archive.start_dir]
        for record, border in zip(records, borders, strict=True):
            archive.open(record).close()  # raises unless the record begins there, under its name
            file.seek(record.header_offset + 26)
            end = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + record.compress_size
            if record.file_size != record.compress_size or end > border:
                raise zipfile.BadZipFile(f"{record.filename} is not where and what the archive's list says")
    return True


def _load_torch(path: Path, mapped: bool) -> tuple[Any, list[str]]:
    """What a torch file holds, and the names of the objects in it that were replaced by stand-ins unasked.

    That is done to a file of DeepSpeed's alone, whose weights are apart from the rest: nothing of an object is looked
    up, called or kept, and one among the weights is found there to be no tensor.
    """
    unknown: list[str] = []
    with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
        warnings.simplefilter("ignore")
        try:
            # mapped where possible: a tensor takes memory when it is read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), unknown
        except pickle.UnpicklingError as error:
            if not mapped or not re.search(r"GLOBAL (\S+)", str(error)):
                raise
            unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
                try:
                    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except Exception:  # noqa: BLE001  a stand-in does not serve
                    raise error from None
            if _is_deepspeed(content):
                return content, unknown
            raise


def _is_deepspeed(content: object) -> bool:
    if not isinstance(content, dict) or not isinstance(dict.get(content, _DEEPSPEED), dict):
        return False
    return any(mark in dict.keys(content) for mark in _DEEPSPEED_MARKS)


def _open_torch(path: Path, zipped: bool) -> WeightFile:
    try:
        content, unknown = _load_torch(path, mapped=zipped and _can_be_mapped(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise ConfigError(
                f"{path}: refused, nothing of it was run: it asks for {found[1]}, which is no tensor, and what is "
                "none may be a program; use a safetensors version, or a file that holds the weights alone"
            ) from error
        raise ConfigError(f"{path}: cannot be read as weights ({_reason(error)}); fetch it again") from error
    except Exception as error:  # noqa: BLE001  a damaged pickle raises anything
        raise ConfigError(f"{path}: a damaged or truncated torch file ({_reason(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not named tensors; save the model's state_dict")
    # dict.items, dict.get, Tensor.detach: a file may give its objects attributes, which would stand before the methods
    tensors, left_out, where = content, [f"{name} (an object)" for name in unknown], ""
    if _is_deepspeed(content):
        left_out += [f"{name}.*" for name in ("optimizer", "lr_scheduler") if dict.get(content, name)]
        tensors, where = dict.__getitem__(content, _DEEPSPEED), f"{_DEEPSPEED}."
    for _ in range(_CONTAINERS_DEEP):
        containers = [key for key in CONTAINERS if isinstance(dict.get(tensors, key), dict)]
        if not containers:
            break
        left_out += [f"{where}{key}.*" for key in containers[1:]]
        tensors, where = dict.__getitem__(tensors, containers[0]), f"{where}{containers[0]}."
    if dict.__len__(tensors) > MOST_TENSORS:
        raise ConfigError(f"{path}: holds more than {MOST_TENSORS:,} entries; name a model's weights")
    entries = {name: _entry(path, name, value) for name, value in dict.items(tensors)}
    if not entries:
        raise ConfigError(f"{path}: holds no tensors; name a file with a model's weights")
    classes = names_of(dict.get(content, CLASS_NAMES)) if where else None
    return WeightFile(entries, tuple(left_out), classes)


def _entry(path: Path, name: object, value: object) -> LazyTensor:
    if not isinstance(name, str):
        named = repr(name) if isinstance(name, int | float | bytes | None) else type(name).__name__
        raise ConfigError(f"{path}: {shown(named)} is no name of a tensor; save the model's state_dict")
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"{path}: {shown(name)!r} is {type(value).__name__}, not a tensor; weights are read bare or under one of "
            f"{', '.join(CONTAINERS)}"
        )
    if value.is_meta:
        raise ConfigError(f"{path}: {shown(name)} is on the meta device and has no values; save the weights themselves")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise ConfigError(f"{path}: {shown(name)} is sparse, quantized or nested; save it as a plain tensor")
    tensor = Tensor.detach(value)
    size = tensor.numel() * tensor.element_size()
    if size > max(tensor.untyped_storage().nbytes(), _REPEATED_BYTES):
        raise ConfigError(
            f"{path}: {shown(name)} is {shown(tuple(tensor.shape))}, of which the file holds "
            f"{tensor.untyped_storage().nbytes():,} bytes alone; save it as a plain tensor (contiguous())"
        )
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.clone)


def _bound(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _reason(error: BaseException) -> str:
    """The first line of what torch found, without its advice on weights_only."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error).partition("In PyTorch 2.6")[0]
    return text.strip().splitlines()[0][:200].strip() if text.strip() else type(error).__name__


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
