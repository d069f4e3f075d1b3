"""Reading and writing every implementation's SwinV2 weights; in memory the names are the official ones.

    report = load_weights(model, "swinv2_tiny_patch4_window8_256.pth")
    save_weights(model, "export", "huggingface")

Tensors are read, converted and written one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from swinv2_train.checkpoint import COMPLETE, checkpoint_classes, find_checkpoint, read_checkpoint_weights
from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, SwinTransformerV2, encoder_of
from swinv2_train.models.upernet import UPerNet
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors
from swinv2_train.weights.adapters import with_adapters_merged
from swinv2_train.weights.bands import Bands
from swinv2_train.weights.files import open_weights
from swinv2_train.weights.hub import fetched, pinned
from swinv2_train.weights.huggingface import (
    Preprocessing,
    check_huggingface,
    huggingface_classes,
    trained_windows,
    write_huggingface,
)
from swinv2_train.weights.matching import Head, LoadReport, match_weights
from swinv2_train.weights.names import FLOATS, FORMATS, ConvertedWeights, from_official, to_official
from swinv2_train.weights.segmenter import check_segmenter_format, published_names, transformers_names
from swinv2_train.weights.writing import write_named_safetensors, write_torch

__all__ = [
    "FORMATS",
    "WRITTEN_FORMATS",
    "Bands",
    "ConvertedWeights",
    "Head",
    "LoadReport",
    "Preprocessing",
    "load_weights",
    "match_weights",
    "read_weights",
    "save_weights",
    "trained_windows",
    "weights_classes",
]

WRITTEN_FORMATS = ("microsoft", "timm", "huggingface")

_WRITERS = {".safetensors": write_named_safetensors, ".pth": write_torch, ".pt": write_torch, ".bin": write_torch}


def read_weights(path: str | Path, format: str | None = None, *, averaged: bool = False) -> ConvertedWeights:
    """The weights at path by official name, each read and converted when it is asked for.

    path: a safetensors or torch file, a Hugging Face directory, a run or checkpoint directory of our own, or an address
    of a hub (hub.py), which is fetched.  format: one of FORMATS where the names are to be of that format; None = found
    out.  averaged: the averages of a run's weights (optim.ema_decay) in place of these.  A run's adapters (optim.lora)
    are merged into its weights.  Raises ConfigError, naming path, fault and remedy, for what is no such file, holds
    code, has names of no known format, or has no averages.
    """
    origin = pinned(path)
    path = fetched(origin)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format ({format}) is unknown; the formats are: {', '.join(FORMATS)}")
    if _is_run(path):
        if format is not None:
            raise ConfigError(f"{path} is a run directory of our own, not a file of format={format}; leave format out")
        checkpoint = find_checkpoint(path)
        entries = with_adapters_merged(read_checkpoint_weights(checkpoint, averaged).entries, checkpoint)
        return ConvertedWeights(entries, str(checkpoint), "run", {name: (name,) for name in entries}, ())
    if averaged:
        raise ConfigError(f"{origin} is no run or checkpoint of our own, whose averages ema=true takes; leave it out")
    file = open_weights(path)
    return to_official(file.entries, format, origin, file.left_out)


def weights_classes(path: str | Path) -> tuple[str, ...] | None:
    """What the rows of the head of the weights at path are called; None where nothing says it.

    path: as read_weights takes it.  A run and what save_weights wrote say it, and a Hugging Face directory in its
    config.json (id2label, or timm's label_names).  Raises ConfigError for what is no weight file.
    """
    path = fetched(path)
    if _is_run(path):
        return checkpoint_classes(find_checkpoint(path))
    named = open_weights(path).classes
    return huggingface_classes(path) if named is None else named


def _is_run(path: Path) -> bool:
    """Whether path is a run that has begun a checkpoint, or a complete checkpoint; other folders are Hugging Face's."""
    checkpoints = path / "checkpoints"  # os.path: an impossible name is no directory, not an OSError
    if path.name.startswith("step_") and os.path.isfile(path / COMPLETE):
        return True
    return os.path.isdir(checkpoints) and any(checkpoints.glob("step_*"))


@torch.no_grad()
def load_weights(
    module: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    head: Head = "load",
    bands: Bands | None = None,
    strict: bool = True,
    averaged: bool = False,
) -> LoadReport:
    """Copy the weights at path into a model, parameter by parameter, in the model's dtype and on its devices.

    head, bands and strict: see :func:`match_weights`; averaged: see :func:`read_weights`.  Nothing is changed when
    names or shapes do not fit.  Raises ConfigError for what read_weights and match_weights refuse, ValueError for a
    head that means nothing or a module on the meta device; it must not be sharded either.
    """
    own = module.state_dict(keep_vars=True)
    unreal = [name for name, tensor in own.items() if tensor.is_meta]
    if unreal:
        raise ValueError(
            f"{unreal[0]} is on the meta device; give the model memory first: module.to_empty(device='cpu')"
        )
    source = read_weights(path, format, averaged=averaged)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    weights, report = match_weights(source, shapes, head=head, bands=bands, strict=strict)
    for name in weights:
        own[name].copy_(weights[name])
    return report


def save_weights(
    module: SwinTransformerV2 | SimMIM | UPerNet,
    path: str | Path,
    format: str,
    *,
    weights: Mapping[str, Tensor] | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    card: str | None = None,
) -> list[Path]:
    """Write a model's weights in a format, one tensor at a time; returns the files written, the weights first.

    format: microsoft or timm, one file, by its suffix: .safetensors, or .pth, .pt, .bin for ``{"model": ...}`` as
    torch.save writes it; huggingface, a directory.  module tells the sizes and may be on the meta device.  weights: the
    values by the module's official names, best lazily; None = the module's own.  A SimMIM encoder's mask token goes
    with the SimMIM model alone.  A segmentation model has the names of Swin's own (segmenter.py), or is a directory of
    transformers' UperNetForSemanticSegmentation where that computes the same.  preprocessing: for huggingface's
    preprocessor_config.json; None writes none.  classes: what the head's rows are called, the first ones at least; they
    go to id2label of huggingface's config.json, into the metadata of a .safetensors (class_names, a JSON list), and
    beside "model" in other files (class_names, a list).  card: the text of a directory's README.md (model_card.py).

    An existing file is replaced when the new one is complete.  Raises, before anything is written, ConfigError when the
    format cannot hold the model or the weights are not the module's, ValueError when there are no values.
    """
    path = Path(path)
    if format not in WRITTEN_FORMATS:
        raise ConfigError(f"format ({format}) is not written; choose one of {', '.join(WRITTEN_FORMATS)}")
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name != "mask_token"}
    entries = _entries_of(module.state_dict() if weights is None else weights)
    entries.pop("mask_token", None)
    _check_same(own, entries)
    if isinstance(module, UPerNet):
        renamed = _segmenter_entries(module, format, {name: entries[name] for name in own})
    else:
        _check_holds(module, format, own, preprocessing)
        renamed = from_official({name: entries[name] for name in own}, format)
    if format == "huggingface":
        if os.path.exists(path) and not os.path.isdir(path):
            raise ConfigError(f"{path} is a file; format=huggingface writes a directory, name one")
        return write_huggingface(path, renamed, module, preprocessing, classes, card)
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a directory; format={format} writes one file, name it (.safetensors or .pth)")
    if path.suffix.lower() not in _WRITERS:
        raise ConfigError(f"{path}: format={format} writes a file that ends in one of {', '.join(_WRITERS)}; name one")
    _WRITERS[path.suffix.lower()](path, renamed, classes)
    return [path]


def _entries_of(weights: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    if isinstance(weights, LazyTensors):
        return dict(weights.entries)
    unreal = [name for name, tensor in weights.items() if tensor.is_meta]
    if unreal:
        raise ValueError(f"{unreal[0]} is on the meta device and has no values; give them: weights=read_weights(PATH)")

    def entry(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    return {name: entry(tensor) for name, tensor in weights.items()}


def _check_same(own: Mapping[str, tuple[int, ...]], entries: Mapping[str, LazyTensor]) -> None:
    """ConfigError unless entries are the module's names and shapes, in a float dtype."""
    for name in sorted(own.keys() ^ entries.keys()):
        raise ConfigError(
            f"weights {'lack' if name in own else 'have'} {name}, unlike the model; give those of its run"
        )
    for name, shape in own.items():
        if tuple(entries[name].shape) != shape:
            raise ConfigError(f"weights: {name} is {tuple(entries[name].shape)}, the model has {shape}")
        if entries[name].dtype not in FLOATS:
            raise ConfigError(f"weights: {name} is {entries[name].dtype}, not a float")


def _segmenter_entries(module: UPerNet, format: str, entries: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Entries of a segmentation model by the names of a format, which is refused where it cannot hold the model."""
    check_segmenter_format(format, module)
    if format == "microsoft":
        return {theirs: entries[name] for name, theirs in published_names(entries, module.encoder).items()}
    encoder = {name: entry for name, entry in entries.items() if name.startswith("encoder.")}
    _check_holds(module.encoder, format, {name: tuple(entry.shape) for name, entry in encoder.items()}, None)
    backbone = {f"backbone.{name}": entry for name, entry in from_official(encoder, format).items()}
    heads = {theirs: entries[name] for name, theirs in transformers_names(entries).items()}
    counters = [name.replace("running_mean", "num_batches_tracked") for name in heads if name.endswith("running_mean")]
    return backbone | heads | {name: LazyTensor((), torch.int64, lambda: torch.tensor(0)) for name in counters}


def _check_holds(
    module: SwinTransformerV2 | SimMIM,
    format: str,
    own: Mapping[str, tuple[int, ...]],
    preprocessing: Preprocessing | None,
) -> None:
    """ConfigError when the format has no place for something that the model has."""
    if format == "microsoft":
        return
    if encoder_of(module).frames is not None:
        raise ConfigError(f"format={format} cannot hold a model of clips (model.frames); export format=microsoft")
    extra = [name for name in own if ".norm3." in name]
    if extra:
        raise ConfigError(
            f"format={format} cannot hold the extra norms of huge and giant ({extra[0]}); export format=microsoft"
        )
    if format == "huggingface":
        check_huggingface(module, preprocessing)
    elif isinstance(module, SimMIM):
        raise ConfigError(
            "format=timm cannot hold a SimMIM model (mask token and decoder); export format=microsoft or huggingface, "
            "or save_weights(model.encoder, ...) for the backbone alone"
        )
