"""Everyone's parameter names: which implementation a file is from, and the way from its names to the official ones.

The names themselves are in naming.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors
from swinv2_train.weights.naming import HUGGINGFACE, OFFICIAL, QKV, TIMM, TORCHVISION, Naming, mmpretrain_naming
from swinv2_train.weights.segmenter import SEGMENTATION_HEADS, dense_names
from swinv2_train.weights.wrappers import unwrap

FORMATS = ("microsoft", "simmim", "timm", "huggingface", "mmpretrain", "torchvision")
"""The formats that are read; a run directory of our own is one more, named by its path."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_BUFFER = re.compile(r"(^|\.)(relative_coords_table|relative_position_index|attn_mask|k_bias|num_batches_tracked)$")
_TASK_PARTS = ("head.", "classifier.", "decoder.", "mask_token", *SEGMENTATION_HEADS)
"""Beginnings of what a task adds to a backbone, in any naming."""
_SIDE_PART = re.compile(r"(?:backbone\.)?(?:mask|vocabulary)_[a-z]+")
"""SkySense++'s tokens for annotations, which are the only ones that its mask token hides."""
_BIAS = "attn.qkv.bias"
"""torchvision's; its middle third, the keys', counts as 0 there."""
_QKV_PARTS = tuple(f"attention.self.{part}.weight" for part in ("query", "key", "value"))


_Found = tuple[LazyTensor, tuple[str, ...]]  # a weight, and its names in the file


class ConvertedWeights(LazyTensors):
    """Weights by official name that know where they are from.

    origin: the file or directory.  format: one of FORMATS, or "run".  sources: the names each one has in the file.
    left_out: names in the file that are no weights (buffers that follow from the window), or no part of the model, and
    containers that were not read.  prefix: what stood before all names in the file, and was taken off.
    """

    def __init__(
        self,
        entries: Mapping[str, LazyTensor],
        origin: str,
        format: str,
        sources: Mapping[str, tuple[str, ...]],
        left_out: Iterable[str],
        prefix: str = "",
    ) -> None:
        super().__init__(entries)
        self.prefix = prefix
        self.origin = origin
        self.format = format
        self.sources = dict(sources)
        self.left_out = tuple(left_out)


# --------------------------------------------------------------------------------------------------------------------
# Which format


def detect_format(entries: Mapping[str, LazyTensor], said: str | None, origin: str) -> str:
    """The format of a file by its names and shapes; said: the format that the user named, which must fit.

    timm's older layout has the official names and is called microsoft.  Raises ConfigError naming origin, the known
    formats and the file's first names.
    """
    if said is not None and said not in FORMATS:
        raise ConfigError(f"format ({said}) is unknown; the formats are: {', '.join(FORMATS)}")
    names = " ".join(entries)
    if "relative_position_bias_table" in names:
        raise ConfigError(f"{origin}: weights of Swin V1 (they have relative_position_bias_table); name a Swin V2 file")
    found = _detected(entries)
    fitting = {"microsoft": ("microsoft", "simmim"), "timm": ("timm", "microsoft")}
    if found is not None and (said is None or found in fitting.get(said, (said,))):
        return said or found
    first = ", ".join(shown(name) for name in list(entries)[:3])
    known = f"the formats are {', '.join(FORMATS)}; the file's names begin with {first}"
    if found is not None:
        raise ConfigError(f"{origin}: the names are not of format={said} but of {found}; {known}")
    if "meta_mlp" in names:
        raise ConfigError(f"{origin}: looks like timm's swin_transformer_v2_cr, which is not read; {known}")
    raise ConfigError(f"{origin}: not the names of a Swin V2 model; {known}")


def _detected(entries: Mapping[str, LazyTensor]) -> str | None:
    if any(".attention.self." in name for name in entries):
        return "huggingface"
    if any(".attn.w_msa." in name for name in entries):
        return "mmpretrain"
    if any(re.match(r"features\.\d+\.\d+\.attn\.", name) for name in entries):
        return "torchvision"
    if not any(re.match(r"(encoder\.)?layers\.\d+\.blocks\.\d+\.(attn|mlp|norm)", name) for name in entries):
        return None
    if any(name.startswith(("encoder.", "decoder.")) or name == "mask_token" for name in entries):
        return "simmim"
    return "timm" if _has_timm_layout(entries) else "microsoft"


def _has_timm_layout(entries: Mapping[str, LazyTensor]) -> bool:
    """Whether merging begins the stages: what it gives has then the width of the blocks in its own stage.

    A head would tell too, but a file may have none.  Without any merging to look at, the head's name decides.
    """
    for name, entry in entries.items():
        match = re.fullmatch(r"(layers\.\d+\.)downsample\.reduction\.weight", name)
        block = entries.get(f"{match[1]}blocks.0.norm1.weight") if match else None
        if block is not None and len(entry.shape) == 2:
            return entry.shape[0] == block.shape[0]
    return any(name.startswith("head.fc.") for name in entries)


# --------------------------------------------------------------------------------------------------------------------
# Their names to ours


def to_official(
    entries: Mapping[str, LazyTensor], said: str | None, origin: str, left_out: Iterable[str]
) -> ConvertedWeights:
    """A file's tensors by official name; a name that has no official one stays as it is.

    said: the format that the user named, None = detected.  origin: the file, for messages.  Raises ConfigError when the
    names are of no known format or of two, when two are the same parameter, or when a tensor holds no floats.
    """
    unwrapped = unwrap(entries, _TASK_PARTS, origin)
    weights = {name: entry for name, entry in unwrapped.entries.items() if not _BUFFER.search(name)}
    dropped = [name for name in entries if _BUFFER.search(name)]
    format = detect_format(weights, said, origin)
    _check_filled(weights, origin)
    naming = _naming(format, weights)
    dense, beside = dense_names(weights)
    if format == "mmpretrain":
        beside += [name for name in weights if _SIDE_PART.fullmatch(name)]
    dropped += [unwrapped.sources[name] for name in beside]
    for name in beside:
        del weights[name]
    found: dict[str, _Found] = {}

    def add(name: str, entry: LazyTensor, sources: tuple[str, ...]) -> None:
        if name in found:
            doubled = " and ".join(map(shown, found[name][1] + sources))
            raise ConfigError(f"{origin}: {doubled} are the same weight; keep one")
        found[name] = (entry, sources)

    if format == "huggingface":
        weights = _join_qkv(weights, add, origin)
    if format == "torchvision":
        weights = _split_bias(weights, add, origin)
    for source, entry in weights.items():
        if entry.dtype not in FLOATS:
            raise ConfigError(f"{origin}: {shown(source)} is {entry.dtype}, not a float; save the weights as float32")
        bare = source.replace(".attn.rpe_mlp.", ".attn.cpb_mlp.").removeprefix(naming.prefix)
        official = dense.get(source) or naming.official(bare)
        if official is None and OFFICIAL.official(source.removeprefix("encoder.")) is not None:
            raise ConfigError(f"{origin}: has names of {format} and official ones ({shown(source)}); keep one kind")
        if format == "mmpretrain" and official is not None and official.endswith("downsample.reduction.weight"):
            entry = reordered_merging(entry, origin)
        add(official or source, entry, (source,))
    ours = _with_encoder_prefix(found)
    return ConvertedWeights(
        {name: entry for name, (entry, _) in ours.items()},
        origin,
        format,
        {name: tuple(unwrapped.sources[each] for each in sources) for name, (_, sources) in ours.items()},
        [*left_out, *unwrapped.left_out, *dropped],
        unwrapped.prefix,
    )


def _check_filled(weights: Mapping[str, LazyTensor], origin: str) -> None:
    """Refuse weights that are names alone: under ZeRO-3, a parameter outside of its use is an empty tensor."""
    empty = [name for name, entry in weights.items() if 0 in entry.shape]
    if empty:
        raise ConfigError(
            f"{origin}: {len(empty)} of {len(weights)} tensors are empty ({shown(empty[0])} is "
            f"{tuple(weights[empty[0]].shape)}): saved under ZeRO-3, where a process holds its share alone; make a "
            "whole file of the run's checkpoint, by python -m swinv2_train.export run_dir=DIR of a run of ours, or by "
            "DeepSpeed's zero_to_fp32.py, which lies in the checkpoints of others"
        )


def _naming(format: str, entries: Mapping[str, LazyTensor]) -> Naming:
    if format == "huggingface":
        return HUGGINGFACE
    if format == "torchvision":
        return TORCHVISION
    if format == "mmpretrain":
        stages = [int(match[1]) for name in entries if (match := re.search(r"(?:^|\.)stages\.([0-9]+)\.", name))]
        return mmpretrain_naming(max(stages, default=0) + 1)
    return TIMM if format == "timm" and _has_timm_layout(entries) else OFFICIAL


def _join_qkv(
    entries: Mapping[str, LazyTensor], add: Callable[[str, LazyTensor, tuple[str, ...]], None], origin: str
) -> dict[str, LazyTensor]:
    """Give complete query, key, value triples to add as one qkv each; returns what is left."""
    rest = dict(entries)
    for first in entries:
        if not first.endswith(_QKV_PARTS[0]):
            continue
        stem = first.removesuffix(_QKV_PARTS[0])
        names = tuple(stem + part for part in _QKV_PARTS)
        block = re.fullmatch(r"encoder\.(layers\.\d+\.blocks\.\d+\.)", stem.removeprefix(HUGGINGFACE.prefix))
        if block is None or any(name not in rest for name in names):
            continue  # an incomplete triple is left over, and its qkv is missing
        parts = [rest.pop(name) for name in names]
        if len({(part.shape, part.dtype) for part in parts}) != 1 or parts[0].dtype not in FLOATS:
            pairs = zip(map(shown, names), parts, strict=True)
            listed = ", ".join(f"{name} {part.shape} {part.dtype}" for name, part in pairs)
            raise ConfigError(f"{origin}: {listed} do not belong together; fetch or save the file again")
        rows, columns = parts[0].shape[0], parts[0].shape[1:]
        add(block[1] + QKV, LazyTensor((3 * rows, *columns), parts[0].dtype, _joined(parts)), names)
    return rest


def _split_bias(
    entries: Mapping[str, LazyTensor], add: Callable[[str, LazyTensor, tuple[str, ...]], None], origin: str
) -> dict[str, LazyTensor]:
    """Give the first and the last third of each bias of queries, keys and values to add; returns what is left.

    The keys' third is nothing: torchvision sets it to 0 before each use.
    """
    rest = dict(entries)
    for source, entry in entries.items():
        if not source.endswith(_BIAS):
            continue
        stem = source.removesuffix("qkv.bias")
        names = [TORCHVISION.official(f"{stem}{part}_bias") for part in ("q", "v")]
        if None in names:
            continue
        if len(entry.shape) != 1 or entry.shape[0] % 3 or entry.dtype not in FLOATS:
            raise ConfigError(
                f"{origin}: {shown(source)} is {entry.shape} {entry.dtype}, not a bias of queries, keys and values "
                "(3C); fetch or save the file again"
            )
        queries, _, values = _thirds(rest.pop(source))
        for name, third in zip(names, (queries, values), strict=True):
            add(str(name), third, (source,))
    return rest


def _joined(parts: list[LazyTensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat([part.read() for part in parts])


def _with_encoder_prefix(found: Mapping[str, _Found]) -> dict[str, _Found]:
    """A SimMIM model's backbone is behind ``encoder.``."""
    if "mask_token" not in found and not any(name.startswith("decoder.") for name in found):
        return dict(found)
    return {
        name if name.startswith("decoder.") or OFFICIAL.official(name) is None else f"encoder.{name}": value
        for name, value in found.items()
    }


def reordered_merging(entry: LazyTensor, origin: str) -> LazyTensor:
    """mmpretrain's patch merging weight (2C, 4C) with its input channels in the official order.

    nn.Unfold gives channel by channel the positions (0,0) (0,1) (1,0) (1,1); the official code gives position by
    position, in the order (0,0) (1,0) (0,1) (1,1), all channels.  Raises ConfigError when 4 does not divide its width.
    """
    if len(entry.shape) != 2 or entry.shape[1] % 4:
        raise ConfigError(f"{origin}: a patch merging weight is {entry.shape}, not (2C, 4C); fetch the file again")
    rows, columns = entry.shape

    def read() -> Tensor:
        by_channel = entry.read().view(rows, columns // 4, 4)
        return by_channel[:, :, [0, 2, 1, 3]].transpose(1, 2).reshape(rows, columns)

    return LazyTensor(entry.shape, entry.dtype, read)


# --------------------------------------------------------------------------------------------------------------------
# Ours to theirs


def from_official(entries: Mapping[str, LazyTensor], format: str) -> dict[str, LazyTensor]:
    """Official entries by the names of a format that is written: microsoft, timm or huggingface.

    A classifier, a headless backbone (bare names in huggingface too), or a SimMIM model; KeyError for a name that the
    format has no place for.
    """
    if format == "microsoft":
        return dict(entries)
    naming = {"timm": TIMM, "huggingface": HUGGINGFACE}[format]
    complete = any(name.startswith(("head.", "decoder.")) for name in entries)
    prefix = naming.prefix if complete else ""
    renamed: dict[str, LazyTensor] = {}
    for full_name, entry in entries.items():
        name = full_name.removeprefix("encoder.")
        own = "" if name.startswith(("head.", "decoder.")) else prefix
        if format == "huggingface" and name.endswith(QKV):
            for theirs, row in zip(_QKV_PARTS, _thirds(entry), strict=True):
                renamed[f"{own}encoder.{name.removesuffix(QKV)}{theirs}"] = row
        else:
            renamed[own + naming.theirs(name)] = entry
    return renamed


def _thirds(entry: LazyTensor) -> list[LazyTensor]:
    rows = entry.shape[0] // 3

    def third(index: int) -> LazyTensor:
        return LazyTensor(
            (rows, *entry.shape[1:]), entry.dtype, lambda: entry.read()[index * rows : (index + 1) * rows].clone()
        )

    return [third(index) for index in range(3)]
