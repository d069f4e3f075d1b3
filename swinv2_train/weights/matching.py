"""Which of a file's weights go where in a model, and a plain word where they do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.config.shown import shown
from swinv2_train.models import SIZES
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors
from swinv2_train.weights.bands import PROJECTION, Bands, adaptation, adapted_bands
from swinv2_train.weights.inflation import inflated, inflation
from swinv2_train.weights.names import ConvertedWeights
from swinv2_train.weights.segmenter import AUXILIARY, check_same_heads

Shape = tuple[int, ...]
_INDICES_BYTES = 2**20
HeadWord = Literal["load", "auto", "fresh"]
Head = HeadWord | Path | Sequence[int]


@dataclass(frozen=True)
class LoadReport:
    """What became of every name: printed, a few lines."""

    format: str
    """The format of the source: one of names.FORMATS, or run."""
    loaded: tuple[str, ...]
    """Names of the model that take the source's values."""
    converted: Mapping[str, str]
    """For the loaded ones whose name in the source differs: that name (or several, joined by +)."""
    missing: tuple[str, ...]
    """Names of the model that the source does not give, or was not asked for; they keep the values they have."""
    unexpected: tuple[str, ...]
    """Names of the source that the model has no place for."""
    left_out: tuple[str, ...]
    """What the source has and the model does not want: buffers, another task's head or decoder, other containers."""
    prefix: str = ""
    """What stood before all names in the source."""
    bands: str = ""
    """How the patch embedding came to the model's channels, where the source has others; "" where it has not."""
    clips: str = ""
    """How weights of images became those of clips (inflation.py); "" where they did not."""
    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of the weights that were read so far, those that hold NaN or infinity: how many values, of how many."""

    def not_finite_text(self) -> str:
        """The weights that hold NaN or infinity, in words; "" where there are none."""
        if not self.not_finite:
            return ""
        listed = _some(f"{name} ({bad:,} of {size:,} values)" for name, (bad, size) in self.not_finite.items())
        return f"{len(self.not_finite)} weights hold NaN or infinity: {listed}; a model with them computes nothing else"

    def __str__(self) -> str:
        without = f", '{shown(self.prefix)}' taken off the names" if self.prefix else ""
        lines = [f"{len(self.loaded)} weights loaded ({self.format}, {len(self.converted)} names converted{without})"]
        for what, names in (
            ("keep their initial values", self.missing),
            ("not in this model", self.unexpected),
            ("left out", self.left_out),
        ):
            if names:
                lines.append(f"{len(names)} {what}: {_some(names)}")
        lines += [f"note: {said}" for said in (self.bands, self.clips) if said]
        if self.not_finite:
            lines.append(f"warning: {self.not_finite_text()}")
        return "\n".join(lines)


def match_weights(
    source: ConvertedWeights,
    target: Mapping[str, Shape],
    *,
    head: Head = "load",
    bands: Bands | None = None,
    strict: bool = True,
) -> tuple[LazyTensors, LoadReport]:
    """The source's weights by the names of a model, converted to it; nothing is read but with indices the head.

    source: official names, of a classifier, a headless backbone or a SimMIM model; target: the model's names and
    shapes, one of the same three.  What a task adds to the backbone (a classifier's
    head; SimMIM's mask token and decoder) follows head: "load" takes it from the source, which must have it; "auto"
    takes it where the source has one; "fresh" leaves the model's own.  A sequence of class indices, or a Path to a file
    with one index a line, gathers those rows of the source's head, in that order (ImageNet-22K to 1K: the official
    map22kto1k.txt).  What the model has no task part for is left out.

    bands: how a patch embedding of another number of channels is adapted (bands.py); None refuses it.  A sequence and
    "fresh" are done with the same number too.  Weights of images are inflated for a model of clips (inflation.py).

    strict=False reports missing and unexpected names in place of raising.  A shape that differs is always a
    ConfigError, as is a source of which nothing fits; it lists the first few names and says what the difference means.
    A head that is none of the above is a ValueError.
    """
    _check_head(head)
    origin = source.origin
    ours = {_bare(name): name for name in target}
    shapes = {_bare(name): shape for name, shape in target.items()}
    theirs = {_bare(name): entry for name, entry in source.entries.items()}
    named = {_bare(name): name for name in source.entries}
    assert len(theirs) == len(source.entries), "two names differ by 'encoder.' only"
    added = {name for name in shapes if _is_added(name)}
    backbone = {name: shape for name, shape in shapes.items() if name not in added}
    said_of_bands = ""
    if (
        bands is not None
        and PROJECTION in theirs
        and len(theirs[PROJECTION].shape) in (4, 5)
        and PROJECTION in backbone
    ):
        source_channels, channels = theirs[PROJECTION].shape[1], backbone[PROJECTION][1]
        if source_channels != channels or not isinstance(bands, str):
            said_of_bands = adaptation(source_channels, channels, bands)
        if bands != "fresh":
            theirs[PROJECTION] = adapted_bands(theirs[PROJECTION], channels, bands, origin)
    of_clips = inflated(theirs, shapes)
    theirs |= of_clips
    if head != "fresh":
        check_same_heads(theirs, shapes, origin)
    missing = [name for name in backbone if name not in theirs]
    unwanted_norm = () if "norm.weight" in backbone else ("norm.weight", "norm.bias")  # of UPerNet on raw maps
    known = {*backbone, *unwanted_norm}
    unexpected = [name for name in theirs if name not in known and not _is_added(name)]
    anew = {PROJECTION} if bands == "fresh" else set()
    misshapen = [
        name
        for name in backbone
        if name in theirs and name not in anew and tuple(theirs[name].shape) != tuple(backbone[name])
    ]
    none_fits = len(missing) == len(backbone)
    if misshapen or none_fits or (strict and (missing or unexpected)):
        said = {name: entry.shape for name, entry in theirs.items()}
        raise ConfigError(_misfit(origin, misshapen, missing, unexpected, said, backbone, none_fits))

    missing += sorted(anew & theirs.keys() & backbone.keys())
    if not isinstance(head, str):
        theirs |= _gathered(theirs, shapes, read_indices(head), origin)
    if head == "fresh" or _absent_by_choice(head, added, theirs):
        missing += added
    else:
        _check_task_part(added, theirs, shapes, origin, strict)
        missing += [name for name in added if name not in theirs]
    absent = set(missing)
    loaded = [name for name in shapes if name in theirs and name not in absent]
    told = {*loaded, *unexpected}
    unwanted = [name for name in theirs if name not in told]

    given = {name: " + ".join(source.sources[named[name]]) for name in loaded}
    report = LoadReport(
        format=source.format,
        loaded=tuple(ours[name] for name in loaded),
        converted={ours[name]: text for name, text in given.items() if text != ours[name]},
        missing=tuple(ours[name] for name in shapes if name in absent),
        unexpected=tuple(named[name] for name in unexpected),
        left_out=(*(named[name] for name in unwanted), *source.left_out),
        prefix=source.prefix,
        bands=said_of_bands,
        clips=inflation(of_clips, shapes[PROJECTION][2]) if of_clips else "",
    )
    return LazyTensors({ours[name]: _watched(ours[name], theirs[name], report.not_finite) for name in loaded}), report


def _watched(name: str, entry: LazyTensor, not_finite: dict[str, tuple[int, int]]) -> LazyTensor:
    """The entry, which notes when it is read how many of its values are NaN or infinite."""

    def read() -> Tensor:
        tensor = entry.read()
        suspect = not torch.isfinite(tensor.sum())  # one pass and no copy for what is sound
        if suspect and (bad := int((~torch.isfinite(tensor)).sum())):
            not_finite[name] = (bad, tensor.numel())
        return tensor

    return LazyTensor(entry.shape, entry.dtype, read)


def _bare(name: str) -> str:
    return name.removeprefix("encoder.")


def _is_added(name: str) -> bool:
    """Whether a task adds it to the backbone."""
    return name.startswith(("head.", "decoder.")) or name == "mask_token"


def _check_head(head: object) -> None:
    """ValueError unless head is a word of HeadWord, a Path, or a sequence of ints."""
    if isinstance(head, str):
        known = head in get_args(HeadWord)
    elif isinstance(head, Sequence) and not isinstance(head, bytes):
        known = all(isinstance(row, Integral) and not isinstance(row, bool) for row in head)
    else:
        known = isinstance(head, Path)
    if not known:
        raise ValueError(
            f"head ({head!r}) must be one of {', '.join(get_args(HeadWord))}, a list of class indices, or the Path of "
            "a file with one index a line"
        )


def _absent_by_choice(head: Head, added: set[str], theirs: Mapping[str, LazyTensor]) -> bool:
    return head == "auto" and not any(name in theirs for name in added)


_SEGMENTATION = "segmentation head"


def _task_part(added: set[str]) -> str:
    """What the names are of, in words."""
    if any(name.startswith("head.") for name in added):
        return "head"
    return _SEGMENTATION if any("decode_head." in name for name in added) else "SimMIM decoder or mask token"


def _check_task_part(
    added: set[str], theirs: Mapping[str, LazyTensor], shapes: Mapping[str, Shape], origin: str, strict: bool
) -> None:
    """ConfigError when the source lacks a part of the head (or decoder), or has it in another shape."""
    what = _task_part(added)
    absent = sorted(name for name in added if name not in theirs)
    if what == _SEGMENTATION and all(name.startswith(AUXILIARY) for name in absent):
        absent = []  # of training alone, so that others do not save it
    if absent and strict:
        lacks = f"has no {what} ({', '.join(absent)})"
        other = "head=auto loads it where a file has one"
        if len(absent) < len(added):
            lacks = f"lacks a part of the {what} ({', '.join(absent)})"
            other = f"strict=False loads the rest and keeps the model's {' and '.join(absent)}"
        raise ConfigError(f"{origin} {lacks}; head=fresh starts with a new one, {other}")
    for name in sorted(added):
        if name in theirs and tuple(theirs[name].shape) != tuple(shapes[name]):
            raise ConfigError(
                f"{origin}: {name} is {theirs[name].shape}, the model has {tuple(shapes[name])}"
                + (
                    "; head=fresh starts with a new head, head=FILE takes the rows whose indices FILE lists, one a line"
                    if what == "head"
                    else f"; head=fresh leaves it out: the {what} starts anew"
                )
            )


# --------------------------------------------------------------------------------------------------------------------
# Rows of a head


def read_indices(head: Path | Sequence[int]) -> list[int]:
    """The rows of a head that a file lists, one a line, or that are given; ConfigError for another file."""
    if not isinstance(head, Path):
        return [int(row) for row in head]
    try:
        return [int(line) for line in read_bytes(head, _INDICES_BYTES).decode().split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"head ({head}): not a list of class indices, one a line ({error})") from error


def _gathered(
    theirs: Mapping[str, LazyTensor], shapes: Mapping[str, Shape], rows: list[int], origin: str
) -> dict[str, LazyTensor]:
    """The source's head with the given rows alone."""
    if "head.weight" not in shapes:
        raise ConfigError("head: class indices were given, but this model has no classification head")
    if "head.weight" not in theirs or "head.bias" not in theirs:
        raise ConfigError(f"{origin} has no head to take rows from; head=fresh starts with a new one")
    classes, given = shapes["head.weight"][0], theirs["head.weight"].shape[0]
    if len(rows) != classes:
        raise ConfigError(f"head: {len(rows)} class indices for a model of {classes} classes; give one for each")
    outside = [row for row in rows if not 0 <= row < given]
    if outside:
        raise ConfigError(f"head: class index {outside[0]} is outside of the {given} classes of {origin}")

    def taken(entry: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            return entry.read()[torch.tensor(rows)]

        return LazyTensor((classes, *entry.shape[1:]), entry.dtype, read)

    return {name: taken(theirs[name]) for name in ("head.weight", "head.bias")}


# --------------------------------------------------------------------------------------------------------------------
# What a misfit means


def _misfit(
    origin: str,
    misshapen: list[str],
    missing: list[str],
    unexpected: list[str],
    theirs: Mapping[str, Shape],
    ours: Mapping[str, Shape],
    none_fits: bool,
) -> str:
    problems = []
    if misshapen:
        listed = [f"{name} is {tuple(theirs[name])}, the model has {tuple(ours[name])}" for name in misshapen[:2]]
        problems.append(f"{len(misshapen)} shapes differ: {'; '.join(listed)}")
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_some([f'{n} {tuple(theirs[n])}' for n in unexpected])}")
    if none_fits:
        problems.append("nothing fits")
    meaning = _differences(model_facts(theirs), model_facts(ours))
    if meaning is None and misshapen:
        meaning = "Sizes are the same otherwise: name another file"
    elif meaning is not None and misshapen == [PROJECTION] and theirs[PROJECTION][2:] == tuple(ours[PROJECTION])[2:]:
        meaning += (
            ", or let init_bands=mean adapt the patch embedding (or repeat, fresh, or a band of the file for each)"
        )
    elif meaning is None:
        meaning = "Sizes are the same: the file is incomplete, or holds other parts; name another file, or strict=False"
    return f"{origin} does not fit the model: {'; '.join(problems)}. {meaning}"


def model_facts(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What names and shapes tell of a backbone: the constructor's arguments, as far as weights show them."""
    facts: dict[str, Any] = {}
    projection = shapes.get("patch_embed.proj.weight", ())
    if len(projection) in (4, 5):
        facts |= {"embed_dim": projection[0], "in_chans": projection[1], "patch_size": projection[-1]}
        facts["inputs"] = "images" if len(projection) == 4 else f"clips with patches of {projection[2]} frames"
    depths: dict[int, int] = {}
    for name in shapes:
        if match := re.match(r"layers\.([0-9]{1,9})\.blocks\.([0-9]{1,9})\.", name):
            stage = int(match[1])
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
    stages = range(min(max(depths, default=-1) + 1, len(shapes)))  # no number in a name makes more than there is
    facts["depths"] = tuple(depths.get(stage, 0) for stage in stages)
    scales = [shapes.get(f"layers.{stage}.blocks.0.attn.logit_scale", ()) for stage in stages]
    facts["num_heads"] = tuple(scale[0] if scale else 0 for scale in scales)
    first = "layers.0.blocks.0."
    fc1, cpb = shapes.get(f"{first}mlp.fc1.weight", ()), shapes.get(f"{first}attn.cpb_mlp.0.weight", ())
    if len(fc1) == 2 and fc1[1]:
        facts["mlp_ratio"] = fc1[0] / fc1[1]
    if cpb:
        facts["width of the position bias MLP"] = cpb[0]
    facts["qkv_bias"] = f"{first}attn.q_bias" in shapes
    extra = sorted({int(m[1]) for n in shapes if (m := re.match(r"layers\.[0-9]+\.blocks\.([0-9]{1,9})\.norm3\.", n))})
    facts["extra_norm_period"] = extra[0] + 1 if extra else 0
    return facts


def size_of(facts: Mapping[str, Any]) -> str | None:
    """The published size that has these channels, depths and heads."""
    keys = ("embed_dim", "depths", "num_heads")
    return next((name for name, size in SIZES.items() if all(facts.get(key) == size[key] for key in keys)), None)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """What the sizes are where they differ; None where they do not."""
    differing = [key for key in theirs if key in ours and theirs[key] != ours[key]]
    if not differing:
        return None

    def told(facts: Mapping[str, Any]) -> str:
        size = size_of(facts)
        return ", ".join(f"{key} {facts[key]}" for key in differing) + (f" (the size {size})" if size else "")

    return f"The file has {told(theirs)}; the model has {told(ours)}: change the model section, or name another file"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(shown, listed[:4])) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
