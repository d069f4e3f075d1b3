"""An engine's state on disk: each rank writes its pieces, and any number of ranks of any engine reads them.

DIRECTORY/
    engine.json             what wrote it; shape and dtype of every tensor, and which are trained
    rank_0000.safetensors   the pieces of that rank

A piece is stored under weight/NAME (the float32 master of what is trained, else the tensor in its own precision),
exp_avg/NAME and exp_avg_sq/NAME, and ema/NAME, the weight's average, in a run with optim.ema_decay; the header's
metadata say where in the tensor it begins and how many steps AdamW has made.  Nothing in the files is code, so a
checkpoint may be anybody's.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.distributed import World
from swinv2_train.engine.host_copies import page_locked
from swinv2_train.engine.state.ema import EMA_KIND
from swinv2_train.engine.state.pieces import Piece
from swinv2_train.storage.durable import Checksum, write_durably
from swinv2_train.storage.json_files import (
    anything,
    choice,
    flag,
    listing,
    mapping,
    number,
    optional,
    parse_json,
    read_json,
    record,
    row,
    whole,
)
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.storage.safetensors_files import DTYPE_NAMES, DTYPES, safetensors_chunks

METADATA_FILE = "engine.json"
"""The file that says what wrote the state."""
_METADATA_BYTES = 2**25
"""The most that it may hold: 100 bytes for each tensor."""
_METADATA = record(
    {
        "tensors": mapping(row(listing(whole(), most=8), choice(*DTYPES), flag())),
        "world_size": whole(1, 2**20),
    },
    may={"ema_decay": optional(number(0))},
)
_STARTS, _STEPS = mapping(whole()), mapping(number(0))
_ANOTHER = "choose another checkpoint"


class TensorSpec(NamedTuple):
    """A whole tensor of an engine's state."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it; F32 for what is trained."""
    trained: bool


def tensor_specs(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, bool]]) -> dict[str, TensorSpec]:
    """From name -> (shape, dtype in the module, trained)."""
    return {
        name: TensorSpec(shape, "F32" if trained else DTYPE_NAMES[dtype], trained)
        for name, (shape, dtype, trained) in tensors.items()
    }


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a state, ready to be written without another rank's or the engine's help."""

    rank: int
    metadata: dict[str, Any]
    starts: dict[str, int]
    steps: dict[str, float]
    tensors: dict[str, Tensor]
    copying: Future[None] | None
    """What still fills the tensors; None = they are views."""

    def write(self, directory: Path) -> dict[str, Checksum]:
        """Write the rank's files into directory, which exists, and flush them; returns their checksums by file name."""
        if self.copying is not None:
            self.copying.result()
        name = _file_name(self.rank)
        sums = {name: write_durably(directory / name, self._chunks())}
        if self.rank == 0:
            sums[METADATA_FILE] = write_durably(
                directory / METADATA_FILE, [(json.dumps(self.metadata, indent=1) + "\n").encode()]
            )
        return sums

    def _chunks(self) -> Iterator[bytes | memoryview]:
        """The content of the rank's safetensors file."""
        entries = {
            key: LazyTensor((tensor.numel(),), tensor.dtype, functools.partial(Tensor.cpu, tensor))
            for key, tensor in self.tensors.items()
        }
        metadata = {"starts": json.dumps(self.starts), "steps": json.dumps(self.steps)}
        return safetensors_chunks(entries, metadata)


class HostMemory:
    """CPU memory for the copies of one snapshot at a time; kept, because asking for it anew costs more than copying."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._thread = ThreadPoolExecutor(1, "snapshot")
        self._copying: Future[None] | None = None

    def wait(self) -> None:
        """Until the copies are made: to be called before one of the tensors changes."""
        if self._copying is not None:
            wait([self._copying])  # an error is told by whoever writes the copies

    def copies_of(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Future[None]]:
        """Copies of the tensors in this memory, where they stay until the next call, and the copying under way."""
        self.wait()
        runs = _adjacent(tensors)
        starts = [0, *itertools.accumulate(-(-run.numel() // 16) * 16 for run, _ in runs)]  # any dtype may begin there
        on_gpu = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if self._memory.numel() < starts[-1]:
            self._memory = page_locked(starts[-1]) if on_gpu else torch.empty(starts[-1], dtype=torch.uint8)
        pairs, copies = [], {}
        for (run, offsets), start in zip(runs, starts[:-1], strict=True):
            copy = self._memory[start : start + run.numel()]
            pairs.append((copy, run))
            for key, offset in offsets.items():
                size = tensors[key].numel() * tensors[key].element_size()
                copies[key] = copy[offset : offset + size].view(tensors[key].dtype)
        made = None if on_gpu is None else torch.cuda.current_stream(on_gpu).record_event()
        self._copying = self._thread.submit(_copy, pairs, made)
        return {key: copies[key] for key in tensors}, self._copying


def _copy(pairs: list[tuple[Tensor, Tensor]], made: torch.cuda.Event | None) -> None:
    """Fill each first tensor of the pairs from its second; made: when the GPU has computed those."""
    if made is None:
        for copy, original in pairs:
            copy.copy_(original)
        return
    stream = torch.cuda.Stream(made.device)  # type: ignore[no-untyped-call]
    stream.wait_event(made)
    with torch.cuda.stream(stream):
        for copy, original in pairs:
            copy.copy_(original, non_blocking=True)
    stream.synchronize()


def _adjacent(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, int]]]:
    """The tensors' memory as few runs of bytes, uint8, each with the tensors in it and where they begin there.

    The pieces of a flat tensor lie one behind the other: copied together they take two thirds of the time.
    """
    spans: list[tuple[int, int, Tensor, dict[str, int]]] = []  # address, bytes, the first tensor, offsets
    for address, key, tensor in sorted((tensor.data_ptr(), key, tensor) for key, tensor in tensors.items()):
        size = tensor.numel() * tensor.element_size()
        if spans:
            begin, length, first, offsets = spans[-1]
            if address == begin + length and first.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                offsets[key] = length
                spans[-1] = (begin, length + size, first, offsets)
                continue
        spans.append((address, size, tensor, {key: 0}))
    return [(_bytes_at(first, length), offsets) for _, length, first, offsets in spans]


def _bytes_at(first: Tensor, length: int) -> Tensor:
    """A view of `length` bytes of a tensor's storage from where the tensor begins, as uint8 (length,)."""
    offset = first.storage_offset() * first.element_size()
    empty = torch.empty(0, dtype=torch.uint8, device=first.device)
    return empty.set_(first.untyped_storage(), offset, (length,))  # type: ignore[call-overload]


def snapshot(
    pieces: Iterable[Piece],
    specs: Mapping[str, TensorSpec],
    settings: dict[str, Any],
    world: World,
    memory: HostMemory | None,
) -> Snapshot:
    """This rank's part of a state.  settings: what wrote it, for people to read; its
    "ema_decay" also tells whether there are averages of the weights.

    memory: where copies are taken, so that training may go on before they are written; None = views.
    """
    own = [piece for piece in pieces if world.is_main or not piece.replicated]
    tensors = {f"{kind}/{piece.name}": tensor for piece in own for kind, tensor in piece.tensors.items()}
    tensors, copying = (tensors, None) if memory is None else memory.copies_of(tensors)
    return Snapshot(
        rank=world.rank,
        metadata={**settings, "world_size": world.world_size, "tensors": specs},
        starts={piece.name: piece.start for piece in own},
        steps={piece.name: float(piece.step) for piece in own if piece.step is not None},
        tensors=tensors,
        copying=copying,
    )


class StateFiles:
    """A state on disk.  Files are opened when something in them is asked for, and mapped into memory, not read.

    first: the rank whose file is looked into first; it holds all that the same rank of an equal engine asks for.
    Every method raises ConfigError that names the file which is missing or damaged.
    """

    def __init__(self, directory: Path, first: int = 0) -> None:
        path = directory / METADATA_FILE
        try:
            metadata = read_json(path, _METADATA_BYTES, mapping(anything()), _ANOTHER)
        except FileNotFoundError:
            raise ConfigError(
                f"{directory}: no engine state here ({METADATA_FILE} is missing); is the path right?"
            ) from None
        if "tensors" not in metadata:
            raise ConfigError(
                f"{directory}: written by a version before checkpoints could change their number of ranks; export its "
                "weights with that version and start from them (task.init_from)"
            )
        self.directory = directory
        try:
            _METADATA(metadata, "")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; {_ANOTHER}") from error
        self.specs = {
            name: TensorSpec(tuple(shape), dtype, trained)
            for name, (shape, dtype, trained) in metadata["tensors"].items()
        }
        self.ema_decay: float | None = metadata.get("ema_decay")
        """Decay of the weights' averages that are in it; None = none are."""
        self._order = sorted(range(metadata["world_size"]), key=lambda rank: rank != first)
        self._stored = sum(path.stat().st_size for path in directory.glob("rank_*.safetensors"))
        self._files: dict[int, tuple[Any, dict[str, int], dict[str, float]]] = {}

    def check_files(self) -> None:
        """Open every rank's file, which finds those that are missing or cut."""
        for rank in self._order:
            self._open(rank)

    def read(self, name: str, averaged: bool = False) -> Tensor:
        """A whole tensor: float32 for every floating point tensor, else in its own dtype.  In memory of its own.

        averaged: its average, where it was trained.
        """
        shape, dtype, trained = self.specs[name]
        self.check_files()  # what is missing is said, before what does not fit
        if math.prod(shape) > self._stored:  # nothing of a size that is only said is ever allocated
            raise ConfigError(
                f"{self.directory / METADATA_FILE}: {name} has shape {shape}, which is more than the "
                f"{self._stored:,} bytes of all its files; {_ANOTHER}"
            )
        flat = torch.empty(math.prod(shape), dtype=dtype_of(dtype))
        self.fill(flat, EMA_KIND if averaged and trained else "weight", name, 0)
        return flat.view(shape)

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Copy the elements from start on into target, which has one dimension and any dtype and device."""
        missing = target.numel()
        for rank in self._order:
            if missing == 0:
                return
            file, starts, _ = self._open(rank)
            if name not in starts:
                continue
            try:
                stored = file.get_slice(f"{kind}/{name}")
                (size,) = stored.get_shape()
                begin, end = max(start, starts[name]), min(start + target.numel(), starts[name] + size)
                if begin < end:
                    target[begin - start : end - start].copy_(stored[begin - starts[name] : end - starts[name]])
                    missing -= end - begin
            except Exception as error:  # safetensors has no common class for what it finds wrong
                raise self._damaged(rank, f"{kind} of {name}: {error}") from error
        if missing:
            raise ConfigError(
                f"{self.directory}: {missing} of {target.numel()} elements of {name} ({kind}) are in no file; "
                "choose another checkpoint"
            )

    def step(self, name: str) -> float:
        """How many steps AdamW has made with a parameter."""
        for rank in self._order:
            steps = self._open(rank)[2]
            if name in steps:
                return steps[name]
        raise ConfigError(f"{self.directory}: no file says how many steps {name} has made; choose another checkpoint")

    def _open(self, rank: int) -> tuple[Any, dict[str, int], dict[str, float]]:
        """A rank's file, where its pieces begin and their steps."""
        from safetensors import safe_open

        if rank not in self._files:
            path = self.directory / _file_name(rank)
            try:
                file: Any = safe_open(path, framework="pt")
                metadata = file.metadata()
                starts = parse_json(metadata["starts"], "where its pieces begin", _STARTS, "")
                self._files[rank] = (file, starts, parse_json(metadata["steps"], "their steps", _STEPS, ""))
            except FileNotFoundError:
                raise ConfigError(f"{path}: missing; choose another checkpoint") from None
            except Exception as error:  # safetensors has no common class for what it finds wrong
                raise self._damaged(rank, str(error)) from error
        return self._files[rank]

    def _damaged(self, rank: int, reason: str) -> ConfigError:
        return ConfigError(f"{self.directory / _file_name(rank)}: cannot be read ({reason}); choose another checkpoint")


def restore(saved: StateFiles, pieces: Iterable[Piece], specs: Mapping[str, TensorSpec]) -> None:
    """Fill an engine's pieces from a state of any engine and number of ranks, unrounded.  Reads no more than they are.

    Averages of the weights begin at the weights where the state has none.  Raises ConfigError before anything is
    changed when the state is another model's; after that for a damaged file.
    """
    _check_same_model(saved, specs)
    steps: dict[int, float] = {}
    with torch.no_grad():
        for piece in pieces:
            for kind, tensor in piece.tensors.items():
                missing = kind == EMA_KIND and saved.ema_decay is None
                saved.fill(tensor, "weight" if missing else kind, piece.name, piece.start)
            if piece.step is not None:
                step = saved.step(piece.name)
                if steps.setdefault(id(piece.step), step) != step:
                    raise ConfigError(
                        f"{saved.directory}: {piece.name} has made {step:g} steps and others of its group "
                        f"{steps[id(piece.step)]:g}, which this engine cannot keep; resume with the one that saved it"
                    )
                piece.step.fill_(step)


def _check_same_model(saved: StateFiles, specs: Mapping[str, TensorSpec]) -> None:
    problems = []
    for name in sorted(specs.keys() | saved.specs.keys()):
        ours, theirs = specs.get(name), saved.specs.get(name)
        if theirs is None:
            problems.append(f"{name} is not in it")
        elif ours is None:
            problems.append(f"{name} is not in the model")
        elif ours.shape != theirs.shape:
            problems.append(f"{name} has shape {theirs.shape}, the model {ours.shape}")
        elif ours.trained and not theirs.trained:
            problems.append(f"{name} was not trained in it, so AdamW has no averages of it")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(
            f"{saved.directory}: the state is another model's: {'; '.join(problems[:5])}{more}; "
            "resume with the model that saved it"
        )


def dtype_of(name: str) -> torch.dtype:
    """The dtype in which a stored tensor is given to others: float32 for all floating point."""
    dtype = DTYPES[name]
    return torch.float32 if dtype.is_floating_point else dtype


def _file_name(rank: int) -> str:
    return f"rank_{rank:04d}.safetensors"
